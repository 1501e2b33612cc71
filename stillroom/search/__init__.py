"""Search over anything that can modify and test itself: a tree of agents, noisy pass/fail evaluations, a fixed budget."""

from stillroom.search.archive import Agent, Archive, Evaluate, Expand, Log, Trial
from stillroom.search.loop import Found, search
from stillroom.search.policies import POLICIES, Policy, best_belief, dgm, greedy, hgm, own_score, random_search, thompson
from stillroom.search.sandbox import Limits, Sandbox, SandboxError, run_function

__all__ = [
    "POLICIES",
    "Agent",
    "Archive",
    "Evaluate",
    "Expand",
    "Found",
    "Limits",
    "Log",
    "Policy",
    "Sandbox",
    "SandboxError",
    "Trial",
    "best_belief",
    "dgm",
    "greedy",
    "hgm",
    "own_score",
    "random_search",
    "run_function",
    "search",
    "thompson",
]
