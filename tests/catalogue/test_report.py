"""Pages hold everything themselves, say what was run, and the command on them makes the same run again."""

from __future__ import annotations

import base64
import io
import json
import re
import shlex
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from PIL import Image

from stillroom import cli
from stillroom.catalogue import cards, command, report
from stillroom.catalogue.execute import read_result
from stillroom.cli import main
from stillroom.core import config as configs
from stillroom.core import pictures
from stillroom.core.config import flatten
from tests.command import TINY

VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """What a browser would find: elements with attributes, tables as rows of cells, text, and tags that do not match."""

    def __init__(self, file: Path):
        super().__init__()
        self.source = file.read_text()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.tables: list[list[tuple[dict, list[str]]]] = []
        self.open: list[str] = []
        self.blocks: list[str] = []
        self.feed(self.source)
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list) -> None:
        values = {k: v or "" for k, v in attrs}
        self.elements.append((tag, values))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append((values, []))
        elif tag in ("td", "th"):
            self.tables[-1][-1][1].append("")
        elif tag == "pre":
            self.blocks.append("")

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        self.elements.append((tag, {k: v or "" for k, v in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("td", "th"):
            self.tables[-1][-1][1][-1] += data
        elif self.open and self.open[-1] == "pre":
            self.blocks[-1] += data

    def rows(self, table: int) -> list[list[str]]:
        return [[cell.strip() for cell in cells] for _, cells in self.tables[table]]

    def marked(self) -> dict[str, list[str]]:
        return {cells[0]: cells[1:] for values, cells in self.tables[-1] if values.get("class") == "changed"}


def fetches(page: Page) -> list[str]:
    """Every address that a browser would fetch on opening the page."""
    found = []
    for tag, values in page.elements:
        for name, value in values.items():
            loads = name in ("src", "srcset", "poster", "data", "action") or (name.endswith("href") and tag != "a")
            if loads and not value.startswith(("data:", "#")):
                found.append(f"<{tag} {name}={value}>")
            if "url(" in value and not re.fullmatch(r"[^(]*url\(#[\w-]+\)[^(]*", value):
                found.append(f"<{tag} {name}={value}>")
        if tag in ("script", "link", "iframe", "object", "embed"):
            found.append(tag)
    styles = re.findall(r"<style.*?>(.*?)</style>", page.source, re.S)
    return found + [s for s in styles if "@import" in s or re.search(r"url\((?!#)", s)]


FLAGS = (
    "--temperature",
    "2.5",
    "--seed",
    "3",
    "--optimizer.nesterov",
    "--optimizer.drops",
    "0.25",
    "0.5",
    "--pool",
    "labelled",
    "--precision",
    "bf16",
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, shared_store: Path) -> Path:
    """Two finished tiny runs of kd: `r` as it is, `changed` with other flags."""
    root = tmp_path_factory.mktemp("reports")
    for name, flags in (("r", ()), ("changed", FLAGS)):
        assert main(["run", "kd", "--out", str(root / name), "--cache", str(shared_store), *TINY, *flags]) == 0
    return root


def test_a_report_is_one_file_that_fetches_nothing(runs: Path) -> None:
    page = Page(runs / "changed" / "report.html")
    assert fetches(page) == []
    assert "<script" not in page.source
    assert ("html", {"lang": "en"}) in page.elements
    assert any(values.get("name") == "viewport" for _, values in page.elements)


def test_the_table_shows_teacher_baseline_and_student(runs: Path) -> None:
    header, *rows = Page(runs / "changed" / "report.html").rows(0)
    assert [row[0] for row in rows] == ["teacher", "student: plain", "student: kd"]
    assert header[1:] == ["accuracy", "calibration error", "log loss", "parameters", "file", "latency"]
    result = json.loads((runs / "changed" / "result.json").read_text())
    assert rows[2][1] == f"{100 * result['metrics']['accuracy']:.2f} %"
    other = json.loads((runs / "changed" / "baseline" / "result.json").read_text())
    assert rows[1][1] == f"{100 * other['metrics']['accuracy']:.2f} %"
    assert all(all(cell for cell in row) for row in rows)


def test_curves_and_pictures_are_inside(runs: Path) -> None:
    page = Page(runs / "r" / "report.html")
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", page.source)
    assert {"reliability · plain", "reliability · kd", "most confident mistakes · kd"} <= set(captions)
    assert {">student/ce<", ">student/kd<"} <= set(re.findall(r">[\w/ ]+<", page.source))
    assert sum(tag == "svg" for tag, _ in page.elements) >= 4
    (image, *_) = [values["src"] for tag, values in page.elements if tag == "img"]
    picture = Image.open(io.BytesIO(base64.b64decode(image.removeprefix("data:image/png;base64,"))))
    assert picture.width >= 640
    assert pictures.INK not in page.source, "ink must follow the page's theme"
    assert "currentColor" in page.source


def test_what_both_parts_show_alike_is_shown_once(tmp_path: Path) -> None:
    for part, mine in (("a", "<svg>1</svg>"), ("b", "<svg>2</svg>")):
        samples = tmp_path / part / "samples"
        samples.mkdir(parents=True)
        (samples / "teacher.svg").write_text("<svg>teacher</svg>")
        (samples / "student.svg").write_text(mine)
        (samples / f"only-{part}.html").write_text(f"<p>{part}</p>")
    found = report._pictures([("a", tmp_path / "a"), ("b", tmp_path / "b")])
    assert [(p["name"], p["label"]) for p in found] == [
        ("only a", "a"),
        ("only b", "b"),
        ("student", "a"),
        ("student", "b"),
        ("teacher", ""),
    ]


def test_cards_name_first_what_differs() -> None:
    cards = report._gains([{"name": "student: plain", "same": 1.0, "mmd": 3.0}, {"name": "student: method", "same": 1.0, "mmd": 2.0}])
    assert [(metric, difference) for metric, _, difference in cards] == [("mmd", "-1 against plain"), ("same", "+0 against plain")]


def test_config_values_that_differ_are_marked_and_only_those(runs: Path) -> None:
    assert set(Page(runs / "r" / "report.html").marked()) == {"steps", "teacher_steps"}
    marked = Page(runs / "changed" / "report.html").marked()
    assert marked["temperature"] == ["2.5"]
    assert marked["pool"] == ["labelled"]
    assert set(marked) == {"steps", "teacher_steps", "temperature", "pool", "optimizer.nesterov", "optimizer.drops"}


def parsed(words: list[str], monkeypatch) -> tuple[str, dict, int, str, str]:
    """Recipe, config as run, seed, arm and precision of a `stillroom run` command line, by the command's own parser."""
    got: list[tuple] = []
    monkeypatch.setattr(command, "execute_run", lambda *given: got.append(given))
    assert words[:2] == ["stillroom", "run"]
    assert main(words[1:]) == 0
    ((name, recipe, options, config),) = got
    arm = options.arm or cli._method(recipe)[0]
    return (
        name,
        json.loads(json.dumps(flatten(cards.config_of(recipe, arm, config)), default=str)),
        options.seed,
        arm,
        options.precision,
    )


@pytest.mark.parametrize("name", ["r", "changed", "changed/baseline"])
def test_the_command_on_the_page_parses_back_to_the_same_run(name: str, runs: Path, monkeypatch) -> None:
    result = json.loads((runs / name / "result.json").read_text())
    command = report.command(result)
    if name != "changed/baseline":
        assert command in Page(runs / name / "report.html").blocks
    assert parsed(shlex.split(command), monkeypatch) == ("kd", *(result[k] for k in ("config", "seed", "arm", "precision")))


@pytest.mark.parametrize(
    "changes",
    [
        {"data": "my folder/it's $HOME; rm"},
        {"data": ""},
        {"optimizer.drops": ()},
        {"optimizer.drops": (0.1,)},
        {"optimizer.lr": 1e-07},
        {"skip_bad": True, "optimizer.nesterov": True},
        {"student": "hf:a/b", "labelled": 0},
    ],
)
def test_commands_survive_odd_values(changes: dict, monkeypatch) -> None:
    recipe = cards.load("kd")
    config = configs.override(recipe.Config(), changes)
    given = {"recipe": "kd", "arm": "kd", "seed": 0, "precision": "fp32", "config": json.loads(json.dumps(flatten(config)))}
    assert parsed(shlex.split(report.command(given)), monkeypatch)[1] == given["config"]


@pytest.mark.parametrize("name", [n for n, card in cards.cards().items() if card.module.startswith("stillroom.")])
def test_every_recipes_full_config_and_arms_can_be_given_as_flags(name: str, monkeypatch) -> None:
    recipe = cards.load(name)
    for arm in recipe.ARMS:
        config = cards.config_of(recipe, arm, recipe.full())
        given = {"recipe": name, "arm": arm, "seed": 1, "precision": "bf16", "config": json.loads(json.dumps(flatten(config), default=str))}
        assert parsed(shlex.split(report.command(given)), monkeypatch) == (name, given["config"], 1, arm, "bf16")


def test_compare_puts_runs_side_by_side(runs: Path, capsys) -> None:
    out = runs / "compare.html"
    assert main(["compare", str(runs / "r"), str(runs / "changed"), "--out", str(out)]) == 0
    assert capsys.readouterr().out.split() == [str(out)]
    page = Page(out)
    assert fetches(page) == []
    _, *rows = page.rows(0)
    assert [row[0] for row in rows] == [f"{n}, {s}" for n in ("r", "changed") for s in ("teacher", "student: plain", "student: kd")]
    assert page.rows(-1)[0] == ["flag", "r", "changed"]
    assert page.marked()["temperature"] == ["4.0", "2.5"]
    commands = [block for block in page.blocks if block.startswith("stillroom run")]
    assert commands == [report.command(read_result(runs / name)) for name in ("r", "changed")]


def test_text_from_outside_cannot_become_markup(runs: Path, tmp_path: Path) -> None:
    folder = tmp_path / "r<script>"
    shutil.copytree(runs / "r", folder)
    result = json.loads((folder / "result.json").read_text())
    result["config"]["data"] = "<script>alert(1)</script>"
    result["rows"][-1]["name"] = "<b>student"
    (folder / "result.json").write_text(json.dumps(result))
    (folder / "samples" / "x<script>.png").write_bytes(pictures.png(torch.zeros(1, 1, 2, 2)))
    for page in (Page(report.write(folder)), Page(report.compare([folder, runs / "r"], tmp_path / "c.html"))):
        assert not any(tag in ("script", "b") and "script" in tag for tag, _ in page.elements)
        assert "script" not in {tag for tag, _ in page.elements}


def test_metrics_that_are_not_finite_are_shown(runs: Path, tmp_path: Path) -> None:
    folder = tmp_path / "r"
    shutil.copytree(runs / "r", folder)
    result = json.loads((folder / "result.json").read_text())
    result["rows"][-1]["nll"] = None
    (folder / "result.json").write_text(json.dumps(result))
    with open(folder / "metrics.jsonl", "a") as out:
        out.write('{"loop": "train", "step": 4, "student/kd": NaN}\n{"loop": "train", "st')  # the last line cut by a kill
    _, *rows = Page(report.write(folder)).rows(0)
    assert rows[-1][3] == "not finite"
    report.print_table(report.table(folder))


# -- pictures ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("shape", "columns", "grid"),
    [
        ((6, 3, 8, 8), 4, (2, 4)),
        ((16, 1, 8, 8), 8, (2, 8)),
        ((3, 1, 28, 20), 8, (1, 3)),
        ((1, 3, 700, 700), 8, (1, 1)),
        ((9, 4, 5, 5), 3, (3, 3)),
    ],
)
def test_a_sample_grid_has_exactly_its_shape(shape: tuple, columns: int, grid: tuple[int, int]) -> None:
    images = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    picture = Image.open(io.BytesIO(pictures.png(images, columns)))
    (_, channels, height, width), (rows, across) = shape, grid
    scale = max(1, 640 // (across * (width + 2)))
    assert picture.size == (across * (width + 2) * scale, rows * (height + 2) * scale)
    assert picture.mode == "RGB"
    pixels = torch.tensor(list(picture.convert("RGB").tobytes()), dtype=torch.uint8).view(*picture.size[::-1], 3)[::scale, ::scale]
    for i in range(rows * across):
        y, x = (i // across) * (height + 2) + 1, (i % across) * (width + 2) + 1
        cell = pixels[y : y + height, x : x + width].permute(2, 0, 1)
        expected = (images[i] * 255).round().byte()[:3] if i < len(images) else torch.full((3, height, width), 255, dtype=torch.uint8)
        assert torch.equal(cell, expected.expand(3, -1, -1) if channels == 1 else expected)
    assert (pixels[0] == 255).all(), "a white line around every image"


def test_values_outside_the_unit_range_are_clamped_and_an_empty_grid_is_refused() -> None:
    picture = Image.open(io.BytesIO(pictures.png(torch.tensor([-3.0, 0.5, 7.0]).view(1, 1, 1, 3))))
    scale = picture.width // 5
    assert [picture.getpixel((scale * (1 + i), scale))[0] for i in range(3)] == [0, 128, 255]
    with pytest.raises(ValueError, match="no images"):
        pictures.png(torch.zeros(0, 3, 8, 8))


def test_figures_are_the_same_bytes_each_time() -> None:
    draw = lambda axes: axes.plot([0, 1], [1, 0], label="x")
    assert pictures.svg(draw) == pictures.svg(draw)
