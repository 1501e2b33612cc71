"""The files that a module's behaviour rests on, found by walking its imports without executing anything."""

from __future__ import annotations

import ast
import functools
import hashlib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]


def name_of(file: Path) -> str:
    """stillroom/core/run.py -> "stillroom.core.run"; a package's __init__ is the package."""
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(file: Path, *, lazily: bool = True) -> Iterator[str]:
    """Every module that a file imports, as it would be found at run time; not what only type checkers see. Without `lazily`, only
    what importing the file imports."""
    package = name_of(file).split(".") if file.name == "__init__.py" else name_of(file).split(".")[:-1]
    waiting: list[ast.AST] = [ast.parse(file.read_text())]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            waiting += node.orelse
            continue
        if not lazily and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                whole = f"{module}.{alias.name}"
                path = ROOT.joinpath(*whole.split("."))
                yield whole if path.is_dir() or path.with_suffix(".py").is_file() else module
        waiting += ast.iter_child_nodes(node)


def closure(file: Path) -> list[Path]:
    """The file and every file beside it in this checkout that it imports, directly or not, in order of name."""
    found, ahead = {file}, [file]
    while ahead:
        for module in imports(ahead.pop()):
            path = ROOT.joinpath(*module.split("."))
            for each in (path.with_suffix(".py"), path / "__init__.py"):
                if module.partition(".")[0] == "stillroom" and each.is_file() and each not in found:
                    found.add(each)
                    ahead.append(each)
    return sorted(found)


def code_of(file: Path) -> str:
    """A hex digest of what the file does, and of all that it imports from this package: comments, docstrings and layout do not count."""
    digest = hashlib.blake2b(digest_size=16)
    for each in closure(file) if file.is_relative_to(ROOT) else [file]:
        digest.update(_code(each, each.stat().st_mtime_ns).encode())
    return digest.hexdigest()


@functools.lru_cache(maxsize=1024)
def _code(file: Path, changed: int) -> str:
    tree = ast.parse(file.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree)
