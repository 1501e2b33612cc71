"""The shape that the design holds: who may import whom, how large files may grow, what an import costs, what is never committed."""

from __future__ import annotations

import ast
import io
import re
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

from stillroom.catalogue.closure import closure, imports, name_of

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "stillroom"
FILES = sorted(PACKAGE.rglob("*.py"))

# From the ground up; a folder may import itself and what lies on the floors under it. `testing` serves recipes' authors and their tests.
FLOORS: list[set[str]] = [
    {"core"},
    {"data", "losses"},
    {"metrics", "nets"},
    {"adapt"},
    {"vision", "lm", "diffusion"},
    {"restoration"},
    {"catalogue"},
    {"search"},
    {"recipes"},
    {"cli", "testing"},
    {"__main__"},
]
MATERIALS = {"data", "losses", "metrics", "nets", "adapt"}
ROOMS = {"vision", "lm", "diffusion", "restoration", "search"}
ACROSS = {("restoration", "diffusion")}
"""Rooms that may use another one."""


def part(module: str) -> str:
    """The folder that a module belongs to: stillroom.data.load is of `data`."""
    return module.split(".")[1] if "." in module else ""


def code_lines(file: Path) -> int:
    """Lines that hold code: without blank lines, comments and docstrings."""
    text = file.read_text()
    prose: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            prose |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    empty = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    code: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in empty:
            code |= set(range(token.start[0], token.end[0] + 1))
    return len(code - prose)


def ours(file: Path) -> set[str]:
    return {m for m in imports(file) if m.partition(".")[0] == "stillroom" and part(m)}


def test_every_module_has_a_floor() -> None:
    known = set().union(*FLOORS)
    assert {part(name_of(file)) for file in FILES} - {""} <= known
    assert sum(map(len, FLOORS)) == len(known)


@pytest.mark.parametrize("file", FILES, ids=lambda f: name_of(f))
def test_imports_go_down(file: Path) -> None:
    own = part(name_of(file))
    if not own:
        return
    height = next(i for i, floor in enumerate(FLOORS) if own in floor)
    below = set().union(*FLOORS[:height], {own})
    rooms = {theirs for theirs in ROOMS - {own} if own in ROOMS and (own, theirs) not in ACROSS}
    wrong = [m for m in ours(file) if part(m) not in below - rooms]
    assert not wrong, f"{name_of(file)} must not import {wrong}"


@pytest.mark.parametrize("file", [f for f in FILES if part(name_of(f)) in MATERIALS], ids=lambda f: name_of(f))
def test_materials_know_no_run(file: Path) -> None:
    assert not {m for m in ours(file) if m in ("stillroom.core.run", "stillroom.core.roles", "stillroom.core.checkpoint")}


def test_no_module_of_the_core_imports_one_that_imports_it() -> None:
    graph = {name_of(f): {m for m in ours(f) if part(m) == "core"} for f in FILES if part(name_of(f)) == "core"}
    while free := {name for name, needs in graph.items() if not needs & set(graph)}:
        graph = {name: needs for name, needs in graph.items() if name not in free}
    assert not graph, f"a circle among {sorted(graph)}"


def test_the_import_walk_sees_what_it_should() -> None:
    found = set(imports(PACKAGE / "cli.py"))
    assert {"tyro", "stillroom.catalogue.report", "stillroom.catalogue.claims", "rich.table"} <= found
    assert "stillroom.catalogue.report" not in set(imports(PACKAGE / "cli.py", lazily=False))
    assert PACKAGE / "core" / "run.py" in closure(PACKAGE / "catalogue" / "execute.py")
    assert PACKAGE / "cli.py" not in closure(PACKAGE / "catalogue" / "execute.py")


def test_losses_import_torch_only() -> None:
    allowed = set(sys.stdlib_module_names) | {"torch"}
    for file in (PACKAGE / "losses").rglob("*.py"):
        wrong = [m for m in imports(file) if m.partition(".")[0] not in allowed and not m.startswith("stillroom.losses")]
        assert not wrong, f"{name_of(file)} imports {wrong}"


def test_recipes_never_import_recipes() -> None:
    for file in FILES:
        wrong = [m for m in imports(file) if m.startswith("stillroom.recipes.")]
        assert not wrong, f"{name_of(file)} imports {wrong}"


HEAVY = {
    "transformers",
    "diffusers",
    "kornia",
    "matplotlib",
    "accelerate",
    "datasets",
    "pyarrow",
    "PIL",
    "timm",
    "peft",
    "sklearn",
    "pandas",
    "ray",
}
HEAVY |= {"scipy", "jinja2"}


@pytest.mark.parametrize("file", FILES, ids=lambda f: name_of(f))
def test_nothing_heavy_is_imported_by_importing_a_module(file: Path) -> None:
    assert not {m.partition(".")[0] for m in imports(file, lazily=False)} & HEAVY


@pytest.mark.parametrize("folder", ["stillroom", "tests", "bench"])
def test_no_file_is_longer_than_400_lines(folder: str) -> None:
    ours = [f for f in (ROOT / folder).rglob("*.py") if ".venvs" not in f.parts]  # peers that the benchmark installed
    lengths = {str(f.relative_to(ROOT)): len(f.read_text().splitlines()) for f in ours}
    assert not {name: length for name, length in lengths.items() if length > 400}


def test_the_core_stays_small() -> None:
    """Counted are lines of code, without docstrings, comments and blank lines."""
    core = {file.name: code_lines(file) for file in (PACKAGE / "core").glob("*.py")}
    assert sum(core.values()) <= 1100, core


def test_lines_of_code_are_counted_right(tmp_path: Path) -> None:
    file = tmp_path / "x.py"
    file.write_text(
        '"""Doc\nstring."""\n\n# comment\nx = (\n    1,  # one\n\n    2,\n)\n\n\ndef f():\n    """Doc."""\n    return """a\nb"""\n'
    )
    assert code_lines(file) == 4 + 1 + 2


def added(first: str, then: str) -> set[str]:
    """Modules that the second statement loads after the first."""
    script = f"import sys; {first}; before = set(sys.modules); {then}; print(*set(sys.modules) - before)"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_importing_stillroom_adds_next_to_nothing() -> None:
    """Modules are counted, not time: 0.1 s is about a hundred small ones."""
    assert len(added("pass", "import stillroom")) <= 3
    found = added("import torch", "import stillroom.core.run, stillroom.catalogue.claims")
    assert len(found) <= 100, sorted(found)
    assert not {m.partition(".")[0] for m in found} & HEAVY


def tracked() -> list[Path]:
    listed = subprocess.run(["git", "-C", str(ROOT), "ls-files", "-z"], capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a checkout")
    return [ROOT / name for name in listed.stdout.split("\0") if name]


# Written in pieces, so that this file does not find itself.
MACHINE = re.compile("|".join(["/wo" + "rk/", "/ho" + r"me/\w", "/ro" + "ot/", "/Us" + r"ers/\w", "/tm" + r"p/\w", r"C:\\Us" + "ers"]))


def test_no_path_of_a_machine_is_committed() -> None:
    found = []
    for file in tracked():
        if not file.is_file():
            continue
        try:
            lines = file.read_text().splitlines()
        except UnicodeDecodeError:
            continue
        found += [f"{file.relative_to(ROOT)}:{i}: {line.strip()[:80]}" for i, line in enumerate(lines, 1) if MACHINE.search(line)]
    assert not found, "\n".join(found)


def test_no_run_folder_cache_or_weight_is_committed() -> None:
    wrong = [f for f in tracked() if f.suffix in (".pt", ".pth", ".ckpt", ".bin", ".pyc", ".safetensors") or "__pycache__" in f.parts]
    assert not wrong
