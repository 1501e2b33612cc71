"""The agent loop: parsing, selection, state per candidate, openings, and other libraries' trajectories."""

import json

import pytest

from stillroom.core.errors import UserError
from stillroom.lm.agent import Workbench, code_of, first_thoughts, read_published, rollout, select
from stillroom.lm.sandbox import Outcome, Sandbox


def says(*replies):
    """A policy that gives, at the i-th step, the i-th list of candidates; and a record of what it was asked."""
    asked = []

    def policy(chats, openings, samples):
        step = sum(m["role"] == "assistant" for m in chats[0])
        asked.append((chats, list(openings), samples))
        return [[first + text for text in replies[step]] for first in openings]

    policy.asked = asked
    return policy


def act(code, thought="x"):
    return f"Thought: {thought}\n\nCode:\n```py\n{code}\n```"


@pytest.fixture(scope="module")
def bench():
    try:
        with Sandbox({"look": {"a": 3}.__getitem__, "final_answer": lambda value: value}) as box:
            box.run("1")
            yield Workbench(box)
    except UserError as wrong:
        pytest.skip(str(wrong))


def test_code_is_read_from_its_fence():
    assert code_of(act("x=1\nprint(x)")) == "x=1\nprint(x)"
    assert code_of("Code:\n```python\n1\n```<end_code>") == "1"
    assert code_of("Thought: no code") is None
    assert code_of("Code:\n```py\nunclosed") is None


def done(output, error=None, calls=()):
    return Outcome(output, error, "", calls)


def test_selection_takes_the_first_of_the_largest_group_that_ran():
    assert select([done("1"), done("2"), done("2"), done("", "E"), None]) == 1
    assert select([None, done("", "E"), done("5"), done("6")]) == 2
    assert select([None, done("", "E")]) == 0
    address = [done("x"), done("<f at 0x7f01>"), done("<f at 0x7f02>")]
    assert select(address) == 1
    answer = lambda v: done("", None, (("final_answer", (v,), {}, v),))
    assert select([answer(1), answer(2), answer(2)]) == 1


def test_an_episode_with_recovery(bench):
    policy = says([act("y = 4\nlook('b')")], ["no code"], [act("print(y + look('a'))")], [act("final_answer(y)")])
    (episode,) = rollout(policy, ["q"], bench, system="S")
    assert (episode.answer, episode.parse_errors, episode.execution_errors, episode.calls, episode.steps) == ("4", 1, 1, 1, 4)
    assert [m["role"] for m in episode.chat] == ["system", "user"] + ["assistant", "user"] * 3 + ["assistant"]
    assert "RuntimeError: look: 'b'" in episode.chat[3]["content"]
    assert episode.chat[7]["content"] == "7"
    assert not episode.clean
    trace = episode.trace("short", teacher="t")
    assert trace.segments[0].text == "short"
    assert [s.trained for s in trace.segments] == [False, False] + [True, False] * 3 + [True]
    assert trace.source == {"answer": "4", "teacher": "t"}


def test_an_unfinished_episode_ends_its_trace_with_the_assistant(bench):
    (episode,) = rollout(says([act("print(1)")], [act("print(2)")]), ["q"], bench, max_steps=2)
    assert episode.answer is None
    assert episode.trace("").segments[-1].role == "assistant"


def test_rejected_candidates_leave_no_trace_in_the_state(bench):
    candidates = [act("log.append('bad')\nprint(len(log) + 100)"), act("print(len(log))"), act("print(len(log), end='')")]
    policy = says([act("log = []")] * 3, candidates, [act("final_answer(len(log))")] * 3)
    (episode,) = rollout(policy, ["q"], bench, samples=3)
    assert episode.answer == "0"
    assert episode.chat[3]["content"] == candidates[1]


def test_a_first_thought_opens_the_first_step_only_and_stays_in_the_message(bench):
    thoughts = first_thoughts(says(["add them\n\n1+1=2\n#### 2"]), ["q"])
    assert thoughts == ["Thought: add them\n\n"]
    policy = says(["Code:\n```py\nz=2\n```"], [act("final_answer(z)")])
    (episode,) = rollout(policy, ["q"], bench, openings=thoughts)
    assert [openings for _, openings, _ in policy.asked] == [thoughts, [""]]
    assert episode.chat[1]["content"].startswith("Thought: add them\n\nCode:")
    assert episode.answer == "2"


def test_published_trajectories(tmp_path):
    part = lambda text: [{"type": "text", "text": text}]
    messages = [
        {"role": "system", "content": part("long prompt")}, {"role": "user", "content": part("q")},
        {"role": "assistant", "content": part(act("1"))}, {"role": "tool-call", "content": part("Calling tools: ...")},
        {"role": "tool-response", "content": part("Observation: 1")}, {"role": "assistant", "content": part(act("final_answer(1)"))},
        {"role": "tool-call", "content": part("Calling tools: ...")}, {"role": "tool-response", "content": part("1")},
    ]  # fmt: skip
    file = tmp_path / "t.jsonl"
    file.write_text(json.dumps({"log_data": {"messages": messages}}) + "\n" + json.dumps({"messages": messages}) + "\n")
    first, second = read_published(file, "short")
    assert first == second
    assert [(s.role, s.trained) for s in first.segments] == [
        ("system", False), ("user", False), ("assistant", True), ("user", False), ("assistant", True)
    ]  # fmt: skip
    assert first.segments[0].text == "short"
    file.write_text('{"rows": []}\n')
    with pytest.raises(UserError, match="line 1 holds no trajectory"):
        list(read_published(file, ""))


def test_what_is_written_after_the_code_is_not_stored(bench):
    made_up = "\nObservation: 99\nThought: so it is 99"
    (episode,) = rollout(says([act("print(1)") + made_up], [act("final_answer(2)") + made_up]), ["q"], bench)
    assert episode.chat[1]["content"].endswith(made_up)
    assert [s.text for s in episode.trace("").segments if s.trained] == [act("print(1)"), act("final_answer(2)")]
