"""The output layer of a causal model as a value: what turns its last states into logits, apart from the network."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from stillroom.core.errors import UserError
from stillroom.metrics.modes import eval_mode


class OutputLayer(NamedTuple):
    """Logits z = scale (h W^T + b), soft-capped to cap tanh(z / cap) if there is a cap.

    A bias have Phi and GPT-J, a cap Gemma 2, a scale Cohere and Granite.
    """

    weight: Tensor
    """(V, d)"""
    bias: Tensor | None = None
    """(V,)"""
    scale: float = 1.0
    cap: float = 0.0
    """0: none."""

    @classmethod
    def of(cls, layer: OutputLayer | Tensor) -> OutputLayer:
        """Itself, or the layer that has this weight and nothing else."""
        return layer if isinstance(layer, OutputLayer) else cls(layer)

    def logits(self, states: Tensor) -> Tensor:
        """(N, d) -> (N, V), in the type of the weight: under autocast the states are bfloat16 and the head is not."""
        found = linear(states.to(self.weight.dtype), self.weight, self.bias)
        found = found * self.scale if self.scale != 1 else found
        return self.cap * torch.tanh(found / self.cap) if self.cap else found

    def to(self, device: torch.device | str) -> OutputLayer:
        return self._replace(weight=self.weight.to(device), bias=None if self.bias is None else self.bias.to(device))


def head(net: Any) -> OutputLayer:
    """The output layer of a model. UserError for the gathered copy of a sharded network, whose own weight would not learn."""
    if getattr(net, "gathered", False):
        raise UserError(
            "language recipes use the output layer outside of the network's forward pass, which FSDP2 cannot: use --engine ddp."
        )
    layer, config = net.get_output_embeddings(), getattr(net, "config", None)
    scale = getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1.0)
    return OutputLayer(layer.weight, getattr(layer, "bias", None), scale, getattr(config, "final_logit_softcapping", None) or 0.0)


@torch.no_grad()
def require_head(net: Any, who: str = "this model") -> None:
    """UserError unless the states and the output layer of a causal model give its own logits, as every loss here takes for granted."""
    if not isinstance(getattr(net, "get_output_embeddings", lambda: None)(), nn.Module):
        raise UserError(f"{who} has no output layer of the usual form: a {type(net).__name__} cannot be distilled here.")
    layer = head(net)
    ids = torch.arange(1, 9, device=layer.weight.device)[None] % len(layer.weight)
    with eval_mode(net):
        out = net(input_ids=ids, output_hidden_states=True)
        last = net.base_model(input_ids=ids).last_hidden_state
    ours, theirs = layer.logits(out.hidden_states[-1][0]).float(), out.logits[0].float()
    within = 1e-3 * max(1.0, float(theirs.abs().max()))
    same = ours.shape == theirs.shape and torch.allclose(ours, theirs, rtol=0, atol=within)
    if not (same and torch.allclose(last, out.hidden_states[-1], rtol=0, atol=1e-3 * max(1.0, float(last.abs().max())))):
        raise UserError(
            f"{who}: the logits of {type(net).__name__} are no affine function of its last states with a scale and a soft cap, "
            "which is what the losses here can read: choose a model of another family."
        )
