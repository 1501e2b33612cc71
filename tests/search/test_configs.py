"""Configs as agents: what may change, how far, and who proposes it."""

from __future__ import annotations

import json
import threading
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Annotated, Literal

import numpy as np
import pytest
from annotated_types import Gt, Interval, Lt

from stillroom import cli
from stillroom.core import config
from stillroom.core.config import Count, NonNegative, Positive, Share
from stillroom.core.errors import UserError
from stillroom.search import Log, Trial
from stillroom.search.configs import Mutate, Propose, Seeds, flags_of, middle, server, valid


@dataclass(frozen=True)
class Inner:
    lr: Positive = 1e-3
    beta: Annotated[float, Interval(gt=0.5, lt=1.0)] = 0.9
    kind: Literal["sgd", "adam"] = "sgd"
    warmup: Count = 5


@dataclass(frozen=True)
class Example:
    data: str = "digits"
    share: Share = 0.5
    weight: NonNegative = 0.0
    free: float = 1.0
    odd: Annotated[int, Gt(2), Lt(8)] = 5
    flag: bool = False
    drops: tuple[float, ...] = (0.5,)
    inner: Inner = Inner()


EMPTY = Log([], [], 0)


def test_numbers_with_a_fraction_choices_and_switches_may_change_and_whole_numbers_when_named():
    assert [flag.name for flag in flags_of(Example())] == ["share", "weight", "free", "flag", "inner.lr", "inner.beta", "inner.kind"]
    flags = {flag.name: flag for flag in flags_of(Example(), ["--inner.lr", "odd", "share"])}
    assert (flags["odd"].low, flags["odd"].high) == (3, 7)
    assert (flags["share"].low, flags["share"].high) == (0, 1)
    assert 0 < flags["inner.lr"].low < 1e-6
    for name in ("data", "drops", "nothing"):
        with pytest.raises(UserError, match="no such flag can be varied"):
            flags_of(Example(), [name])


@pytest.mark.parametrize("anywhere", [False, True])
def test_changes_stay_in_range_move_and_depend_on_the_seed_alone(anywhere):
    flags = tuple(flags_of(Example(), [flag.name for flag in flags_of(Example())] + ["odd", "inner.warmup"]))
    modify = Mutate(Example(), flags, anywhere=anywhere)
    artefact, seen, counts = {}, {}, []
    for seed in range(400):
        child = modify(artefact, EMPTY, seed)
        assert child == modify(artefact, EMPTY, seed)
        assert json.loads(json.dumps(child)) == child
        config.check(config.override(Example(), child))
        changed = [name for name in {**artefact, **child} if artefact.get(name) != child.get(name)]
        counts.append(len(changed))
        for name, value in child.items():
            seen.setdefault(name, set()).add(value)
            assert type(value) is type(config.flatten(Example())[name])
        artefact = child
    assert set(seen) == {flag.name for flag in flags}
    assert anywhere or (max(counts) == 2 and sum(count > 0 for count in counts) >= 390)  # now and then a step rounds to nothing
    assert all(len(values) > 1 or name in ("flag", "inner.kind") for name, values in seen.items())


def test_a_change_back_to_the_default_is_no_change():
    assert valid(Example(), {"share": 0.5, "free": 2.0}) == {"free": 2.0}
    with pytest.raises(UserError, match="out of range"):
        valid(Example(), {"share": 1.5})


def test_the_threshold_lets_about_half_of_the_start_pass():
    assert middle([3, 1, 2]) == 2
    assert middle([4, 1, 2, 3]) == 3


class Server:
    """An OpenAI-compatible server that gives set answers and keeps what it was asked."""

    def __init__(self, answers):
        outer = self
        self.asked, self.answers = [], list(answers)

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.asked.append((self.path, self.headers["Authorization"], body))
                content = json.dumps({"choices": [{"message": {"content": outer.answers.pop(0)}}]}).encode()
                self.send_response(200)
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *args):
                pass

        self.http = HTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"


def test_a_language_model_proposes_with_the_archive_as_context(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sesame")
    good = 'Higher.\n```json\n{"share": 1, "inner.kind": "adam"}\n```'
    bad = [
        "I do not know",
        '{"nothing": 1}',
        '{"share": 3}',
        '{"share": "much"}',
        '{"inner.kind": "rmsprop"}',
        "{}",
        '{"odd": 3.5}',
        '{"flag": 1}',
    ]
    host = Server([good, *bad])
    flags = tuple(flags_of(Example(), ["share", "inner.kind", "odd", "flag"]))
    modify = Propose(Example(), flags, "What the recipe does.", "ece of at most 0.1", host.url, "small-model")
    log = Log([Trial(0, False, "ece 0.25 at seed 0")], [(None, {}, 3, 5), (0, {"share": 0.75}, 1, 2)], 1)
    assert modify({"share": 0.75}, log, 7) == {"share": 1.0, "inner.kind": "adam"}
    path, key, body = host.asked[0]
    assert (path, key, body["model"]) == ("/v1/chat/completions", "Bearer sesame", "small-model")
    prompt = body["messages"][0]["content"]
    for part in ("What the recipe does.", "ece of at most 0.1", "share: now 0.75, float between 0 and 1", "one of 'sgd', 'adam'",
                 '{"share": 0.75}: 1 of 3 passed', "failed: ece 0.25 at seed 0"):  # fmt: skip
        assert part in prompt
    for _ in bad:
        with pytest.raises((ValueError, UserError)):
            modify({}, log, 7)
    assert not host.answers


@pytest.mark.parametrize("name", ["gpt", "openai:gpt", "openai:http://here/v1", "openai:http://here/v1#", "openai:ftp://here#m"])
def test_proposers_that_are_no_servers_are_refused(name):
    with pytest.raises(UserError, match="--proposer"):
        server(name)


def test_server_names():
    assert server("openai:http://here:80/v1#org/model") == ("http://here:80/v1", "org/model")


# -- the command, on the cheapest recipe there is ------------------------------------------------------------------------------------
COMMAND = ["search", "hgm", "--tasks", "4", "--budget", "8", "--workers", "1", "--metric", "mild"]
COMMAND += ["--config.repeats", "1", "--config.budget", "25", "--config.tasks", "10"]


def test_search_finds_reports_and_continues(tmp_path, capsys):
    args = [*COMMAND, "--out", str(tmp_path / "s"), "--tune", "widening", "cooldown", "initial"]
    assert cli.main(args) == 0
    said = capsys.readouterr().out
    assert "hgm (hgm): mild of at least" in said
    assert "changing widening, cooldown, initial" in said
    page = (tmp_path / "s" / "report.html").read_text()
    assert '<div class="tree">' in page
    assert "stillroom run hgm" in page
    assert "mild on 4 fresh seeds" in page
    journal = (tmp_path / "s" / "journal.jsonl").read_text()
    assert journal.count('"passed"') == 8 + 4
    assert cli.main(args) == 0  # a finished search only reports again
    assert (tmp_path / "s" / "journal.jsonl").read_text() == journal
    assert cli.main([*args, "--policy", "greedy"]) == 1
    assert "belongs to another search" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--metric", "nothing"], "no claim says which way nothing is better"),
        (["--tune", "policy-of-doom"], "no such flag can be varied"),
        (["--proposer", "somebody"], "--proposer somebody"),
        (["--tasks", "0"], "out of range"),
        (["--config.widening", "-1"], "out of range"),
        (["--arm", "none"], "there is no arm 'none'"),
    ],
)
def test_bad_flags_are_refused_before_anything_runs(tmp_path, capsys, flags, says):
    assert cli.main([*COMMAND, "--out", str(tmp_path / "s"), *flags]) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "s").exists()


def test_a_start_that_cannot_run_is_said(tmp_path, capsys):
    assert (
        cli.main(["search", "kd", "--tasks", "1", "--workers", "1", "--out", str(tmp_path / "s"), "--config.data", str(tmp_path / "none")])
        == 1
    )
    assert "the start config failed at seed 0" in capsys.readouterr().err


def test_a_metric_that_is_not_finite_fails_either_way(tmp_path, monkeypatch):
    for better in ("higher", "lower"):
        seeds = Seeds("r", None, Example(), "loss", better, 0.5, tmp_path)
        for value in (float("nan"), float("inf"), -float("inf")):
            monkeypatch.setattr(Seeds, "run", lambda self, artefact, seed, value=value: {"metrics": {"loss": value}})
            assert seeds({}, 0)[0] is False


def test_random_search_draws_cover_the_range():
    flag = flags_of(Example(), ["share"])[0]
    draws = [flag.draw_anywhere(0.5, np.random.default_rng(i)) for i in range(500)]
    assert np.mean(draws) == pytest.approx(0.5, abs=0.05)
    assert np.std(draws) == pytest.approx(12**-0.5, abs=0.03)
