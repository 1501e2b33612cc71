"""LoRA: nothing at first, the low-rank product afterwards, off and between, merged, moved and saved; on linear and convolutional layers."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from stillroom.adapt import lora
from stillroom.core.errors import UserError
from stillroom.nets.denoisers import PointNet, UNet


def nets() -> list[tuple[nn.Module, torch.Tensor]]:
    torch.manual_seed(0)
    return [
        (nn.Linear(6, 4).double(), torch.randn(3, 6).double()),
        (nn.Conv2d(4, 6, 3, padding=1, stride=2).double(), torch.randn(2, 4, 8, 8).double()),
        (nn.Conv2d(4, 8, 3, groups=2, bias=False).double(), torch.randn(2, 4, 8, 8).double()),
    ]


def moved(net: nn.Module) -> nn.Module:
    with torch.no_grad():
        for p in net.parameters():
            if p.requires_grad:
                p.add_(0.3 * torch.randn_like(p))
    return net


@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_layer_starts_as_it_was_and_is_merged_as_it_ends(at: int) -> None:
    base, x = nets()[at]
    net = lora.add(nn.Sequential(copy.deepcopy(base)), 2, alpha=6)
    assert torch.equal(net(x), base(x))
    assert [p.requires_grad for p in net.parameters()].count(True) == 2
    moved(net)
    on = net(x)
    assert not torch.allclose(on, base(x))
    with lora.off(net):
        assert torch.equal(net(x), base(x))
    with lora.scaled(net, 0.5):
        torch.testing.assert_close(net(x), (on + base(x)) / 2)
    assert torch.equal(net(x), on)
    plain = lora.merge(copy.deepcopy(net))
    assert type(plain[0]) is type(base)  # type: ignore[index]
    torch.testing.assert_close(plain(x), on)


def test_the_product_and_its_factor_by_hand() -> None:
    base, x = nets()[0]
    net = moved(lora.add(nn.Sequential(copy.deepcopy(base)), 2, alpha=6))
    layer = net[0]  # type: ignore[index]
    torch.testing.assert_close(net(x) - base(x), 3.0 * x @ layer.down.weight.T @ layer.up.weight.T)
    assert lora.Lora(nn.Linear(4, 4), 2).factor == 1.0
    torch.manual_seed(0)
    assert float(lora.Lora(nn.Linear(400, 4), 8).down.weight.std()) == pytest.approx(1 / 8, rel=0.05)


def test_which_layers_are_adapted() -> None:
    found = lambda net: sorted(path for path, m in net.named_modules() if isinstance(m, lora.Lora))
    hidden = found(lora.add(PointNet(2, 16, 2), 2))
    assert hidden == [f"blocks.{i}.{part}" for i in (0, 1) for part in ("first", "second", "shift")]
    assert found(lora.add(PointNet(2, 16, 2), 2, targets=("enter", "blocks.1.first"))) == ["blocks.1.first", "enter"]
    inside = found(lora.add(UNet(1, 8), 2))
    assert {path.partition(".")[0] for path in inside} == {"down", "middle", "up"}
    with pytest.raises(ValueError, match="no linear or convolutional layer"):
        lora.add(PointNet(2, 16, 2), 2, targets=("nowhere.*",))
    wide = lora.add(PointNet(2, 96, 3), 4)
    assert sum(p.numel() for p in wide.parameters() if p.requires_grad) == 9 * 4 * 2 * 96


def test_adapters_move_between_networks_and_through_files(tmp_path: Path) -> None:
    first, second = (lora.add(UNet(1, 8), 2) for _ in range(2))
    moved(first)
    assert all(name.rpartition(".")[0].rpartition(".")[2] in ("down", "up") for name in lora.state(first))
    assert len(lora.state(first)) == sum(p.requires_grad for p in first.parameters())
    lora.save(first, tmp_path)
    lora.load(second, tmp_path)
    assert all(torch.equal(value, lora.state(second)[name]) for name, value in lora.state(first).items())
    with pytest.raises(UserError, match="another network, rank"):
        lora.load(lora.add(UNet(1, 8), 3), tmp_path)
    with pytest.raises(UserError, match="holds no adapters"):
        lora.load(second, tmp_path / "none")


def test_a_checkpointed_pass_has_the_gradient_of_a_plain_one_though_the_teacher_ran_off() -> None:
    net = moved(lora.add(nn.Sequential(nn.Linear(5, 5), nn.SiLU(), nn.Linear(5, 5)).double(), 2))
    x = torch.randn(3, 5).double()
    gradients = []
    for run in (net, lambda x: checkpoint(net, x, use_reentrant=False)):
        with torch.no_grad(), lora.off(net):
            goal = net(x)
        loss = (run(x) - 2 * goal).square().sum()
        gradients.append(torch.autograd.grad(loss, [p for p in net.parameters() if p.requires_grad]))
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, again)
