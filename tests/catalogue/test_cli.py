"""The command as a user meets it: what is right works, what is wrong is said, with its exit code, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from stillroom.catalogue import cards
from stillroom.cli import main
from stillroom.core.engine import make
from stillroom.core.run import Run
from tests.command import TINY, files, python, refused

ROOT = Path(__file__).parents[2]


# -- looking around ---------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("words", [["list"], ["list", "classification"], ["--help"], ["verify", "--help"], ["run", "--help"]])
def test_looking_around_imports_no_torch(words: list[str]) -> None:
    script = f"import sys; from stillroom.cli import main; code = main({words!r}); heavy = {{'torch', 'numpy', 'scipy', 'matplotlib'}}"
    done = python("-c", script + " & set(sys.modules); print(heavy, file=sys.stderr); sys.exit(code or 9 * bool(heavy))")
    assert done.returncode == 0, done.stderr
    assert "kd" in done.stdout or "usage" in done.stdout


def test_python_m_stillroom_and_exit_codes_of_a_real_process() -> None:
    assert python("-m", "stillroom", "list").returncode == 0
    done = python("-m", "stillroom", "run", "kdd")
    assert done.returncode == 2
    assert done.stderr.startswith("stillroom: there is no recipe called 'kdd'. Did you mean kd")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("words", [["list"], ["show", "kd"], ["run", "kd", "--help"]])
def test_a_reader_that_stops_reading_gets_no_message(words: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as closed:
        command = [sys.executable, "-m", "stillroom", *words]
        done = subprocess.run(command, stdout=closed, stderr=subprocess.PIPE, text=True, cwd=ROOT, check=False)
    assert (done.returncode, done.stderr) == (1, "")


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_shell_completion(shell: str, capsys) -> None:
    assert main(["--tyro-print-completion", shell]) == 0
    out = capsys.readouterr().out
    assert "stillroom" in out
    assert "verify" in out


def test_every_recipe_is_listed_shown_and_explains_its_flags(capsys, work: Path) -> None:
    assert main(["list"]) == 0
    listed = capsys.readouterr().out
    for name in cards.cards():
        assert name in listed
        assert main(["show", name]) == 0
        shown = capsys.readouterr().out
        assert all(arm in shown for arm in cards.load(name).ARMS)
        assert main(["run", name, "--help"]) == 0
        usage = capsys.readouterr().out
        assert "--out" in usage
        assert "--seed" in usage
    assert files(work) == []


# -- what was typed wrong ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["run", "kdd"], ["no recipe called 'kdd'", "Did you mean kd"]),
        (["run", "PS-KD"], ["no recipe called 'PS-KD'", "ps-kd"]),
        (["run", "xyzzy"], ["no recipe called 'xyzzy'", "stillroom list"]),
        (["show", "pskd"], ["Did you mean", "ps-kd"]),
        (["verify", "pskd"], ["Did you mean", "ps-kd"]),
        (["verify"], ["name of a recipe, or --all"]),
        (["verify", "kd", "--all"], ["name of a recipe, or --all"]),
        (["verify", "kd", "--seeds", "0"], ["--seeds 0 is out of range", "at least 1"]),
        (["verify", "kd", "--jobs", "0"], ["--jobs 0 is out of range", "at least 1"]),
        (["verify", "kd", "--first-seed", "-1"], ["--first-seed -1 is out of range", "at least 0"]),
        (["run", "kd", "--seed", "-1"], ["--seed -1 is out of range", "at least 0"]),
        (["run", "kd", "--seed", "9223372036854775808"], ["--seed 9223372036854775808 is out of range", "less than"]),
        (["search", "kd", "--seed", "-1"], ["--seed -1 is out of range", "at least 0"]),
        (["list", "poetry"], ["no family is called 'poetry'", "classification"]),
        (["distil", "kd"], ["distil"]),
        (["run"], ["a recipe of"]),
        (["compare"], ["folders of the runs"]),
        (["run", "kd", "--temprature", "3"], ["--temprature", "--temperature"]),
        (["run", "kd", "--steps", "many"], ["--steps", "many"]),
        (["run", "kd", "--optimizer.schedule", "cosin"], ["cosin", "cosine"]),
        (["run", "kd", "--temperature", "0"], ["--temperature 0.0 is out of range", "greater than 0"]),
        (["run", "kd", "--temperature", "nan"], ["--temperature nan is out of range"]),
        (["run", "kd", "--kd-weight", "-1"], ["--kd-weight -1.0 is out of range", "at least 0"]),
        (["run", "kd", "--ce-weight", "-1e-3"], ["--ce-weight -0.001 is out of range", "at least 0"]),
        (["run", "kd", "--steps", "-1"], ["--steps -1 is out of range", "at least 1"]),
        (["run", "kd", "--optimizer.lr", "0"], ["--optimizer.lr 0.0 is out of range", "greater than 0"]),
        (["run", "kd", "--optimizer.momentum", "2"], ["--optimizer.momentum 2.0 is out of range", "less than 1"]),
        (["run", "kd", "--save-seconds", "-1"], ["--save-seconds -1.0 is out of range"]),
        (["run", "kd", "--accumulate", "0"], ["--accumulate 0 is out of range"]),
        (["run", "ps-kd", "--epochs", "-1"], ["--epochs -1 is out of range"]),
        (["run", "ps-kd", "--past-weight", "2"], ["--past-weight 2.0 is out of range", "at most 1"]),
        (["run", "kd", "--arm", "magic"], ["no arm 'magic'", "kd without transfer set"]),
        (["run", "kd", "--device", "abacus"], ["'abacus' is not usable here"]),
        (["run", "kd", "--engine", "fsdp2"], ["torchrun"]),
        (["verify", "kd", "--backend", "slurm"], ["slurm", "loky"]),
    ],
)  # fmt: skip
def test_what_was_typed_wrong_is_said_and_nothing_is_written(words: list[str], parts: list[str], work: Path, capsys) -> None:
    message = refused(capsys, *words)
    for part in parts:
        assert part in message
    assert files(work) == []


def test_a_flag_that_contradicts_the_arm_is_refused_not_ignored(work: Path, capsys) -> None:
    message = refused(capsys, "run", "kd", "--arm", "plain", "--kd-weight", "0.5", "--out", "r", *TINY)
    assert "--kd-weight 0.5 contradicts the arm 'plain', which sets 0.0" in message
    assert files(work) == []


# -- folders and disks ------------------------------------------------------------------------------------------------------------
def test_unwritable_places(work: Path, capsys) -> None:
    (work / "file").write_text("mine")
    assert "cannot write to the run folder file/r" in refused(capsys, "run", "kd", "--out", "file/r", *TINY, code=1)
    assert "file" in refused(capsys, "run", "kd", "--cache", "file/store", "--out", "r", *TINY, code=1)
    assert "cannot write to the run folder /proc/r" in refused(capsys, "run", "kd", "--out", "/proc/r", *TINY, code=1)
    assert files(work) == ["file"]


def with_disk(limit: int, words: list[str]) -> int:
    """`main(words)` where no file can grow beyond `limit` bytes: a real write fails, as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    return main(words)


@pytest.mark.parametrize(("limit", "what"), [(100, "config.json"), (9_000, "train.pt"), (40_000, "report.html")])
def test_a_full_disk_is_said_and_what_was_saved_serves_the_next_try(limit: int, what: str, work: Path, child, finished: Path) -> None:
    words = ["run", "kd", "--out", "r", *TINY]
    failed = child(with_disk, limit, words)
    assert failed.code() == 1, failed.err
    assert failed.err.startswith("stillroom: ")
    assert "Traceback" not in failed.err
    assert "large" in failed.err or "space" in failed.err.lower()  # the operating system's own words
    assert not (work / "r" / what).exists()
    assert not [f for f in files(work) if f.endswith(".tmp")]
    assert main(words) == 0
    same(work / "r", finished)


def test_a_full_disk_under_the_store(work: Path, child) -> None:
    words = ["run", "kd", "--out", "r", "--cache", "store", "--no-baseline", *TINY]
    failed = child(with_disk, 60_000, words)
    assert failed.code() == 1, failed.err
    assert "Traceback" not in failed.err
    assert "store" in failed.err
    assert not [f for f in files(work) if f.endswith(".tmp")]


def same(one: Path, two: Path) -> None:
    a, b = (load_file(folder / "student" / "model.safetensors") for folder in (one, two))
    assert a.keys() == b.keys()
    assert all(bool((a[k] == b[k]).all()) for k in a)


def test_a_run_folder_in_use_by_another_process_is_refused(work: Path, child, capsys) -> None:
    def hold() -> int:
        with Run(work / "r", 0, engine=make("local", "cpu")):
            (work / "held").touch()
            time.sleep(60)
        return 0

    child(hold)
    appears(work / "held")
    for extra in ([], ["--overwrite"]):
        assert "r is in use by another live process" in refused(capsys, "run", "kd", "--out", "r", *TINY, *extra, code=1)
    assert files(work) == ["held", "r", "r/.lock"]


def appears(file: Path, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not file.exists():
        assert time.monotonic() < end, f"{file} never came"
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_saves_says_how_to_continue_and_continues_bitwise(number: int, work: Path, child, capsys) -> None:
    words = ["run", "kd", "--steps", "150", "--teacher-steps", "4", "--quiet", "--no-baseline", "--out"]
    stopped = child(main, [*words, "r", "--save-seconds", "0"])
    appears(work / "r" / "train.pt")
    os.kill(stopped.process.pid, number)
    assert stopped.code() == 1
    assert stopped.err.startswith("stillroom: stopped after step ")
    assert "state saved in r" in stopped.err
    assert "same command" in stopped.err
    assert "Traceback" not in stopped.err
    assert not (work / "r" / "result.json").exists()
    assert main([*words, "r"]) == 0
    assert main([*words, "s"]) == 0
    same(work / "r", work / "s")


def test_ctrl_c_during_verify_stops_without_a_traceback_and_continues(work: Path, child) -> None:
    words = ["verify", "kd", "--seeds", "1", "--jobs", "1", "--ledger", "ledger"]
    stopped = child(main, words)
    end = time.monotonic() + 60
    while not list(work.glob("runs/verify/kd/*/seed0/config.json")):
        assert time.monotonic() < end
        time.sleep(0.01)
    time.sleep(0.3)
    for _ in range(4):  # on a busy machine the first may fall into an import that swallows it
        if stopped.process.is_alive():
            os.kill(stopped.process.pid, signal.SIGINT)
            stopped.process.join(20)
    assert stopped.code() == 1, stopped.err
    assert "stillroom: stopped" in stopped.err
    assert "Traceback" not in stopped.err
    assert not (work / "ledger").exists()


def test_another_config_in_an_existing_folder_is_refused_and_overwrite_starts_again(work: Path, capsys) -> None:
    words = ["run", "kd", "--no-baseline", "--out", "r", *TINY]
    assert main(words) == 0
    before = (work / "r" / "result.json").read_text()
    message = refused(capsys, *words, "--temperature", "2")
    assert "r holds a run with another config (temperature: 4.0 there, 2.0 now)" in message
    assert "seed: 0 there, 1 now" in refused(capsys, *words, "--seed", "1")
    assert "precision: fp32 there, bf16 now" in refused(capsys, *words, "--precision", "bf16")
    assert "holds a run of kd, not ps-kd" in refused(capsys, "run", "ps-kd", "--out", "r")
    message = refused(capsys, *words, "--arm", "plain", "--kd-weight", "0", "--ce-weight", "1")
    assert "arm: kd there, plain now" in message
    assert (work / "r" / "result.json").read_text() == before
    assert main(words) == 0
    assert (work / "r" / "result.json").read_text() == before, "a finished run only reloads"
    assert main([*words, "--temperature", "2", "--overwrite"]) == 0
    assert json.loads((work / "r" / "result.json").read_text())["config"]["temperature"] == 2.0


@pytest.mark.parametrize("content", ['{"model_type": "vit"}', "[1, 2]", "not json", '{"recipe": "kd"}'])
def test_overwrite_and_out_leave_foreign_folders_alone(content: str, work: Path, capsys) -> None:
    (work / "model").mkdir()
    (work / "model" / "config.json").write_text(content)
    (work / "model" / "weights").write_text("precious")
    for extra in ([], ["--overwrite"]):
        assert "does not look like a run folder" in refused(capsys, "run", "kd", "--out", "model", *TINY, *extra)
    (work / "notes").mkdir()
    (work / "notes" / "thesis.tex").write_text("precious")
    assert "does not look like a run folder" in refused(capsys, "run", "kd", "--out", "notes", *TINY, "--overwrite")
    assert files(work) == ["model", "model/config.json", "model/weights", "notes", "notes/thesis.tex"]


def test_overwrite_of_an_empty_or_missing_folder_just_runs(work: Path) -> None:
    (work / "empty").mkdir()
    for folder in ("empty", "missing"):
        assert main(["run", "kd", "--no-baseline", "--out", folder, *TINY, "--overwrite"]) == 0


def test_compare_needs_finished_runs(work: Path, capsys, finished: Path) -> None:
    (work / "r").mkdir()
    assert "r holds no finished run" in refused(capsys, "compare", "r", code=1)
    assert "nowhere holds no finished run" in refused(capsys, "compare", str(finished), "nowhere", code=1)
    assert files(work) == ["r"]
    for out in ("/", ".", str(finished)):
        assert f"--out {out} is a folder: name a file" in refused(capsys, "compare", str(finished), "--out", out)
        assert f"--out {out} is a folder: name a file" in refused(capsys, "ledger", "--folder", "nothing", "--out", out)


@pytest.mark.parametrize(
    ("file", "content", "parts"),
    [
        ("result.json", "", ["result.json is damaged", "Delete it"]),
        ("result.json", "[1]", ["result.json is damaged"]),
        ("result.json", '{"recipe": "kd", "config": {}}', ["result.json is damaged"]),
        ("result.json", "\0" * 100, ["result.json is damaged"]),
        ("baseline/result.json", "{", ["baseline/result.json is damaged"]),
        ("metrics.jsonl", "{\n{}\n", ["metrics.jsonl, line 1 is damaged"]),
        ("metrics.jsonl", '{"loop": "train", "step": 0, "x": "y"}\n[]\n', ["metrics.jsonl, line 1 is damaged"]),
        ("metrics.jsonl", '{"loop": "train", "step": 0, "x": 1}\n3\n{}\n', ["metrics.jsonl, line 2 is damaged"]),
    ],
)
def test_damaged_files_of_a_finished_run_are_named(file: str, content: str, parts: list[str], work: Path, capsys, finished: Path) -> None:
    shutil.copytree(finished, work / "r")
    (work / "r" / file).write_text(content)
    for words in (["run", "kd", "--out", "r", *TINY], ["compare", "r"]):
        message = refused(capsys, *words, code=1)
        assert all(part in message for part in parts)
    assert not (work / "compare.html").exists()


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["hgm", "--tasks", "1000000000000"], "hgm does not fit into this machine's memory"),
        (["hgm", "--repeats", "9" * 30], "hgm does not fit into this machine's memory"),
        (["slimflow", "--pairs", "1000000000000000"], "slimflow does not fit into this machine's memory"),
        (["kd", "--threads", "99999999999"], "--threads 99999999999 is out of range"),
    ],
)
def test_counts_that_cannot_fit_are_said_and_leave_nothing(words: list[str], part: str, work: Path, capsys) -> None:
    assert main(["run", words[0], "--tiny", "--quiet", *words[1:], "--out", "r"]) in (1, 2)
    message = capsys.readouterr().err
    assert part in message
    assert "Traceback" not in message
    assert files(work) == []


def test_a_flag_that_the_baseline_does_not_read_is_let_through_there_and_refused_alone(work: Path, capsys) -> None:
    words = ["run", "sla", "--tiny", "--quiet", "--student", "small:convnet-w4"]
    assert main([*words, "--temperature", "3", "--arm", "sla+sd", "--out", "a"]) == 0
    assert "--temperature 3" not in capsys.readouterr().err
    assert main(["run", "jei-dnn", "--tiny", "--quiet", "--teacher", "small:residual-mlp-w8-d3", "--phase", "3", "--out", "b"]) == 0
    assert (work / "b" / "baseline" / "result.json").exists()
    assert "--phase" in refused(capsys, "run", "jei-dnn", "--tiny", "--quiet", "--arm", "p_max", "--phase", "3", "--out", "c")
