"""How a language model learns from rows of tokens: what every loop of a language recipe does at each step."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from stillroom.core.run import Run
from stillroom.data.sequences import Rows, shuffled
from stillroom.lm.chunked import chunked_loss
from stillroom.lm.output import OutputLayer, head
from stillroom.lm.text import states
from stillroom.losses.tokens import align


def predicting(run: Run, net: nn.Module, batch: Rows) -> tuple[Tensor, OutputLayer, Tensor]:
    """States (N, d) of all positions of a batch that predict a token, the output layer, and the labels (N,) of what they predict: what
    `chunked_loss` reads."""
    hidden, labels = align(states(net, batch), batch.labels.to(run.device))
    return hidden, head(run.unwrap(net)), labels


def taken(run: Run, rows: Rows, size: int, step: int) -> tuple[Tensor, Rows]:
    """This process's share of the batch of a step: which rows, and the rows. Every epoch has its own order."""
    index = run.shard(shuffled(len(rows), size, run.seed, step))
    return index, rows.take(index.cpu())


def sft(run: Run, net: nn.Module, optimizer: torch.optim.Optimizer, rows: Rows, steps: int, batch_size: int) -> None:
    """Supervised fine-tuning: the cross-entropy of the trained tokens, of which each weighs the same in the whole effective batch."""
    for step in run.steps(steps):
        _, batch = taken(run, rows, batch_size, step)
        out = chunked_loss(*predicting(run, net, batch), ce_weight=1.0)
        run.update(optimizer, ce=out.loss, count=out.tokens)
