"""Hello: a recipe for test_claims.py that computes its metrics and notes every execution."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

from stillroom.catalogue.claims import Claim


@dataclass(frozen=True)
class Config:
    offset: float = 0.0
    fail_at: int = -1
    """Seed at which it fails, once the file FAIL is there."""


def full() -> Config:
    return Config()


ARMS = {"plain": {}, "better": {"offset": 1.0}, "wild": {"offset": 2.0}}
CLAIMS = [
    Claim("better is more", metric="value", arm="better", versus="plain", paper="2 % | more"),
    Claim("better loses less", metric="loss", arm="better", versus="plain", better="lower"),
    Claim("plain beats one half", metric="value", arm="plain", versus=0.5),
    Claim("plain is no worse by two", metric="value", arm="plain", versus="better", margin=-2.0),
    Claim("wild is finite", metric="odd", arm="wild", versus="plain"),
]


def main(cfg, run):
    with open(os.environ["HELLO_LOG"], "a") as log:
        log.write(f"{cfg.offset:g}/{run.seed} {os.getpid()}\n")
    if os.path.exists("SLOW"):
        time.sleep(30)
    if run.seed == cfg.fail_at and os.path.exists("FAIL"):
        raise KeyboardInterrupt
    noise = (run.seed * 7919 % 13) / 13
    odd = float("nan") if cfg.offset == 2 and run.seed == 1 else noise
    return {"value": noise + cfg.offset + 0.1 * (run.seed % 2), "loss": noise - cfg.offset * 0.1 * (run.seed % 3), "odd": odd}
