"""Other packages add recipes by an entry point."""

from __future__ import annotations

import json
import sys
import zipfile
from pathlib import Path

import pytest

from stillroom.catalogue import cards
from stillroom.cli import main
from tests.command import python, refused

RECIPE = '''"""Hello: greets a [number] (nobody 2026).

A recipe of another package; E[x] and [bold] and [/b] are no markup.
"""

from dataclasses import dataclass

from stillroom.catalogue.claims import Claim
from stillroom.core.config import Positive


@dataclass(frozen=True)
class Config:
    scale: Positive = 2.0
    """What the number is multiplied by."""


def full():
    return Config(3.0)


ARMS = {"plain": {"scale": 1.0}, "hello": {}}
CLAIMS = [Claim("greeting [helps]", metric="value", arm="hello", versus="plain")]


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
        cards.cards.cache_clear()

    yield install
    cards.cards.cache_clear()
    for name in [n for n in sys.modules if n.startswith("stillroom_hello")]:
        del sys.modules[name]


def test_a_package_adds_its_recipe_by_an_entry_point(installed, work: Path, capsys) -> None:
    installed("[stillroom.recipes]\nhello = stillroom_hello.hello\n")
    assert main(["list"]) == 0
    assert "Hello: greets a [number]" in capsys.readouterr().out
    assert "stillroom_hello" not in sys.modules or "stillroom_hello.hello" not in sys.modules
    assert main(["show", "hello"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "--scale 2.0 paper: 3.0" in shown
    assert "A recipe of another package; E[x] and [bold] and [/b] are no markup." in shown
    assert "greeting [helps]" in shown
    assert main(["run", "hello", "--scale", "5", "--out", "r", "--quiet"]) == 0
    assert json.loads((work / "r" / "result.json").read_text())["metrics"] == {"value": 5.0}
    assert json.loads((work / "r" / "baseline" / "result.json").read_text())["metrics"] == {"value": 1.0}
    assert "--scale 0.0 is out of range" in refused(capsys, "run", "hello", "--scale", "0")
    assert main(["verify", "hello", "--seeds", "3", "--jobs", "1", "--ledger", "ledger"]) == 0
    assert "greeting [helps]" in capsys.readouterr().out
    entry = json.loads((work / "ledger" / "hello.json").read_text())
    assert entry["claims"][0]["difference"] == 2.0


def test_a_broken_package_does_not_take_the_command_down(installed, work: Path, capsys) -> None:
    installed("[stillroom.recipes]\nlost = stillroom_lost.recipe\nodd = stillroom_hello.nowhere\nhello = stillroom_hello.hello\n")
    assert main(["list"]) == 0
    out = capsys.readouterr().out
    assert "hello" in out
    assert "kd" in out
