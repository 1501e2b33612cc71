import torch
from torch import nn

from stillroom.adapt.pool import Pool
from stillroom.core.optim import Optimizer

SGD = Optimizer("sgd", 0.1, weight_decay=1e-3)
X, Y = (torch.randn(6, n, generator=torch.Generator().manual_seed(n)) for n in (4, 3))


def small() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))


def pool(lifetime: int = 3) -> Pool:
    return Pool(small, SGD, 2, lifetime, seed=0, device="cpu")


def test_age_restarts_at_zero_with_the_network_and_its_optimizer():
    """The published code leaves the counter, so that an expired slot is renewed at every later draw."""
    one, ages = pool(), []
    start = one.nets[0][0].weight.detach().clone()
    for _ in range(9):
        one.advance(0, X, Y)
        ages.append(one.ages[0])
    assert ages == [1, 2, 3, 0, 1, 2, 3, 0, 1]
    assert one.births == [2, 0]
    assert one.ages[1] == 0
    fresh = pool()
    for _ in range(4):
        fresh.advance(0, X, Y)
    assert not torch.equal(fresh.nets[0][0].weight, start)  # another birth, other weights
    assert not fresh.optimizers[0].state_dict()["state"]  # no momentum of the dead


def test_all_processes_hold_the_same_pool():
    torch.manual_seed(1)
    one = pool()
    torch.manual_seed(2)
    two = pool()
    for slot in (0, 0, 1, 0, 0, 0):
        one.advance(slot, X, Y)
        torch.rand(3)
        two.advance(slot, X, Y)
    assert all(torch.equal(a, b) for m, n in zip(one.nets, two.nets) for a, b in zip(m.state_dict().values(), n.state_dict().values()))
    assert not torch.equal(one.nets[0][0].weight, one.nets[1][0].weight)


def test_a_restored_pool_goes_on_bitwise(tmp_path):
    straight, killed = pool(), pool()
    for _ in range(5):
        straight.advance(0, X, Y)
        killed.advance(0, X, Y)
    torch.save(killed.state_dict(), tmp_path / "pool.pt")
    resumed = pool()
    resumed.load_state_dict(torch.load(tmp_path / "pool.pt", weights_only=True))
    for _ in range(6):
        straight.advance(0, X, Y)
        resumed.advance(0, X, Y)
    assert resumed.ages == straight.ages
    assert all(torch.equal(a, b) for a, b in zip(straight.nets[0].state_dict().values(), resumed.nets[0].state_dict().values()))


def test_outer_step_sees_running_statistics_and_pool_steps_change_them():
    one = pool()
    before = one.nets[0][1].running_mean.clone()
    net = one.frozen(0)
    net(X)
    assert torch.equal(net[1].running_mean, before)
    assert not any(p.requires_grad for p in net.parameters())
    torch.testing.assert_close(net(X)[:1], net(X[:1]))  # an image's output does not depend on its batch
    one.advance(0, X, Y)
    assert not torch.equal(one.nets[0][1].running_mean, before)
