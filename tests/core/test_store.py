"""Entries are addressed by what made them, built once, and whole or absent, whatever is killed."""

from __future__ import annotations

import signal
import time
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from stillroom.catalogue import cache
from stillroom.cli import main
from stillroom.core.engine import make
from stillroom.core.errors import UserError
from stillroom.core.run import Run
from stillroom.core.store import Store, fingerprint, folder_of_store, replacing, write_atomic
from tests.core import builders


def words(log: Path) -> list[str]:
    return log.read_text().splitlines() if log.exists() else []


def wait_for(log: Path, word: str, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not any(line.startswith(word) for line in words(log)):
        assert time.monotonic() < end, f"{word!r} never came; the log says {words(log)}"
        time.sleep(0.02)


@dataclass(frozen=True)
class Pair:
    a: int
    b: float


@dataclass(frozen=True)
class Other:
    a: int
    b: float


class Data:
    def __init__(self, key: str):
        self.key = key

    def fingerprint(self) -> str:
        return self.key


def different() -> list[object]:
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    return [
        *(
            None,
            0,
            0.0,
            -0.0,
            False,
            "",
            "0",
            b"0",
            1,
            True,
            1.0,
            "1",
            (),
            [],
            {},
            (1,),
            [1],
            (1, 2),
            ((1,), 2),
            (1, (2,)),
            ("12",),
            ("1", "2"),
        ),
        *({"a": 1}, {"a": 2}, {"b": 1}, Pair(1, 2.0), Pair(1, 3.0), Other(1, 2.0), Path("a"), "a", Data("x"), Data("y")),
        *(torch.zeros(2), torch.zeros(2, 1), torch.zeros(1, 2), torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.int64)),
        *(torch.ones(2), torch.zeros(0), torch.zeros(()), torch.float32, torch.float64, first, second, nn.Sequential(first), builders.slow),
        *(builders.drawn, torch.zeros(2, dtype=torch.bfloat16), torch.tensor([True, False]), torch.tensor([False, True])),
    ]


def test_values_that_differ_have_different_fingerprints() -> None:
    values = different()
    keys = [fingerprint(v) for v in values]
    clashes = [(values[i], values[j]) for i in range(len(keys)) for j in range(i) if keys[i] == keys[j]]
    assert not clashes


def test_equal_values_have_equal_fingerprints_whatever_their_layout() -> None:
    x = torch.randn(4, 6)
    net = nn.Linear(2, 2)
    twin = nn.Linear(2, 2)
    twin.load_state_dict(net.state_dict())
    assert fingerprint(x.T) == fingerprint(x.T.contiguous()) != fingerprint(x)
    assert fingerprint(x[:, ::2]) == fingerprint(x[:, ::2].clone())
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})
    assert fingerprint(net) == fingerprint(twin)
    with torch.no_grad():
        twin.bias[0] += 1e-7
    assert fingerprint(net) != fingerprint(twin)
    assert fingerprint(nn.Parameter(x)) != fingerprint(x + 1)


@pytest.mark.parametrize("value", [object(), {1, 2}, lambda: None, iter(())])
def test_what_cannot_be_told_apart_is_refused(value: object) -> None:
    if callable(value):
        fingerprint(value)  # a function has source
        return
    with pytest.raises(TypeError, match="cannot fingerprint"):
        fingerprint({"deep": [value]})


def module(file: Path, source: str) -> Any:
    file.write_text(source)
    loaded = types.ModuleType(file.stem)
    exec(compile(source, str(file), "exec"), loaded.__dict__)
    return loaded


def test_the_key_changes_with_inputs_data_and_the_builders_source(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    source = "import torch\nSCALE = {scale}\ndef helper(x): return x * SCALE\ndef build(x): return {{'y': helper(x)}}\n"
    x = torch.ones(3)
    build = module(tmp_path / "recipe.py", source.format(scale=2)).build
    assert store.cached("y", build, x)["y"].tolist() == [2.0] * 3
    assert store.cached("y", build, 2 * x)["y"].tolist() == [4.0] * 3
    assert store.cached("z", build, x)["y"].tolist() == [2.0] * 3
    build = module(tmp_path / "recipe.py", source.format(scale=5)).build  # only a global that its helper reads has changed
    assert store.cached("y", build, x)["y"].tolist() == [5.0] * 3
    assert len(cache.entries(store)) == 4
    assert {e["name"] for e in cache.entries(store)} == {"y", "z"}


def test_closures_are_refused_and_build_nothing(tmp_path: Path) -> None:
    hidden = torch.ones(2)
    with pytest.raises(TypeError, match=r"closes over \['hidden'\]: pass them as inputs"):
        Store(tmp_path / "store").cached("x", lambda: {"x": hidden})
    with pytest.raises(TypeError):
        Store(tmp_path / "store").cached("x", Data("x").fingerprint)  # type: ignore[arg-type]
    assert not (tmp_path / "store").exists()


def test_a_failed_build_leaves_nothing(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    with pytest.raises(ZeroDivisionError):
        store.cached("x", fails, 0)
    assert not cache.entries(store)
    assert store.cached("x", fails, 1)["x"].item() == 1.0


def fails(value: int) -> dict[str, torch.Tensor]:
    return {"x": torch.tensor(1 / value)}


def test_two_processes_that_want_the_same_entry_build_it_once(tmp_path: Path, child) -> None:
    log = tmp_path / "log"
    both = [child(builders.cached, Store(tmp_path / "store"), log, 1.0) for _ in range(2)]
    assert [p.code() for p in both] == [0, 0]
    assert sorted(words(log)) == ["built", "has 6", "has 6"]


def test_a_builder_killed_while_writing_leaves_nothing_and_the_next_one_builds(tmp_path: Path, child) -> None:
    log, store = tmp_path / "log", Store(tmp_path / "store")
    assert child(builders.dies_while_building, store, log, 0.0).code() == -signal.SIGKILL
    assert any(store.folder.glob(".*.tmp")), "this test would prove nothing"
    assert cache.entries(store) == []
    builders.cached(store, log, 0.0)
    assert words(log) == ["built", "built", "has 6"]
    assert not list(store.folder.glob(".*.tmp"))


def test_what_a_killed_builder_left_is_cleared(tmp_path: Path, child) -> None:
    store = Store(tmp_path / "store")
    assert child(builders.dies_while_building, store, tmp_path / "log", 0.0).code() == -signal.SIGKILL
    cache.clear(store)
    assert not list(store.folder.iterdir())


def test_a_stage_in_the_store_waits_and_takes_over_from_a_killed_process(tmp_path: Path, child) -> None:
    alone = tmp_path / "alone"
    alone.mkdir()
    builders.stage(Store(alone / "store"), alone / "log", 0.0)
    log, store = tmp_path / "log", tmp_path / "store"
    first = child(builders.stage, Store(store), log, 60.0)
    wait_for(log, "step 3")
    second = child(builders.stage, Store(store), log, 0.0)
    end = time.monotonic() + 60
    while words(log).count("wants") < 2:
        assert time.monotonic() < end
        time.sleep(0.02)
    time.sleep(0.3)
    assert sum(line.startswith("in ") for line in words(log)) == 1, "the second one must wait"
    first.process.kill()
    assert first.code() == -signal.SIGKILL
    assert second.code() == 0
    steps = [int(line.split()[1]) for line in words(log) if line.startswith("step")]
    again = next(i for i in range(1, len(steps)) if steps[i] <= steps[i - 1])  # where the second process began
    assert 0 < steps[again] <= steps[again - 1], "it takes over from the last checkpoint, not from the start"
    assert steps[again:] == list(range(steps[again], 10))
    assert words(log)[-1] == words(alone / "log")[-1]  # bitwise: printed with nine digits
    before = len(words(log))
    builders.stage(Store(store), log, 0.0)
    assert not any(line.startswith("step") for line in words(log)[before:]), "a finished stage only reloads"


def test_what_is_drawn_does_not_depend_on_who_built_the_entry(tmp_path: Path) -> None:
    """A cached builder that draws must neither shift the run's own draws nor depend on the draws before it."""

    def draws(folder: str, store: str, before: int) -> tuple[torch.Tensor, torch.Tensor]:
        with Run(tmp_path / folder, 3, engine=make("local", "cpu"), store=Store(tmp_path / store)) as run:
            torch.randn(before)
            state = torch.get_rng_state()
            noise = run.cached("noise", builders.drawn, 5)["noise"]
            assert torch.equal(state, torch.get_rng_state())
            return noise, torch.randn(3)

    built, after_building = draws("a", "one", 1)
    loaded, after_loading = draws("b", "one", 1)
    elsewhere, _ = draws("c", "two", 7)
    assert torch.equal(after_building, after_loading)
    assert torch.equal(built, loaded)
    assert torch.equal(built, elsewhere)


def test_clear_skips_entries_in_use(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    store.cached("done", fails, 1)
    with Run(tmp_path / "run", 0, engine=make("local", "cpu"), store=store) as run:
        with run.stage("teacher", shared=(1,)) as stage:
            for _ in stage.steps(1):
                pass
            assert cache.clear(store)[0] == 1
            assert [e["name"] for e in cache.entries(store)] == ["teacher"]
            with pytest.raises(UserError, match="no cache entry"):
                cache.clear(store, "done")
        assert cache.clear(store, "teacher")[0] == 1
    assert cache.entries(store) == []
    assert cache.clear(store) == (0, 0)


def test_the_cache_command_survives_foreign_and_damaged_files_and_leaves_them_alone(tmp_path: Path, capsys) -> None:
    folder = tmp_path / "store"
    store = Store(folder)
    store.cached("good", fails, 1)
    (entry,) = cache.entries(store)
    (folder / "thesis").mkdir()
    (folder / "thesis" / "chapter.tex").write_text("years of work")
    (folder / "photos-2024").mkdir()
    (folder / "notes.txt").write_text("mine")
    (folder / "broken-link").symlink_to(tmp_path / "nowhere")
    (folder / ("gone-" + "0" * 32)).mkdir()
    (folder / ("gone-" + "0" * 32) / "link").symlink_to(tmp_path / "nowhere")
    (folder / ("gone-" + "0" * 32) / "entry.json").write_bytes(b"\xff\x00")
    assert main(["cache", "--folder", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "2 entries" in out
    assert "thesis" not in out
    assert main(["cache", "--clear", "--folder", str(folder)]) == 0
    assert "deleted 2 entries" in capsys.readouterr().out
    assert not entry["folder"].exists()
    assert sorted(p.name for p in folder.iterdir()) == ["broken-link", "notes.txt", "photos-2024", "thesis"]
    assert (folder / "thesis" / "chapter.tex").read_text() == "years of work"


def counted(folder: Path, value: float) -> dict[str, torch.Tensor]:
    with open(folder / "built", "a") as file:
        file.write("x")
    return {"y": torch.full((8,), value)}


@pytest.mark.parametrize("damage", ["cut", "flipped", "no digest", "not json"])
def test_a_damaged_entry_is_made_anew_and_says_so(damage: str, tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    store.cached("x", counted, tmp_path, 2.0)
    file = next(store.folder.rglob("tensors.safetensors"))
    content = bytearray(file.read_bytes())
    match damage:
        case "cut":
            file.write_bytes(content[:20])
        case "flipped":
            content[-1] ^= 1  # another number, which no format notices
            file.write_bytes(content)
        case "no digest":
            (file.parent / "entry.json").write_text("{}")
        case _:
            (file.parent / "entry.json").write_text("{")
    with pytest.warns(UserWarning, match="damaged, and is made anew"):
        assert store.cached("x", counted, tmp_path, 2.0)["y"].tolist() == [2.0] * 8
    assert store.cached("x", counted, tmp_path, 2.0)["y"].tolist() == [2.0] * 8
    assert (tmp_path / "built").read_text() == "xx"


def test_the_cache_command_on_an_empty_store_and_an_unknown_name(tmp_path: Path, capsys) -> None:
    assert main(["cache", "--folder", str(tmp_path / "none")]) == 0
    assert "0 entries" in capsys.readouterr().out
    assert main(["cache", "--clear", "--name", "nope", "--folder", str(tmp_path / "none")]) == 1
    assert "no cache entry called 'nope'" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_the_stores_place(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("STILLROOM_CACHE", str(tmp_path / "env"))
    assert folder_of_store() == tmp_path / "env"
    assert folder_of_store(tmp_path / "flag") == tmp_path / "flag"
    monkeypatch.delenv("STILLROOM_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert folder_of_store().name == "stillroom"


def test_replacing_and_write_atomic_keep_the_old_content_on_failure(tmp_path: Path) -> None:
    place, file = tmp_path / "student", tmp_path / "config.json"
    with replacing(place) as fresh:
        (fresh / "a").write_text("old")
    write_atomic(file, "old")
    with pytest.raises(KeyboardInterrupt), replacing(place) as fresh:
        write_atomic(fresh / "a", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_atomic(file, interrupted)
    assert (place / "a").read_text() == file.read_text() == "old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "student"]
    with replacing(place) as fresh:
        (fresh / "b").write_text("new")
    assert [p.name for p in place.iterdir()] == ["b"]


def interrupted(out: Any) -> None:
    out.write(b"new")
    raise KeyboardInterrupt
