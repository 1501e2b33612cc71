"""A classifier that leaves early: heads at its exits, gates that decide, the multiply-adds and the file of both.

The gates are those of JEI-DNN (Regol et al. 2024, arXiv 2310.09163), or a threshold on one of the numbers that they see.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from stillroom.adapt.exits import Exits
from stillroom.core.errors import UserError
from stillroom.metrics.classification import accuracy

Rule = Callable[[int, Tensor, Tensor], Tensor]
"""rule(exit, logits (b, C), rows (b,)) -> which of these rows of the batch leave here, (b,) bool; called exit by exit."""
Score = Literal["p_max", "entropy", "margin", "squares"]
SCORES: dict[Score, tuple[int, float]] = {"p_max": (0, 1.0), "entropy": (1, -1.0), "margin": (2, 1.0), "squares": (3, -1.0)}
"""Place of each number in `confidence`, and the sign that makes it grow with confidence."""


def whole(logits: Tensor) -> Tensor:
    """At least in float32: softmaxes and losses of bfloat16 logits are too coarse to choose by."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def confidence(logits: Tensor) -> Tensor:
    """(..., C) -> (..., 4): of p = softmax(logits) the largest, the entropy in nats, the largest minus the second, and the entropy of
    p^2 / sum p^2; of logits in half precision in float32."""
    p = whole(logits).softmax(-1)
    first, second = p.topk(2, -1).values.unbind(-1)
    squares = p.square()
    squares = squares / squares.sum(-1, keepdim=True)
    return torch.stack([first, torch.special.entr(p).sum(-1), first - second, torch.special.entr(squares).sum(-1)], -1)


class Heads(nn.Module):
    """One linear layer per exit: features [(B, d_l)] to logits [(B, C)], in float32 whatever autocast does."""

    def __init__(self, widths: Sequence[int], classes: int):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, classes) for width in widths)

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        return [whole(layer(feature)) for layer, feature in zip(self.layers, features, strict=True)]


class Gates(nn.Module):
    """One linear layer per exit on the four numbers of `confidence`: logits (B, G, C), which get no gradient, to gate logits (B, G)."""

    def __init__(self, exits: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(exits, 4).uniform_(-0.5, 0.5))
        self.bias = nn.Parameter(torch.empty(exits).uniform_(-0.5, 0.5))

    def forward(self, logits: Tensor) -> Tensor:
        return (confidence(logits.detach()) * self.weight).sum(-1) + self.bias

    def rule(self, count: int, device: torch.device) -> Rule:
        """Leave at the first exit whose probability, given that none before was taken, is at least one half."""
        total, survival = torch.zeros(count, device=device), torch.ones(count, device=device)

        def leaves(exit: int, logits: Tensor, rows: Tensor) -> Tensor:
            # As in `forward`, and no product of matrices, which autocast would make bfloat16.
            g = torch.sigmoid((confidence(logits) * self.weight[exit]).sum(-1) + self.bias[exit])
            p = torch.minimum(g, 1 - total[rows]).clamp_min(0)
            conditional = (p / survival[rows].clamp_min(1e-12)).clamp(0, 1)
            total[rows] += g
            survival[rows] *= 1 - conditional
            return conditional >= 0.5

        return leaves


@dataclass(frozen=True)
class Threshold:
    """Leave at the first exit whose score is at least `value` (scores of entropies are negated)."""

    score: Score
    value: float

    def rule(self, count: int, device: torch.device) -> Rule:
        place, sign = SCORES[self.score]
        return lambda exit, logits, rows: sign * confidence(logits)[..., place] >= self.value


class WarmUp:
    """Where the warm-up of the heads stands: per exit its best validation accuracy and weights, and whether it rests."""

    def __init__(self, heads: Heads):
        self.heads, self.best = heads, copy.deepcopy(heads)
        exits = len(heads.layers)  # on the host, where a loop can ask for them without waiting for the device
        self.accuracy, self.stale = torch.full((exits,), -1.0, dtype=torch.float64), torch.zeros(exits, dtype=torch.int64)
        self.resting, self.ended = torch.zeros(exits, dtype=torch.bool), torch.tensor(-1)

    @property
    def active(self) -> bool:
        return int(self.ended) < 0

    def end_epoch(self, logits: Tensor, labels: Tensor, step: int, last: bool, patience: int) -> None:
        """By validation logits (N, G + 1, C): exits that stopped improving get their best weights back and rest; when all do, the end."""
        for exit in range(len(self.accuracy)):
            layers = self.heads.layers[exit], self.best.layers[exit]
            if self.resting[exit]:
                continue
            if (reached := accuracy(logits[:, exit], labels)) > self.accuracy[exit]:
                self.accuracy[exit], self.stale[exit] = reached, 0
                layers[1].load_state_dict(layers[0].state_dict())
                continue
            self.stale[exit] += 1
            if self.stale[exit] >= patience:
                layers[0].load_state_dict(layers[1].state_dict())
                self.resting[exit] = True
        if last or self.resting.all():
            self.ended.fill_(step)

    def state_dict(self) -> dict[str, Any]:
        return {k: getattr(self, k) for k in ("accuracy", "stale", "resting", "ended")} | {"best": self.best.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for key in ("accuracy", "stale", "resting", "ended"):
            getattr(self, key).copy_(state[key])
        self.best.load_state_dict(state["best"])


def exit_probabilities(g: Tensor) -> Tensor:
    """Gate outputs in [0, 1] (B, G) to the probability of each exit (B, G + 1), the last being the net's own head.

    P_l = max(0, min(g_l, 1 - sum_{j<l} g_j)): the running sum is of the raw g_j.
    """
    p = torch.minimum(g, 1 - (g.cumsum(-1) - g)).clamp_min(0)
    return torch.cat([p, 1 - p.sum(-1, keepdim=True)], -1)


def exits_taken(gates: Gates | Threshold, logits: Tensor) -> Tensor:
    """The exit (N,) that each image takes, from the logits of all exits (N, G, C); G is the net's own head."""
    count, exits, _ = logits.shape
    rule, rows = gates.rule(count, logits.device), torch.arange(count, device=logits.device)
    taken = torch.full_like(rows, exits)
    for exit in range(exits):
        taken[rule(exit, logits[:, exit], rows) & (taken == exits)] = exit
    return taken


class EarlyExit(nn.Module):
    """Images to logits, each computed only as deep as its gate asks for."""

    def __init__(self, exits: Exits, heads: Heads, gates: Gates | Threshold):
        super().__init__()
        self.exits, self.heads, self.gates = exits, heads, gates

    def forward(self, images: Tensor, stop: int | None = None) -> Tensor:
        """(B, C). With `stop` every image leaves at that exit; the work is that of any image that leaves there."""
        return self.infer(images, stop)[0]

    @torch.no_grad()
    def infer(self, images: Tensor, stop: int | None = None) -> tuple[Tensor, Tensor]:
        """Logits (B, C) and the exit (B,) that each image took."""
        rule = self.gates.rule(len(images), images.device)

        def decide(exit: int, features: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
            logits = self.heads.layers[exit](features)
            leaves = rule(exit, logits, rows)
            return logits, leaves if stop is None else torch.full_like(leaves, exit == stop)

        return self.exits.lazily(images, decide)

    def at(self, exit: int) -> nn.Module:
        """A module in which every image leaves at this exit, for timing."""
        return _At(self, exit)

    @torch.no_grad()
    def multiply_adds(self, image: Tensor) -> Tensor:
        """(G + 1,) float64: multiplications of matrix products and convolutions for one image (1, C, H, W) that leaves at each exit, heads
        on the way included; the last is the whole net with all exits."""
        from torch.utils.flop_counter import FlopCounterMode

        counts: list[int] = []
        with FlopCounterMode(display=False) as counter:

            def decide(exit: int, features: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
                logits = self.heads.layers[exit](features)
                counts.append(counter.get_total_flops() // 2)
                return logits, torch.zeros_like(rows, dtype=torch.bool)

            self.exits.lazily(image, decide)
        return torch.tensor([*counts, counter.get_total_flops() // 2], dtype=torch.float64)

    def save(self, folder: Path, **facts: Any) -> None:
        """exits.safetensors and exits.json (exits, gate, and `facts`) beside the net's own files."""
        tensors = {f"heads.{k}": v for k, v in self.heads.state_dict().items()}
        tensors |= {f"gates.{k}": v for k, v in self.gates.state_dict().items()} if isinstance(self.gates, Gates) else {}
        save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, folder / "exits.safetensors")
        gate = "learned" if isinstance(self.gates, Gates) else asdict(self.gates)
        (folder / "exits.json").write_text(json.dumps({"exits": self.exits.paths, "gate": gate, **facts}, indent=2) + "\n")

    @classmethod
    def load(cls, folder: str | Path, net: nn.Module) -> EarlyExit:
        """What `save` wrote, around its net (`hub.load_classifier("run:FOLDER", …)` gives it). UserError when files are missing."""
        folder = Path(folder)
        try:
            facts, tensors = json.loads((folder / "exits.json").read_text()), load_file(folder / "exits.safetensors")
            weights = [tensors[f"heads.layers.{exit}.weight"] for exit in range(len(facts["exits"]))]
            heads = Heads([weight.shape[1] for weight in weights], len(weights[0]))
            gates = Gates(len(weights)) if facts["gate"] == "learned" else Threshold(**facts["gate"])
            heads.load_state_dict({k.removeprefix("heads."): v for k, v in tensors.items() if k.startswith("heads.")})
            if isinstance(gates, Gates):
                gates.load_state_dict({k.removeprefix("gates."): v for k, v in tensors.items() if k.startswith("gates.")})
            return cls(Exits(net, facts["exits"]), heads, gates).eval()
        except (OSError, ValueError, KeyError, IndexError, AttributeError) as error:
            raise UserError(f"{folder} holds no early-exit student of this net ({error}).") from error


class _At(nn.Module):
    def __init__(self, student: EarlyExit, exit: int):
        super().__init__()
        self.student, self.exit = student, exit

    def forward(self, images: Tensor) -> Tensor:
        return self.student(images, self.exit)
