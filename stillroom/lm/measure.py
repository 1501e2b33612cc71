"""How good a language model is on a test text, and how near to its teacher."""

from __future__ import annotations

import math

import torch
from torch import nn

from stillroom.data.sequences import Rows
from stillroom.lm.cache import TeacherCache
from stillroom.lm.chunked import chunked_loss
from stillroom.lm.output import head
from stillroom.lm.text import states
from stillroom.losses.tokens import align
from stillroom.metrics.modes import eval_mode


@torch.no_grad()
def measure(net: nn.Module, test: Rows, teacher: TeacherCache | None = None, batch_size: int = 16) -> dict[str, float]:
    """nll and perplexity per trained token of the whole test set, and the KL divergence from the teacher there."""
    ce = kd = count = 0.0
    device = next(net.parameters()).device
    with eval_mode(net):
        for first in range(0, len(test), batch_size):
            batch = test.take(slice(first, first + batch_size))
            hidden, labels = align(states(net, batch), batch.labels.to(device))
            rows = range(first, first + len(batch))
            signal = teacher.signal(rows, width=batch.ids.shape[1], device=device) if teacher else None
            out = chunked_loss(hidden, head(net), labels, signal, ce_weight=1.0)
            tokens = float(out.tokens)
            ce, kd, count = ce + float(out.ce) * tokens, kd + float(out.kd) * tokens, count + tokens
    found = {"nll": ce / count, "perplexity": math.exp(min(ce / count, 50))}
    return found | ({"kl": kd / count} if teacher else {})
