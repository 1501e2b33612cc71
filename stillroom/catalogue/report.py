"""Reports: one self-contained HTML page per run (or for several), the final table, and pictures that follow the page's theme."""

from __future__ import annotations

import base64
import itertools
import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stillroom.catalogue import cards
from stillroom.catalogue.execute import read_result
from stillroom.core.errors import UserError
from stillroom.core.pictures import COLOURS, svg
from stillroom.core.store import write_atomic

if TYPE_CHECKING:
    pass

# Metrics with a name, unit and scale of their own; all others are shown as they are.
SHOWN: dict[str, tuple[str, str, float, int]] = {
    "accuracy": ("accuracy", "%", 100, 2),
    "ece": ("calibration error", "%", 100, 2),
    "nll": ("log loss", "", 1, 4),
    "aurc": ("AURC x1000", "", 1000, 2),
    "parameters": ("parameters", "", 1, 0),
    "bytes": ("file", "kB", 1e-3, 1),
    "latency_ms": ("latency", "ms", 1, 3),
    "throughput": ("throughput", "/s", 1, 0),
    "tokens_per_second": ("tokens per second", "", 1, 0),
}


def shown(metric: str, value: float | None) -> str:
    """A metric's value for people; None is one that is not finite."""
    if value is None:
        return "not finite"
    _, unit, scale, digits = SHOWN.get(metric, (metric, "", 1.0, -1))
    text = f"{value:.4g}" if digits < 0 else f"{value * scale:,.{digits}f}"
    return f"{text} {unit}".strip() if unit != "%" else f"{text} %"


# -- what a run folder says --------------------------------------------------------------------------------------------------------
def table(folder: Path) -> list[dict[str, Any]]:
    """The final table: teacher, student without the method, student with it. Each row has a name and metrics."""
    result = read_result(folder)
    student = f"student: {result['arm'] or 'method'}"
    rows = result["rows"] or [{"name": "student", **result["metrics"]}]
    teachers = [row for row in rows if row["name"] != "student"]
    mine = [{**row, "name": student} for row in rows if row["name"] == "student"]
    if not (folder / "baseline" / "result.json").exists():
        return teachers + mine
    other = read_result(folder / "baseline")
    rows = other["rows"] or [{"name": "student", **other["metrics"]}]
    return teachers + [{**row, "name": f"student: {other['arm']}"} for row in rows if row["name"] == "student"] + mine


def print_table(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    columns = list(dict.fromkeys(k for row in rows for k in row if k != "name"))
    out = Table(box=None, header_style="bold", pad_edge=False)
    out.add_column("", no_wrap=True, min_width=max(len(row["name"]) for row in rows))
    for column in columns:
        out.add_column(SHOWN[column][0] if column in SHOWN else column, justify="right")
    for row in rows:
        out.add_row(escape(row["name"]), *(shown(c, row[c]) if c in row else "" for c in columns))
    Console().print(out)


def command(result: dict[str, Any]) -> str:
    """The command line that makes this run again."""
    words = ["stillroom", "run", result["recipe"]] + (["--seed", str(result["seed"])] if result["seed"] else [])
    words += ["--arm", result["arm"]] if result["arm"] else []
    words += ["--precision", result["precision"]] if result["precision"] != "fp32" else []
    for name, value in changed(result).items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            head, _, tail = flag.rpartition(".")
            words.append(f"--{flag}" if value else f"--{head + '.' if head else ''}no-{tail}")
        else:
            words += [f"--{flag}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    return shlex.join(words)


def changed(result: dict[str, Any]) -> dict[str, Any]:
    """Config values that are neither the defaults nor what the run's arm sets."""
    from stillroom.core.config import flatten

    recipe = cards.load(result["recipe"])
    usual = json.loads(json.dumps(flatten(cards.config_of(recipe, result["arm"])), default=str))
    return {k: v for k, v in result["config"].items() if usual.get(k) != v}


def _curves(sources: list[tuple[str, Path]]) -> list[tuple[str, str]]:
    """One SVG per logged number, with a line per (run, stage)."""
    lines: dict[str, list[tuple[str, list, list]]] = {}
    for label, folder in sources:
        for file in sorted([folder / "metrics.jsonl", *folder.glob("*/metrics.jsonl")]):
            stage = "" if file.parent == folder else file.parent.name
            if stage == "baseline":
                continue
            found = records(file)
            for key in dict.fromkeys(k for r in found for k in r if k not in ("loop", "step")):
                for loop in dict.fromkeys(r["loop"] for r in found if key in r):
                    points = [(r["step"], r[key]) for r in found if r["loop"] == loop and key in r]
                    name = " ".join(part for part in (stage, "" if loop == "train" else loop, key) if part)
                    lines.setdefault(name, []).append((label, [x for x, _ in points], [y for _, y in points]))
    colour = dict(zip((label for label, _ in sources), COLOURS * len(sources)))
    # mypy cannot infer a lambda that binds its loop's values as defaults.
    return [(name, svg(lambda axes, n=name, s=series: _lines(axes, n, s, colour))) for name, series in lines.items()]  # type: ignore[misc]


def _lines(axes: Any, name: str, series: list[tuple[str, list, list]], colour: dict[str, str]) -> None:
    for label, x, y in series:
        axes.plot(x, y, label=label, linewidth=1.4, color=colour[label])
    positive = [v for _, _, y in series for v in y if v > 0]
    if positive and all(v > 0 for _, _, y in series for v in y) and max(positive) > 50 * min(positive):
        axes.set_yscale("log")
    axes.set_xlabel("step")
    axes.set_title(name, fontsize=10, loc="left")
    axes.legend(fontsize=9)


def _pictures(parts: list[tuple[str, Path]]) -> list[dict[str, str]]:
    """Everything in the parts' samples/, wide fragments first, then by name; what all parts that have it show alike is shown once."""
    every = sorted(
        (p for label, folder in parts for p in _samples(folder, label)), key=lambda p: (p["kind"] != ".html", p["name"], p["kind"])
    )
    kept = []
    for _, group in itertools.groupby(every, key=lambda p: (p["kind"], p["name"])):
        alike = list(group)
        same = len(alike) > 1 and len({p["markup"] for p in alike}) == 1
        kept += [{**alike[0], "label": ""}] if same else alike
    return kept


def _samples(folder: Path, label: str) -> list[dict[str, str]]:
    """SVG and HTML fragments as they are, PNG inlined."""
    found = []
    for file in sorted((folder / "samples").glob("*")):
        entry = {"name": file.stem.replace("_", " ").replace("-", " "), "label": label, "kind": file.suffix}
        if file.suffix in (".svg", ".html"):
            found.append({**entry, "markup": file.read_text()})
        elif file.suffix == ".png":
            data = base64.b64encode(file.read_bytes()).decode()
            found.append({**entry, "markup": f'<img class="pixels" alt="{entry["name"]}" src="data:image/png;base64,{data}">'})
    return found


def records(file: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl; a last line cut short by a kill is left out. UserError for any other line that is damaged."""
    if not file.exists():
        return []
    lines = file.read_text(errors="replace").splitlines()
    found = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            numbers = [value for key, value in record.items() if key != "loop"]
            if not isinstance(record["loop"], str) or not all(isinstance(value, float | int) for value in [record["step"], *numbers]):
                raise ValueError
            found.append(record)
        except (ValueError, KeyError, AttributeError):
            if number < len(lines):
                raise UserError(f"{file}, line {number} is damaged: delete that line, and the page leaves out what it held.") from None
    return found


# -- pages -------------------------------------------------------------------------------------------------------------------------
def write(folder: Path) -> Path:
    """report.html of a finished run, with its baseline beside it."""
    result = read_result(folder)
    parts = [(result["arm"] or "method", folder)]
    if (folder / "baseline" / "result.json").exists():
        parts.insert(0, (read_result(folder / "baseline")["arm"], folder / "baseline"))
    html = page(cards.load(result["recipe"]).__doc__ or result["recipe"], table(folder), parts, [result])
    write_atomic(folder / "report.html", html)
    return folder / "report.html"


def compare(folders: list[Path], out: Path) -> Path:
    """One page for several runs. UserError when one of them is not a finished run."""
    if not folders:
        raise UserError("give the folders of the runs to compare.", code=2)
    if out.is_dir() or not out.name:
        raise UserError(f"--out {out} is a folder: name a file, such as {out / 'compare.html'}.", code=2)
    results = [read_result(folder) for folder in folders]
    rows = [{**row, "name": f"{folder.name}, {row['name']}"} for folder in folders for row in table(folder)]
    title = f"{len(folders)} runs compared\n\n" + "\n".join(
        f"{f.name}: {r['recipe']}, seed {r['seed']}" for f, r in zip(folders, results, strict=True)
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(out, page(title, rows, [(f.name, f) for f in folders], results))
    return out


def page(doc: str, rows: list[dict[str, Any]], parts: list[tuple[str, Path]], results: list[dict[str, Any]]) -> str:
    """The HTML: title and text, the final table, pictures and curves of `parts` (label, folder), config and commands of `results`."""
    from jinja2 import Environment, FileSystemLoader

    title, _, text = doc.strip().partition("\n")
    columns = list(dict.fromkeys(k for row in rows for k in row if k != "name"))
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    keys = list(dict.fromkeys(k for r in results for k in r["config"]))
    return environment.get_template("report.html").render(
        title=title,
        text=paragraphs(text),
        columns=[SHOWN[c][0] if c in SHOWN else c for c in columns],
        rows=[(row["name"], [shown(c, row[c]) if c in row else "" for c in columns]) for row in rows],
        gains=_gains(rows) if len(results) == 1 else [],
        curves=_curves(parts),
        pictures=_pictures(parts),
        names=[f.name for _, f in parts] if len(results) > 1 else ["value"],
        config=[(k, [r["config"].get(k, "") for r in results], any(k in changed(r) for r in results)) for k in keys],
        results=results,
        commands=[command(r) for r in results],
    )


def paragraphs(text: str) -> list[tuple[str, str]]:
    """A docstring's body as ("p", running text) and ("pre", formulas): a paragraph whose lines are all indented stays as it is."""
    blocks = [block for block in text.strip("\n").split("\n\n") if block.strip()]
    return [("pre", b) if all(x.startswith("  ") for x in b.splitlines()) else ("p", " ".join(b.split())) for b in blocks]


def _gains(rows: list[dict[str, Any]]) -> list[tuple[str, str, str]]:
    """(metric, student's value, comparison) for the cards on top: quality against the student without the method (what differs first),
    size against the teacher."""
    if len(rows) < 2:
        return []
    student, other = rows[-1], rows[-2]
    cards = []
    quality = [m for m in student if m not in ("name", "parameters", "bytes", "latency_ms", "throughput")]
    known = [m for m in quality if None not in (student[m], other.get(m))]
    for metric in sorted(known, key=lambda m: student[m] == other[m])[:4]:
        label, unit, scale, _ = SHOWN.get(metric, (metric, "", 1.0, -1))
        unit = "points" if unit == "%" else unit
        difference = f"{(student[metric] - other[metric]) * scale:+.3g} {unit}".strip()
        cards.append((label, shown(metric, student[metric]), f"{difference} against {other['name'].removeprefix('student: ')}"))
    teacher = next((row for row in rows if row["name"] == "teacher"), {})
    if teacher.get("parameters") and student.get("parameters"):
        cards.append(
            (
                "parameters",
                shown("parameters", student["parameters"]),
                f"teacher: {teacher['parameters'] / student['parameters']:.3g} times as many",
            )
        )
    return cards
