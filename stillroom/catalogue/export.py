"""Students in formats that other programs run: safetensors in the library's own layout, ONNX, torch.export. Each is checked against
PyTorch on random images at several batch sizes before it is kept, and timed."""

from __future__ import annotations

import hashlib
import json
import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from stillroom.core.errors import UserError, needs
from stillroom.core.store import replacing, write_atomic
from stillroom.metrics.cost import cost
from stillroom.vision import hub, saving

Format = Literal["safetensors", "onnx", "torch-export"]
BATCHES = (1, 3, 8)
"""Sizes at which an exported student must agree with PyTorch."""
TOLERANCE = 1e-4
"""Largest `_gap`."""
MARK = "export.json"
"""In every exported folder: which run it is of, and what else was written there."""


def export(run: str | Path, to: Format, out: str | Path | None = None) -> tuple[Path, dict[str, dict[str, float]]]:
    """Write a run's classifier to RUN/exported/FORMAT (or `out`). Returns the folder and, for eager PyTorch and for the exported student,
    bytes, latency_ms for one image, throughput at 64 images and the largest difference from PyTorch, measured one after the other. A
    finished run keeps them in exports.json and shows them in its report.

    Images are float32 (batch, channels, size, size) in [0, 1], of the student's own size; normalising is part of what is exported. The
    batch is dynamic. UserError when there is no student that can be exported, a package is missing, the result disagrees, or `out` holds
    anything but an earlier export of the same run.
    """
    run = Path(run)
    student = run / "student" if (run / "student").is_dir() or (run / "result.json").exists() else run
    _exportable(student)
    net = hub.load_student(student).eval()
    images = _images(net, student)
    folder = Path(out) if out else run / "exported" / to
    _refuse_foreign(folder, run)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with replacing(folder) as place:
        call = {"safetensors": _safetensors, "onnx": _onnx, "torch-export": _torch_export}[to](net, images, place)
        (place / MARK).write_text(
            json.dumps({"run": _name(run), "files": sorted([*(file.name for file in place.iterdir()), "inputs.json"])})
        )
        (place / "inputs.json").write_text(json.dumps({"images": ["batch", *images.shape[1:]], "range": [0, 1]}) + "\n")
        gap = max(_gap(net, call, images[:count]) for count in BATCHES)
        if not gap <= TOLERANCE:
            raise UserError(f"the student exported to {to} differs from PyTorch by {gap:.2g} of its largest logit; nothing was kept.")
    rows = {}
    for name, module, difference in (("eager", net, 0.0), (to, _Called(call), gap)):
        measured = cost(module, images)
        rows[name] = {k: measured[k] for k in ("bytes", "latency_ms", "throughput")} | {"difference": difference}
    rows[to]["bytes"] = sum(file.stat().st_size for file in folder.iterdir())
    if (run / "result.json").exists():
        _remember(run, rows)
    return folder, rows


def _name(run: Path) -> str:
    """Of a run folder, for `MARK`: a digest of where it is, so that an export that is given away tells nothing of its maker's folders."""
    return hashlib.blake2b(str(run.resolve()).encode(), digest_size=16).hexdigest()


def _refuse_foreign(folder: Path, run: Path) -> None:
    """UserError unless `folder` is new, empty, or an earlier export of `run` with nothing beside: an export replaces the whole folder."""
    if not folder.exists() and not folder.is_symlink():
        return
    if folder.is_symlink() or not folder.is_dir():
        raise UserError(f"{folder} is no folder: name another --out.", code=2)
    there = {path.name for path in folder.iterdir()} - {MARK}
    try:
        mark = json.loads((folder / MARK).read_text())
        own = mark["run"] == _name(run) and there <= set(mark["files"])
    except (OSError, ValueError, KeyError, TypeError):
        own = not there and not (folder / MARK).exists()
    if not own:
        raise UserError(f"{folder} holds something else than an export of {run}: name a new or empty folder as --out.", code=2)


@torch.no_grad()
def _gap(net: nn.Module, call: Callable[[Tensor], Tensor], images: Tensor) -> float:
    """Largest difference of a logit, relative to the largest logit (at least one)."""
    reference = net(images)
    return float((call(images) - reference).abs().max() / reference.abs().max().clamp_min(1))


def _exportable(student: Path) -> None:
    """UserError, with what to do instead, for what has no static graph of a classifier."""
    if not student.is_dir() and (student.parent / "result.json").exists():
        raise UserError(f"{student.parent} is a finished run without a student: its recipe saves none, or {student} was deleted.")
    if not student.is_dir():
        raise UserError(f"{student}: there is no such run or student folder.")
    if (student / "exits.json").exists():
        raise UserError(
            f"{student} leaves at exits that depend on the image, which no static graph can do. Load it in Python with "
            "stillroom.adapt.early_exit.EarlyExit.load."
        )
    if (student / "model_index.json").exists() or (student / "adapter_config.json").exists():
        kind = "diffusers pipeline" if (student / "model_index.json").exists() else "PEFT adapter"
        raise UserError(f"{student} is a {kind}, already in its library's format; export is for image classifiers.")
    if not (student / "config.json").is_file():
        raise UserError(f"{student} holds no saved student (no config.json); finish the run first, or give the folder of another.")


def _images(net: nn.Module, student: Path) -> Tensor:
    """(64, C, S, S), random, of the shape that the student was made for."""
    spec: Any = getattr(net, "spec", None)
    if spec:
        channels, size = spec["channels"], spec["size"]
    else:
        wrapped: Any = net
        channels, size = getattr(wrapped.model.config, "num_channels", 3), wrapped.size
    if size is None:
        raise UserError(f"{student}: its config names no image size, which an exported graph needs; add image_size to config.json.")
    return torch.rand(64, channels, size, size, generator=torch.Generator().manual_seed(0))


def _safetensors(net: nn.Module, images: Tensor, place: Path) -> Callable[[Tensor], Tensor]:
    """The folder that its library's from_pretrained (or run:FOLDER) loads; packed weights are unpacked."""
    saving.save_classifier(net, place / "student")
    for file in (place / "student").iterdir():
        file.rename(place / file.name)
    (place / "student").rmdir()
    return hub.load_student(place).eval()


def _onnx(net: nn.Module, images: Tensor, place: Path) -> Callable[[Tensor], Tensor]:
    _, _, runtime = (needs(package, "export") for package in ("onnx", "onnxscript", "onnxruntime"))
    file = place / "model.onnx"
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it misses torchvision, which nothing here uses
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            torch.onnx.export(
                net, (images[:2],), str(file), input_names=["images"], output_names=["logits"], dynamo=True, external_data=False,
                dynamic_shapes=({0: torch.export.Dim("batch")},), verbose=False,
            )  # fmt: skip
        except (torch.onnx.OnnxExporterError, torch.onnx.errors.OnnxExporterError) as error:
            raise UserError(f"{type(net).__name__} cannot be written as ONNX: {str(error).splitlines()[0]}") from error
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()  # compared with PyTorch on equal terms
    session = runtime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(["logits"], {"images": x.numpy()})[0])


def _torch_export(net: nn.Module, images: Tensor, place: Path) -> Callable[[Tensor], Tensor]:
    try:
        program = torch.export.export(net, (images[:2],), dynamic_shapes=({0: torch.export.Dim("batch")},))
    except (torch._dynamo.exc.TorchDynamoException, RuntimeError, ValueError) as error:
        raise UserError(f"{type(net).__name__} cannot be exported: {str(error).splitlines()[0]}") from error
    torch.export.save(program, place / "model.pt2")
    return torch.export.load(place / "model.pt2").module()


class _Called(nn.Module):
    """A function as a module, for `cost`."""

    def __init__(self, call: Callable[[Tensor], Tensor]):
        super().__init__()
        self.call = [call]

    def forward(self, x: Tensor) -> Tensor:
        return self.call[0](x)


def _remember(run: Path, rows: dict[str, dict[str, float]]) -> None:
    """Add the rows to exports.json and to what the report shows, and write the report anew."""
    from stillroom.catalogue import report

    file = run / "exports.json"
    try:
        rows = (json.loads(file.read_text()) if file.exists() else {}) | rows
    except (ValueError, TypeError):
        raise UserError(f"{file} is damaged: delete it, and give the command again.") from None
    write_atomic(file, json.dumps(rows, indent=1))
    columns = ("bytes", "latency_ms", "throughput")
    cells = [[name, *(report.shown(column, row[column]) for column in columns)] for name, row in rows.items()]
    head = "".join(f"<th>{report.SHOWN[column][0]}</th>" for column in columns)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in cells)
    (run / "samples").mkdir(exist_ok=True)
    write_atomic(run / "samples" / "exported student.html", f'<table class="result"><tr><th></th>{head}</tr>{body}</table>')
    report.write(run)
