"""Teacher caches on disk: what a teacher says about a corpus, captured once, resumably, and read by memory map.

A cache belongs to its teacher, tokenizer and exact token ids; its folder is named by their hash. Per predicted token it holds

    topk     k ids, k log-probabilities and the log of the leftover mass         4k + 2 bytes (vocabulary up to 65,536)
    sampled  n ids drawn with replacement from p^kappa and their weights         4n bytes, 2n when kappa = 1 (all weights 1/n)
    states   the teacher's last hidden states, exact up to float16               2d bytes, and the head once
    full     the log-probabilities of the whole vocabulary                       2V bytes
    text     the log-probability of the text's own next token, in float32        4 bytes

Ids are uint16 where they fit, numbers float16. topk and sampled are bound to the temperature of the capture, states and full read at any;
text is the word for `stillroom.lm.crosstok`, at temperature 1.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from filelock import FileLock
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from stillroom.core.errors import UserError
from stillroom.core.store import write_atomic
from stillroom.lm.output import OutputLayer
from stillroom.lm.output import head as head_of
from stillroom.lm.signals import Dense, Head, Sampled, Signal, TopK, log_leftover
from stillroom.lm.tokenizer import fingerprint
from stillroom.metrics.modes import eval_mode

Kind = Literal["topk", "sampled", "states", "full", "text"]
Sequences = Sequence[Sequence[int]] | Tensor


@dataclass(frozen=True)
class Capture:
    """What to store: `size` words per token for topk and sampled, at one temperature."""

    kind: Kind = "topk"
    size: int = 32
    temperature: float = 1.0
    kappa: float = 1.0
    """Sampled only: the proposal is p^kappa. Weights are not self-normalised, so the target stays unbiased for any kappa."""
    seed: int = 0


class TeacherCache:
    """A finished cache: `signal(indices)` beside `tokens(indices)`, both without reading the rest of the file."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.meta = json.loads((folder / "meta.json").read_text())
        self.capture = Capture(**self.meta["capture"])
        self._starts = np.concatenate([[0], np.cumsum(np.asarray(self.meta["lengths"]) - 1)])
        self._token_starts = np.concatenate([[0], np.cumsum(self.meta["lengths"])])
        self._columns = {
            name: np.memmap(folder / f"{name}.bin", dtype, "r", shape=(int(self._starts[-1]), width))
            for name, (dtype, width) in self.meta["columns"].items()
        }
        self._ids = np.memmap(folder / "tokens.bin", self.meta["token_dtype"], "r")
        self._heads: dict[Any, OutputLayer] = {}

    @property
    def bytes_per_token(self) -> float:
        """Of the signal, per predicted token; the head of a states cache is counted in."""
        used = sum((self.folder / f"{name}.bin").stat().st_size for name in self.meta["columns"])
        head = self.folder / "head.safetensors"
        return (used + (head.stat().st_size if head.exists() else 0)) / max(int(self._starts[-1]), 1)

    def __len__(self) -> int:
        return len(self.meta["lengths"])

    def tokens(self, index: int) -> Tensor:
        """Token ids (L,) of a captured sequence."""
        return torch.from_numpy(self._ids[self._token_starts[index] : self._token_starts[index + 1]].astype(np.int64))

    def signal(self, indices: Sequence[int], *, width: int | None = None, device: torch.device | str = "cpu") -> Signal:
        """The teacher's word on the sequences' predicted positions, on `device`, rows in the order of `align`ing a batch of them padded
        right to `width` tokens (default: the longest). Rows of padding repeat the sequence's last one: their labels must be ignored.
        """
        width = width or max(self.meta["lengths"][i] for i in indices)
        rows = np.concatenate([np.minimum(self._starts[i] + np.arange(width - 1), self._starts[i + 1] - 1) for i in indices])
        got = {name: torch.from_numpy(np.asarray(column[rows])).to(device) for name, column in self._columns.items()}
        at = self.capture.temperature
        match self.capture.kind:
            case "topk":
                return TopK(got["ids"].long(), got["log_probs"].float(), got["log_tail"].float().squeeze(-1), at)
            case "sampled":
                ids = got["ids"].long()
                return Sampled(
                    ids, got["weights"].float() if "weights" in got else torch.full(ids.shape, 1 / ids.shape[1], device=ids.device), at
                )
            case "states":
                return Head(got["states"].float(), self._head(device))
            case "full":
                return Dense(got["log_probs"].float())
            case _:
                raise UserError("A cache of kind 'text' holds no distributions: read its log_probs.")

    def _head(self, device: torch.device | str) -> OutputLayer:
        """The teacher's output layer, kept where it was asked for."""
        if device not in self._heads:
            kept = {name: value.to(device) for name, value in load_file(self.folder / "head.safetensors").items()}
            bias = kept["bias"].float() if "bias" in kept else None
            self._heads[device] = OutputLayer(kept["weight"].float(), bias, **self.meta["head"])
        return self._heads[device]

    def log_probs(self, indices: Sequence[int]) -> Tensor:
        """Kind text: log-probabilities of all tokens after the first of each sequence, one sequence after the other."""
        rows = np.concatenate([np.arange(self._starts[i], self._starts[i + 1]) for i in indices])
        return torch.from_numpy(np.asarray(self._columns["text"][rows])).squeeze(-1)

    def check(self, *, tokenizer: Any = None, sequences: Sequences | None = None) -> TeacherCache:
        """Itself, or a UserError when the student's tokenizer or text is not the one captured."""
        if tokenizer is not None and (theirs := fingerprint(tokenizer)) != self.meta["tokenizer"]:
            raise UserError(
                f"The teacher cache {self.folder} was made with another tokenizer ({self.meta['tokenizer']}, the student's is {theirs}): "
                "its ids mean other words. Capture again with this tokenizer, or choose a cross-tokenizer signal."
            )
        if sequences is not None and (theirs := text_hash(sequences)) != self.meta["text"]:
            raise UserError(
                f"The teacher cache {self.folder} was made from other text ({self.meta['text']}, this one is {theirs}): capture again."
            )
        return self


def text_hash(sequences: Sequences) -> str:
    """A hash of token ids and of where each sequence ends."""
    digest = hashlib.sha256()
    for ids in sequences:
        array = np.asarray(ids, dtype=np.int64)
        digest.update(len(array).to_bytes(8, "little") + array.tobytes())
    return digest.hexdigest()[:16]


def model_hash(model: nn.Module) -> str:
    """A hash of every parameter's name, shape and up to 64 of its values: cheap for any size, and another for other weights."""
    digest = hashlib.sha256()
    for name, value in model.named_parameters():
        flat = value.detach().flatten()
        some = flat[:: max(1, len(flat) // 64)][:64].float().cpu().numpy()
        digest.update(f"{name}{tuple(value.shape)}".encode() + some.tobytes())
    return digest.hexdigest()[:16]


def capture(
    root: Path | str,
    teacher: nn.Module,
    tokenizer: Any,
    sequences: Sequences,
    what: Capture = Capture(),
    *,
    batch: int = 8,
    progress: bool = True,
    vocabulary: int | None = None,
) -> TeacherCache:
    """The cache of `teacher` on `sequences` (lists of token ids, or a tensor (S, L)), made or resumed in a folder of the store.

    root: the store's folder. teacher: a causal model with transformers' names, run in evaluation mode. A killed capture goes on after
    the last finished batch; a finished one is only opened. `vocabulary` cuts padded embedding rows off.
    """
    lengths = [len(ids) for ids in sequences]
    if min(lengths, default=0) < 2:
        raise UserError("A teacher cache needs sequences of at least two tokens: the first token alone predicts nothing here.")
    head = head_of(teacher)
    words = min(vocabulary or head.weight.shape[0], head.weight.shape[0])
    columns = _columns(what, words, head.weight.shape[1])
    meta: dict[str, Any] = {
        "teacher": model_hash(teacher), "tokenizer": fingerprint(tokenizer), "text": text_hash(sequences), "capture": asdict(what),
        "vocabulary": words, "lengths": lengths, "columns": columns, "head": {"scale": head.scale, "cap": head.cap},
        "token_dtype": _id_dtype(1 + max(int(np.max(np.asarray(ids))) for ids in sequences)),
    }  # fmt: skip
    key = hashlib.sha256(json.dumps({k: v for k, v in meta.items() if k != "lengths"}, sort_keys=True).encode()).hexdigest()[:16]
    folder = Path(root) / f"teacher-cache-{key}"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if (folder / "meta.json").exists():
            return TeacherCache(folder)
        np.concatenate([np.asarray(ids) for ids in sequences]).astype(meta["token_dtype"]).tofile(folder / "tokens.bin")
        if what.kind == "states":
            kept = {"weight": head.weight} | ({} if head.bias is None else {"bias": head.bias})
            save_file({k: v.detach()[:words].half().contiguous() for k, v in kept.items()}, folder / "head.safetensors")
        _run(folder, teacher, sequences, lengths, what, columns, words, batch, progress)
        write_atomic(folder / "meta.json", json.dumps(meta))
        (folder / "done.json").unlink(missing_ok=True)
    return TeacherCache(folder)


def _run(
    folder: Path, teacher: nn.Module, sequences: Sequences, lengths: list[int], what: Capture, columns: dict[str, tuple[str, int]],
    words: int, batch: int, progress: bool,
) -> None:  # fmt: skip
    finished = json.loads((folder / "done.json").read_text()) if (folder / "done.json").exists() else 0
    starts = np.concatenate([[0], np.cumsum(np.asarray(lengths) - 1)])
    files = {name: (folder / f"{name}.bin").open("r+b" if finished else "wb") for name in columns}
    bar = tqdm(total=int(starts[-1]), initial=int(starts[finished]), unit="token", desc="teacher cache", disable=not progress)
    try:
        for name, (dtype, width) in columns.items():  # a batch written but not recorded is written again
            files[name].seek(int(starts[finished]) * width * np.dtype(dtype).itemsize)
        for first in range(finished, len(lengths), batch):
            part = [torch.as_tensor(sequences[i]) for i in range(first, min(first + batch, len(lengths)))]
            with eval_mode(teacher):
                read = _read(teacher, part, what, words, torch.Generator().manual_seed(what.seed * 1_000_003 + first))
            for name, values in read.items():
                files[name].write(values.numpy().astype(columns[name][0]).tobytes())
            for file in files.values():
                file.flush()
            write_atomic(folder / "done.json", json.dumps(first + len(part)))
            bar.update(sum(len(ids) - 1 for ids in part))
    finally:
        bar.close()
        for file in files.values():
            file.close()


@torch.no_grad()
def _read(teacher: nn.Module, part: list[Tensor], what: Capture, words: int, generator: torch.Generator) -> dict[str, Tensor]:
    """The columns' values for every predicted position of a batch, one sequence after the other."""
    device = next(teacher.parameters()).device
    ids = nn.utils.rnn.pad_sequence(part, batch_first=True).to(device)
    mask = nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in part], batch_first=True).to(device)
    hidden = teacher.base_model(input_ids=ids, attention_mask=mask).last_hidden_state  # type: ignore[operator]
    states = hidden[:, :-1][mask[:, 1:].bool()]
    if what.kind == "states":
        return {"states": states.float().cpu()}
    head = head_of(teacher)
    following = ids[:, 1:][mask[:, 1:].bool()]
    chunks = [
        _columns_of((head.logits(rows)[:, :words].float() / what.temperature).log_softmax(-1), what, generator, label)
        for rows, label in zip(states.split(256), following.split(256))
    ]
    return {name: torch.cat([chunk[name] for chunk in chunks]) for name in chunks[0]}


def _columns_of(log_probs: Tensor, what: Capture, generator: torch.Generator, following: Tensor | None = None) -> dict[str, Tensor]:
    if following is not None and what.kind == "text":
        return {"text": log_probs.gather(-1, following.unsqueeze(-1)).cpu()}
    if what.kind == "full":
        return {"log_probs": log_probs.clamp(min=-60_000).cpu()}  # -inf would survive, but not a float16 overflow
    if what.kind == "topk":
        values, ids = log_probs.topk(what.size)
        return {"ids": ids.cpu(), "log_probs": values.cpu(), "log_tail": log_leftover(values).unsqueeze(-1).cpu()}
    proposal = (log_probs * what.kappa).log_softmax(-1).cpu()
    ids = torch.multinomial(proposal.exp(), what.size, replacement=True, generator=generator)
    weights = (log_probs.cpu() - proposal).gather(-1, ids).exp() / what.size
    return {"ids": ids} if what.kappa == 1 else {"ids": ids, "weights": weights}


def _columns(what: Capture, words: int, width: int) -> dict[str, tuple[str, int]]:
    ids, number = _id_dtype(words), "<f2"
    match what.kind:
        case "topk" if what.size >= words:
            raise UserError(f"The {what.size} likeliest of {words} words leave no rest: use kind 'full'.")
        case "topk":
            return {"ids": (ids, what.size), "log_probs": (number, what.size), "log_tail": (number, 1)}
        case "sampled":
            return {"ids": (ids, what.size)} | ({} if what.kappa == 1 else {"weights": (number, what.size)})
        case "states" | "full" | "text" if what.temperature != 1:
            raise UserError(f"A cache of kind {what.kind!r} is captured at temperature 1.")
        case "states":
            return {"states": (number, width)}
        case "text":
            return {"text": ("<f4", 1)}
        case _:
            return {"log_probs": (number, words)}


def _id_dtype(words: int) -> str:
    return "<u2" if words <= 2**16 else "<u4"
