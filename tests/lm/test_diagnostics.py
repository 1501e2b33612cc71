"""What attention does with its probability, on networks and on numbers made by hand."""

import pytest
import torch

from stillroom.lm.diagnostics import attention_maps, first_token_share, gate_scores, massive_activation, spikes
from stillroom.nets.decoder import Decoder, GateOptions


def test_diagnostics():
    torch.manual_seed(0)
    net, ids = Decoder(20, 16, 2, 2, gate=GateOptions(granularity="headwise")), torch.randint(20, (3, 9))
    maps = attention_maps(net, ids)
    assert [m.shape for m in maps] == [(3, 2, 9, 9)] * 2
    torch.testing.assert_close(maps[0].sum(-1), torch.ones(3, 2, 9))
    assert [s.shape for s in gate_scores(net, ids)] == [(3, 9, 2, 1)] * 2
    assert massive_activation(net, ids) > 0
    weights = torch.zeros(1, 1, 6, 6)
    weights[..., 4, 0], weights[..., 5, 0] = 0.2, 0.6
    assert first_token_share(weights).item() == pytest.approx(0.4)
    assert first_token_share(weights, torch.tensor([False] * 5 + [True])).item() == pytest.approx(0.6)
    assert spikes([1.0, 1.1, 2.0, 1.0, float("nan")]) == 2
