"""What a run gives beside updates: draws that all processes share, values that outlive a kill, weights handed from role to role."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from stillroom.core.engine import make
from stillroom.core.errors import UserError
from stillroom.core.optim import Optimizer
from stillroom.core.roles import blend
from stillroom.core.run import Run
from stillroom.core.store import Store
from tests.core.test_roles import SGD, bare, started


def test_common_draws_are_equal_in_all_chunks_of_a_step_and_differ_between_steps(tmp_path: Path) -> None:
    with started(tmp_path / "a", accumulate=2) as run:
        weight, optimizer = bare(run, [1.0])
        common, own = [], []
        for _ in run.steps(3):
            common.append(float(torch.rand((), generator=run.common)))
            own.append(float(torch.rand(())))
            run.update(optimizer, 0 * weight)
    assert common[0::2] == common[1::2]
    assert len(set(common)) == 3
    assert len(set(own)) == 6
    assert not set(common) & set(own)


def test_common_draws_do_not_know_the_rank(tmp_path: Path) -> None:
    drawn = []
    for rank in (0, 1):
        engine = make("local", "cpu")
        with Run(tmp_path / str(rank), 0, engine=engine, store=Store(tmp_path / "store")) as run:
            run.rank = rank
            weight, optimizer = bare(run, [1.0])
            for _ in run.steps(1):
                drawn.append((float(torch.rand((), generator=run.common)), float(torch.rand(()))))
                run.update(optimizer, 0 * weight)
    assert drawn[0][0] == drawn[1][0]
    assert drawn[0][1] != drawn[1][1]


def test_a_scalar_that_is_a_mean_over_count_weighs_as_much_in_its_chunk(tmp_path: Path) -> None:
    """Two chunks, means over 1 and 3 tokens: the gradient is that of the mean over 4."""
    with started(tmp_path / "a", accumulate=2) as run:
        weight, optimizer = bare(run, [0.0])
        for _ in run.steps(1):
            count = (1, 3)[run.roles.chunk]
            run.update(optimizer, (weight * (5.0, 1.0)[run.roles.chunk]).sum(), count=torch.tensor(count))
    assert weight.item() == pytest.approx(-(1 * 5.0 + 3 * 1.0) / 4)


def test_what_is_kept_is_built_once_and_read_after_a_kill(tmp_path: Path) -> None:
    built = []

    def build() -> dict:
        built.append(1)
        return {"texts": ["a", "ä"], "verdicts": [True, None, 0.5]}

    for _ in range(2):
        with started(tmp_path / "a") as run:
            assert run.kept("traces", build) == {"texts": ["a", "ä"], "verdicts": [True, None, 0.5]}
    assert len(built) == 1
    (tmp_path / "a" / "kept" / "traces.json").write_text("{")
    with started(tmp_path / "a") as run, pytest.raises(UserError, match=r"traces.json is damaged: delete it"):
        run.kept("traces", build)


def test_blend_moves_parameters_by_the_share_and_copies_buffers() -> None:
    target, source = (nn.BatchNorm1d(3).double() for _ in range(2))
    with torch.no_grad():
        source.weight.fill_(5.0)
        source.running_mean.fill_(2.0)
    blend(target, source, 0.25)
    assert target.weight.tolist() == [2.0] * 3
    assert target.running_mean.tolist() == [2.0] * 3
    assert source.weight.tolist() == [5.0] * 3


def test_restart_takes_weights_and_forgets_the_optimizers_memory(run: Run) -> None:
    net, adam = run.trainable("fake", nn.Linear(2, 1), Optimizer("adam", 0.1))
    source = run.frozen(nn.Linear(2, 1))
    for _ in run.steps(2):
        run.update(adam, net(torch.ones(4, 2)).mean())
    run.restart(adam, source)
    assert torch.equal(net.weight, source.weight)
    assert net.weight.requires_grad
    before = net.weight.detach().clone()
    for _ in run.steps(1, "again"):
        run.update(adam, net(torch.ones(4, 2)).mean())
    assert (before - net.weight).detach().flatten().tolist() == pytest.approx([0.1, 0.1])  # Adam's first step, of the size of the rate
    assert not torch.equal(source.weight, net.weight)


def test_a_deep_copy_in_bf16_answers_with_its_own_weights(tmp_path: Path) -> None:
    with started(tmp_path / "a", "bf16") as run:
        net, _ = run.trainable("net", nn.Linear(2, 2), SGD)
        twin = copy.deepcopy(net)
        with torch.no_grad():
            twin.weight.zero_()
            twin.bias.fill_(3.0)
        assert twin(torch.ones(1, 2)).tolist() == [[3.0, 3.0]]
        assert twin(torch.ones(1, 2)).dtype == torch.bfloat16
