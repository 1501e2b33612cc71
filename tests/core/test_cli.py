"""The command as a user meets it: what is right works, what is wrong is said, with its exit code, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import pickle
import resource
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
from safetensors.torch import load_file

from stillroom import catalogue
from stillroom.cli import main
from stillroom.engine import make
from stillroom.run import Run
from tests.core.conftest import TINY

ROOT = Path(__file__).parents[2]


def python(*words: str, **variables: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **variables}
    return subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True, check=False, timeout=120)


def files(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


def refused(capsys, *args: str, code: int = 2) -> str:
    """The message of a command that must fail in this way."""
    capsys.readouterr()
    assert main(list(args)) == code
    streams = capsys.readouterr()
    assert "Traceback" not in streams.out + streams.err
    assert streams.err.strip()
    return " ".join(streams.err.replace("│", " ").split())


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


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_shell_completion(shell: str, capsys) -> None:
    assert main(["--tyro-print-completion", shell]) == 0
    out = capsys.readouterr().out
    assert "stillroom" in out
    assert "verify" in out


def test_every_recipe_is_listed_shown_and_explains_its_flags(capsys, work: Path) -> None:
    assert main(["list"]) == 0
    listed = capsys.readouterr().out
    for name in catalogue.cards():
        assert name in listed
        assert main(["show", name]) == 0
        shown = capsys.readouterr().out
        assert all(arm in shown for arm in catalogue.load(name).ARMS)
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


# -- data and weights that are wrong ----------------------------------------------------------------------------------------------
def images(root: Path, classes: int = 2, each: int = 6) -> Path:
    import numpy as np
    from PIL import Image

    random = np.random.default_rng(0)
    for split in ("train", "test"):
        for label in range(classes):
            (root / split / f"class{label}").mkdir(parents=True)
            for i in range(each):
                pixels = random.integers(0, 256, (8, 8), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / f"class{label}" / f"{i}.png")
    return root


def table(root: Path, labels: list[int]) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    root.mkdir(exist_ok=True)
    png = (images(root / "source") / "train" / "class0" / "0.png").read_bytes()
    feature = {"image": {"_type": "Image"}, "label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}
    for split, values in (("train", labels), ("test", [0, 1])):
        columns = pa.table({"image": [{"bytes": png, "path": None}] * len(values), "label": values})
        pq.write_table(
            columns.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": feature}})}), root / f"{split}.parquet"
        )
    return root


def no_data(place: Path) -> list[str]:
    return [str(place / "nowhere")]


def empty_data(place: Path) -> list[str]:
    (place / "nowhere").mkdir()
    return [str(place / "nowhere")]


def no_test_images(place: Path) -> list[str]:
    root = images(place / "nowhere")
    (root / "test").rename(root / "elsewhere")
    return [str(root)]


def corrupt_image(place: Path) -> list[str]:
    file = images(place / "d") / "train" / "class1" / "3.png"
    file.write_bytes(b"\x89PNG but no more")
    return [str(place / "d"), str(file), "--skip-bad"]


def truncated_parquet(place: Path) -> list[str]:
    file = table(place / "d", [0, 1, 0, 1]) / "train.parquet"
    file.write_bytes(file.read_bytes()[:-40])
    return [str(place / "d"), str(file), "truncated"]


def label_outside(place: Path) -> list[str]:
    return [str(table(place / "d", [0, 1, 7, 1])), "row 2 of", "train.parquet", "7"]


@pytest.mark.parametrize("wrong", [no_data, empty_data, no_test_images, corrupt_image, truncated_parquet, label_outside])
def test_wrong_data_is_named_and_the_command_can_be_corrected_in_place(wrong, work: Path, tmp_path: Path, capsys) -> None:
    place = tmp_path / "data"
    place.mkdir()
    data, *parts = wrong(place)
    message = refused(capsys, "run", "kd", "--data", data, "--labelled", "0", "--out", "r", *TINY, code=1)
    for part in [data, *parts]:
        assert part in message
    assert files(work) == [], "nothing half-written, so that the corrected command may use the same folder"
    if wrong is no_data:
        assert main(["run", "kd", "--out", "r", *TINY]) == 0


def test_skip_bad_continues_and_counts(work: Path, tmp_path: Path, capsys) -> None:
    data, *_ = corrupt_image(tmp_path)
    words = ["run", "kd", "--data", data, "--labelled", "0", "--batch-size", "4", "--no-baseline", "--out", "r", *TINY]
    with pytest.warns(UserWarning, match="1 of 24 images could not be read"):
        assert main([*words, "--skip-bad"]) == 0
    assert (work / "r" / "report.html").exists()


@pytest.fixture(scope="session")
def finished(tmp_path_factory, shared_store: Path) -> Path:
    """A finished tiny run of kd."""
    folder = tmp_path_factory.mktemp("runs") / "r"
    assert main(["run", "kd", "--out", str(folder), "--cache", str(shared_store), *TINY]) == 0
    return folder


def test_teacher_and_data_with_different_class_counts(work: Path, tmp_path: Path, finished: Path, capsys) -> None:
    words = ["run", "kd", "--data", str(images(tmp_path / "d", classes=3)), "--labelled", "0", "--teacher", f"run:{finished}", "--out", "r"]
    message = refused(capsys, *words, *TINY, code=1)
    assert "tells 10 classes apart" in message
    assert "has 3" in message
    assert files(work) == []


class Hostile:
    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def test_pickled_weights_are_refused_and_never_executed(work: Path, tmp_path: Path, finished: Path, capsys) -> None:
    folder = tmp_path / "teacher"
    folder.mkdir()
    (folder / "config.json").write_text((finished / "student" / "config.json").read_text())
    for name in ("pytorch_model.bin", "model.safetensors"):  # as itself, and under a false name
        (folder / name).write_bytes(pickle.dumps(Hostile(tmp_path / "executed")))
        message = refused(capsys, "run", "kd", "--teacher", f"run:{folder}", "--out", "r", *TINY, code=1)
        assert name in message
    assert "could not be read" in message
    assert not (tmp_path / "executed").exists()
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
    os.kill(stopped.process.pid, signal.SIGINT)
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


# -- recipes of other packages ----------------------------------------------------------------------------------------------------
RECIPE = '''"""Hello: greets a number (nobody 2026).

A recipe of another package.
"""

from dataclasses import dataclass

from stillroom.claims import Claim
from stillroom.config import Positive


@dataclass(frozen=True)
class Config:
    scale: Positive = 2.0
    """What the number is multiplied by."""


def full():
    return Config(3.0)


ARMS = {"plain": {"scale": 1.0}, "hello": {}}
CLAIMS = [Claim("greeting helps", metric="value", arm="hello", versus="plain")]


def main(cfg, run):
    return {"value": cfg.scale * (run.seed + 1)}
'''


def wheel(folder: Path, entries: str) -> Path:
    """A wheel needs no build tool: it is an archive with metadata."""
    file = folder / "stillroom_hello-1.0-py3-none-any.whl"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("stillroom_hello/__init__.py", "")
        archive.writestr("stillroom_hello/hello.py", RECIPE)
        info = "stillroom_hello-1.0.dist-info/"
        archive.writestr(info + "METADATA", "Metadata-Version: 2.1\nName: stillroom-hello\nVersion: 1.0\n")
        archive.writestr(info + "WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(info + "entry_points.txt", entries)
        archive.writestr(info + "RECORD", "")
    return file


@pytest.fixture
def installed(tmp_path: Path, monkeypatch):
    def install(entries: str) -> None:
        site = tmp_path / "site"
        done = python("-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", str(site), str(wheel(tmp_path, entries)))
        assert done.returncode == 0, done.stderr
        monkeypatch.syspath_prepend(str(site))
        catalogue.cards.cache_clear()

    yield install
    catalogue.cards.cache_clear()
    for name in [n for n in sys.modules if n.startswith("stillroom_hello")]:
        del sys.modules[name]


def test_a_package_adds_its_recipe_by_an_entry_point(installed, work: Path, capsys) -> None:
    installed("[stillroom.recipes]\nhello = stillroom_hello.hello\n")
    assert main(["list"]) == 0
    assert "Hello: greets a number (nobody 2026)." in capsys.readouterr().out
    assert "stillroom_hello" not in sys.modules or "stillroom_hello.hello" not in sys.modules
    assert main(["show", "hello"]) == 0
    assert "--scale 2.0 paper: 3.0" in " ".join(capsys.readouterr().out.split())
    assert main(["run", "hello", "--scale", "5", "--out", "r", "--quiet"]) == 0
    assert json.loads((work / "r" / "result.json").read_text())["metrics"] == {"value": 5.0}
    assert json.loads((work / "r" / "baseline" / "result.json").read_text())["metrics"] == {"value": 1.0}
    assert "--scale 0.0 is out of range" in refused(capsys, "run", "hello", "--scale", "0")
    assert main(["verify", "hello", "--seeds", "3", "--jobs", "1", "--ledger", "ledger"]) == 0
    entry = json.loads((work / "ledger" / "hello.json").read_text())
    assert entry["claims"][0]["difference"] == 2.0


def test_a_broken_package_does_not_take_the_command_down(installed, work: Path, capsys) -> None:
    installed("[stillroom.recipes]\nlost = stillroom_lost.recipe\nodd = stillroom_hello.nowhere\nhello = stillroom_hello.hello\n")
    assert main(["list"]) == 0
    out = capsys.readouterr().out
    assert "hello" in out
    assert "kd" in out
