"""Verdicts against scipy, and verifications that resume, run side by side, and write down everything."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from scipy import stats

from stillroom.catalogue import cards, ledger
from stillroom.catalogue.claims import Claim, judge, outcome, verify
from stillroom.catalogue.ledger import as_markdown, read_ledger, write_ledger
from stillroom.cli import main
from stillroom.core.errors import UserError

SOURCE = Path(__file__).with_name("hello_recipe.py")


# -- verdicts ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "values",
    [[0.1, 0.3, 0.2, 0.25, 0.15], [1.0, -1.0], [-0.2, -0.3, -0.25], [5.0, 5.1, 4.9, 5.0, 5.2, 4.8, 5.05], [1e-9, 2e-9, 4e-9], [0, 3]],
)
@pytest.mark.parametrize("margin", [-0.5, 0.0, 0.1, 4.7])
def test_the_interval_is_scipys_and_the_verdict_follows_from_it(values: list[float], margin: float) -> None:
    mean, low, high, verdict = judge(values, margin)
    interval = stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
    assert (low, high) == pytest.approx(tuple(interval), rel=1e-9)
    assert mean == pytest.approx(sum(values) / len(values))
    assert verdict == ("holds" if interval.low > margin else "fails" if interval.high <= margin else "undecided")


def test_verdicts_at_their_edges() -> None:
    assert judge([0.5, 0.5, 0.5]) == (0.5, 0.5, 0.5, "holds")
    assert judge([0.5, 0.5, 0.5], margin=0.5)[3] == "fails"  # "by more than the margin"
    assert judge([0.0, 0.0])[3] == "fails"
    assert judge([-0.1, -0.1], margin=-0.2)[3] == "holds"
    assert judge([9.0]) == (9.0, -math.inf, math.inf, "undecided")
    assert judge([-9.0])[3] == "undecided"


@pytest.mark.parametrize("values", [[math.nan], [1.0, math.nan], [math.inf, 1.0], [math.inf, -math.inf], [-math.inf, 2.0]])
def test_a_metric_that_is_not_finite_fails_its_claim(values: list[float]) -> None:
    _, low, high, verdict = judge(values)
    assert (low, high, verdict) == (-math.inf, math.inf, "fails")


RESULTS = {"a": [{"x": 3.0}, {"x": 5.0}, {"x": 4.0}], "b": [{"x": 1.0}, {"x": 2.5}, {"x": 2.0}]}


def test_differences_are_paired_by_seed_and_signed_by_the_claimed_direction() -> None:
    higher = outcome(Claim("t", metric="x", arm="a", versus="b"), RESULTS)
    expected = stats.ttest_rel([3, 5, 4], [1, 2.5, 2]).confidence_interval(0.95)
    assert (higher["low"], higher["high"]) == pytest.approx(tuple(expected))
    assert higher["difference"] == pytest.approx(6.5 / 3)
    lower = outcome(Claim("t", metric="x", arm="a", versus="b", better="lower"), RESULTS)
    assert (lower["low"], lower["high"]) == pytest.approx((-higher["high"], -higher["low"]))
    assert (higher["verdict"], lower["verdict"]) == ("holds", "fails")
    assert higher["text"] == "t"
    assert json.loads(json.dumps(higher)) == higher


def test_a_number_as_the_other_side() -> None:
    found = outcome(Claim("t", metric="x", arm="a", versus=3.9, margin=0.05), RESULTS)
    expected = stats.ttest_1samp([3, 5, 4], 3.9).confidence_interval(0.95)
    assert (found["low"], found["high"]) == pytest.approx((expected.low - 3.9, expected.high - 3.9))
    assert found["verdict"] == "undecided"


def test_the_record_of_a_nan_metric_is_json() -> None:
    found = outcome(Claim("t", metric="x", arm="a", versus="b"), {"a": [{"x": math.nan}, {"x": 1.0}], "b": [{"x": 1.0}] * 2})
    assert (found["difference"], found["low"], found["high"], found["verdict"]) == (None, None, None, "fails")


# -- verifications ----------------------------------------------------------------------------------------------------------------
@pytest.fixture
def hello(work: Path, monkeypatch):
    """The working folder, with the recipe `hello` installed as another package's, from a file that a test may change."""
    info = work / "site" / "hello-1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: hello\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[stillroom.recipes]\nhello = hello_recipe\n")
    shutil.copy(SOURCE, info.parent)
    monkeypatch.syspath_prepend(str(info.parent))
    monkeypatch.setenv("HELLO_LOG", str(work / "log"))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    cards.cards.cache_clear()
    yield work
    cards.cards.cache_clear()
    sys.modules.pop("hello_recipe", None)


def executed(work: Path) -> list[str]:
    return [line.split()[0] for line in (work / "log").read_text().splitlines()]


def test_every_arm_runs_once_a_seed_and_all_of_it_is_written_down(hello: Path) -> None:
    lines: list[str] = []
    entry = verify("hello", seeds=3, progress=lines.append)
    assert executed(hello) == ["0/0", "1/0", "2/0", "0/1", "1/1", "2/1", "0/2", "1/2", "2/2"]  # whole pairs first
    assert len(lines) == 9
    assert entry["arms"]["better"]["metrics"].keys() == {"0", "1", "2"}
    assert entry["arms"]["better"]["config"] == {"offset": 1.0}
    by_text = {c["text"]: c for c in entry["claims"]}
    assert by_text["better is more"]["difference"] == pytest.approx(1.0)
    assert by_text["better is more"]["verdict"] == "holds"
    assert by_text["better loses less"]["difference"] == pytest.approx(0.1)
    assert by_text["better loses less"]["verdict"] == "undecided"
    assert by_text["plain is no worse by two"]["verdict"] == "holds"
    assert by_text["wild is finite"]["verdict"] == "fails"
    assert by_text["plain beats one half"]["versus"] == 0.5
    assert {"seeds", "versions", "processor", "commit", "source", "changes"} <= entry.keys()
    assert all(isinstance(arm["seconds"], float) for arm in entry["arms"].values())


def test_the_ledger_file_is_strict_json_and_becomes_a_page(hello: Path) -> None:
    file = write_ledger(verify("hello", seeds=2), hello / "ledger")

    def strict(word: str) -> float:
        raise AssertionError(f"{word} is not JSON")

    entry = json.loads(file.read_text(), parse_constant=strict)
    assert entry["arms"]["wild"]["metrics"]["1"]["odd"] is None
    assert read_ledger(hello / "ledger")["hello"] == entry
    page = as_markdown({"hello": entry})
    assert page.startswith("# The ledger\n")
    assert "## hello" in page
    rows = [line for line in page.splitlines() if line.startswith("|")]
    claim = next(row for row in rows if "better is more" in row)
    assert "1 [1, 1]" in claim
    assert "**holds**" in claim
    assert "2 % \\| more" in claim, "a bar inside a cell would end it"
    odd = next(row for row in rows if row.startswith("| wild "))
    assert "nan" in odd or "not finite" in odd
    widths: dict[str, set[int]] = {}
    for block in page.split("\n\n"):
        for row in block.splitlines():
            if row.startswith("|"):
                widths.setdefault(block, set()).add(row.replace("\\|", "").count("|"))
    assert all(len(counts) == 1 for counts in widths.values())
    assert as_markdown({}).startswith("# The ledger")


def test_strict_json_in_the_run_folder_too(hello: Path) -> None:
    verify("hello", seeds=2)
    for file in hello.glob("runs/verify/hello/*/seed*/result.json"):
        json.loads(file.read_text(), parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))


def test_a_finished_arm_seed_is_not_run_again_and_more_seeds_add_to_it(hello: Path) -> None:
    first = verify("hello", seeds=2)
    count = len(executed(hello))
    again = verify("hello", seeds=2)
    assert len(executed(hello)) == count
    assert again == first
    more = verify("hello", seeds=3)
    assert executed(hello)[count:] == ["0/2", "1/2", "2/2"]
    assert more["arms"]["plain"]["metrics"]["0"] == first["arms"]["plain"]["metrics"]["0"]


def test_an_interrupted_verification_goes_on_where_it_stopped(hello: Path, capsys) -> None:
    straight = verify("hello", seeds=3, folder=hello / "straight", changes={"fail_at": 1})
    (hello / "log").unlink()
    (hello / "FAIL").touch()
    with pytest.raises(KeyboardInterrupt):
        verify("hello", seeds=3, changes={"fail_at": 1})
    (hello / "FAIL").unlink()
    assert executed(hello) == ["0/0", "1/0", "2/0", "0/1"]
    resumed = verify("hello", seeds=3, changes={"fail_at": 1})
    assert executed(hello)[4:] == ["0/1", "1/1", "2/1", "0/2", "1/2", "2/2"]
    assert resumed["claims"] == straight["claims"]
    (hello / "FAIL").touch()
    assert main(["verify", "hello", "--seeds", "1", "--jobs", "1", "--ledger", "ledger"]) == 0
    assert not capsys.readouterr().err.count("Traceback")


def test_changed_source_config_or_overrides_are_another_place(hello: Path) -> None:
    verify("hello", seeds=1)
    count = len(executed(hello))
    verify("hello", seeds=1, changes={"offset": 0.5})  # the arms that set offset themselves are what they were
    assert executed(hello)[count:] == ["0.5/0"]
    file = hello / "site" / "hello_recipe.py"
    file.write_text(file.read_text().replace("noise = (run.seed", "noise = 1 + (run.seed"))
    del sys.modules["hello_recipe"]
    count = len(executed(hello))
    entry = verify("hello", seeds=1)
    assert executed(hello)[count:] == ["0/0", "1/0", "2/0"]
    assert entry["arms"]["plain"]["metrics"]["0"]["value"] == 1.0


def comparable(entry: dict) -> dict:
    entry = json.loads(json.dumps(entry))
    for arm in entry["arms"].values():
        del arm["seconds"]
    del entry["processor"]  # it tells the threads
    return entry


def test_two_jobs_give_what_one_gives(hello: Path) -> None:
    one = verify("hello", seeds=2, folder=hello / "one")
    count = len(executed(hello))
    two = verify("hello", seeds=2, jobs=2)
    assert sorted(executed(hello)[count:]) == sorted(executed(hello)[:count])
    assert len({line.split()[1] for line in (hello / "log").read_text().splitlines()}) >= 2  # processes
    assert comparable(two) == comparable(one)


def test_ray(hello: Path, monkeypatch) -> None:
    ray = pytest.importorskip("ray")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(hello / "site"), os.environ.get("PYTHONPATH", "")]))  # its workers' path
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    one = verify("hello", seeds=2, folder=hello / "one")
    assert comparable(verify("hello", seeds=2, jobs=2, backend="ray")) == comparable(one)
    ray.shutdown()


@pytest.mark.parametrize("backend", ["ray", "dask"])
def test_a_missing_cluster_package_is_said(backend: str, hello: Path) -> None:
    if importlib.util.find_spec("ray" if backend == "ray" else "distributed"):
        pytest.skip("it is installed")
    with pytest.raises(UserError, match=f"--backend {backend} needs"):
        verify("hello", seeds=1, backend=backend)


def test_the_commands_write_the_ledger_and_its_page(hello: Path, capsys) -> None:
    assert main(["verify", "hello", "--seeds", "2", "--jobs", "1", "--ledger", "ledger"]) == 0
    out = capsys.readouterr().out
    assert "better is more" in out
    assert "1 [1, 1]" in out
    assert main(["ledger", "--folder", "ledger", "--out", "docs/ledger.md"]) == 0
    assert "## hello" in (hello / "docs" / "ledger.md").read_text()


def test_fresh_seeds_are_other_draws_and_stand_beside_the_ledger(hello: Path, capsys) -> None:
    words = ["verify", "hello", "--seeds", "2", "--jobs", "1", "--ledger", "ledger"]
    assert main(words) == 0
    before = (hello / "ledger" / "hello.json").read_text()
    assert main([*words, "--first-seed", "2"]) == 0
    fresh = read_ledger(hello / "ledger", fresh=True)["hello"]
    assert fresh["first_seed"] == 2
    assert {seed for arm in fresh["arms"].values() for seed in arm["metrics"]} == {"2", "3"}
    assert (hello / "ledger" / "hello.json").read_text() == before
    assert main(["ledger", "--folder", "ledger", "--out", "page.md"]) == 0
    page = (hello / "page.md").read_text()
    assert "2 fresh seeds from 2" in page
    assert "| **holds** | holds, 1 [1, 1] |" in next(line for line in page.splitlines() if "better is more" in line)
    assert "none of them fresh" in as_markdown(read_ledger(hello / "ledger"))


def test_the_verdict_that_list_show_and_the_page_give_is_that_of_fresh_seeds(hello: Path, capsys, monkeypatch) -> None:
    entry = verify("hello", seeds=2)
    fresh = json.loads(json.dumps(entry)) | {"first_seed": 2}
    for first, again in zip(entry["claims"], fresh["claims"]):
        first["verdict"], again["verdict"] = "holds", "fails"
    monkeypatch.setattr(ledger, "ledger_folder", lambda: hello / "ledger")
    write_ledger(entry, hello / "ledger")
    for others, listed, shown in (([], "5 holds", "  holds"), ([fresh], "5 fails", "  fails (first seeds: holds)")):
        for each in others:
            write_ledger(each, hello / "ledger")
        assert main(["list"]) == 0
        line = next(line for line in capsys.readouterr().out.splitlines() if line.strip().startswith("hello "))
        assert line.rstrip().endswith(listed)
        assert main(["show", "hello"]) == 0
        claim = next(line for line in capsys.readouterr().out.splitlines() if "better is more" in line)
        assert claim.rstrip().endswith(shown)
    page = as_markdown(read_ledger(hello / "ledger"), read_ledger(hello / "ledger", fresh=True))
    row = next(line for line in page.splitlines() if "better is more" in line)
    assert row.split("|")[7].strip() == "**fails**"
    assert row.split("|")[8].strip().startswith("holds, ")
    del fresh["claims"][0]  # a claim that fresh seeds never saw is not verified, whatever the others say
    write_ledger(fresh, hello / "ledger")
    assert main(["show", "hello"]) == 0
    claim = next(line for line in capsys.readouterr().out.splitlines() if "better is more" in line)
    assert claim.rstrip().endswith("not verified (first seeds: holds)")


def test_entries_that_other_code_made_are_listed(hello: Path, capsys) -> None:
    stale = lambda: main(["ledger", "--folder", "ledger", "--stale"]) or capsys.readouterr().out.splitlines()
    entry = verify("hello", seeds=2)
    write_ledger(entry, hello / "ledger")
    write_ledger(entry | {"first_seed": 2}, hello / "ledger")
    assert not {"hello", "fresh-seeds/hello"} & set(stale())
    file = hello / "site" / "hello_recipe.py"
    file.write_text(file.read_text() + "\n# a comment decides nothing\n")
    assert "hello" not in stale()
    file.write_text(file.read_text().replace("noise = (run.seed", "noise = 1 + (run.seed"))
    assert {"hello", "fresh-seeds/hello"} <= set(stale())
    write_ledger(entry | {"recipe": "gone"}, hello / "ledger")
    assert "gone" in stale()
    assert not (hello / "docs").exists()


def test_a_killed_verification_takes_its_workers_along_and_the_same_command_continues(hello: Path) -> None:
    (hello / "SLOW").touch()
    words = [sys.executable, "-m", "stillroom", "verify", "hello", "--seeds", "2", "--jobs", "2", "--ledger", "ledger"]
    variables = os.environ | {"PYTHONPATH": os.pathsep.join([str(hello / "site"), str(Path(__file__).parents[2])])}
    killed = subprocess.Popen(words, env=variables, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    end = time.monotonic() + 60
    while not (hello / "log").exists() or len(executed(hello)) < 2:
        assert time.monotonic() < end
        time.sleep(0.05)
    workers = [int(line.split()[1]) for line in (hello / "log").read_text().splitlines()]
    assert killed.pid not in workers
    killed.kill()
    killed.wait()
    (hello / "SLOW").unlink()
    done = subprocess.run(words, env=variables, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, "in use" in done.stderr) == (0, False), done.stderr
    assert (hello / "ledger" / "hello.json").exists()
    assert not [pid for pid in workers if os.path.exists(f"/proc/{pid}") and "Z" not in Path(f"/proc/{pid}/stat").read_text().split()[2]]
