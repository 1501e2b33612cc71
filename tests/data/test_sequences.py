"""The procedural language."""

import torch

from stillroom.data.sequences import BackCopy


def test_back_copy_follows_its_own_rule():
    source = BackCopy()
    ids = source.draw(400, 32, torch.Generator().manual_seed(0))
    after = source.is_trigger(ids[:, 1:-1])
    assert (ids[:, 2:][after] == ids[:, :-2][after]).all()
    assert source.log_probs(ids).isfinite().all()
    free = ~source.is_trigger(ids[:, :-1])
    counts = torch.zeros(64, 64).index_put_((ids[:, :-1][free], ids[:, 1:][free]), torch.tensor(1.0), accumulate=True)
    seen = counts.sum(-1) > 100
    assert (counts / counts.sum(-1, keepdim=True) - source.table())[seen].abs().max() < 0.15
