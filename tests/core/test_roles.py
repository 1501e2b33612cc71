"""Updates against closed forms: means, masks, chunks, routing, clipping, moving averages, and the guard against what is not finite."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from stillroom.catalogue import report
from stillroom.core.engine import make
from stillroom.core.errors import UserError
from stillroom.core.optim import Optimizer
from stillroom.core.run import Run
from stillroom.core.store import Store
from stillroom.testing import assert_grads

SGD = Optimizer("sgd", 1.0, momentum=0.0)


def started(folder: Path, precision: str = "fp32", **settings) -> Run:
    return Run(folder, 0, engine=make("local", "cpu", precision), store=Store(folder.parent / "store"), **settings)  # type: ignore[arg-type]


@pytest.fixture
def run(tmp_path: Path):
    with started(tmp_path / "run") as run:
        yield run


def bare(run: Run, values: list[float] | torch.Tensor, name: str = "w", optimizer=SGD):
    return run.trainable(name, nn.Parameter(torch.as_tensor(values, dtype=torch.float64).clone()), optimizer)


# -- the value that is minimised -------------------------------------------------------------------------------------------------
def test_vectors_are_averaged_scalars_taken_as_they_are_and_parts_added(run: Run) -> None:
    weight, optimizer = bare(run, [1.0, 2.0, 3.0])
    for _ in run.steps(1):
        total = run.update(optimizer, vector=weight * torch.tensor([3.0, 6.0, 9.0]), matrix=(2 * weight).expand(4, 3), scalar=5 * weight[0])
    assert total.item() == pytest.approx((3 + 12 + 27) / 3 + 4 + 5)
    assert not total.requires_grad
    assert weight.grad is None
    # d/dw: vector 3/3, 6/3, 9/3; matrix 2/3 each; scalar 5 on the first
    assert weight.tolist() == pytest.approx([1 - (1 + 2 / 3 + 5), 2 - (2 + 2 / 3), 3 - (3 + 2 / 3)])
    (record,) = report.records(run.folder / "metrics.jsonl")
    assert record == {"loop": "train", "step": 0, "w/vector": 14.0, "w/matrix": 4.0, "w/scalar": 5.0}


@pytest.mark.parametrize("count", [2, 2.0, torch.tensor(2), torch.tensor(2.0), torch.tensor([True, True, False]).sum()])
def test_masked_entries_are_left_out_of_the_mean_by_count(run: Run, count) -> None:
    weight, optimizer = bare(run, [1.0, 2.0, 3.0])
    mask = torch.tensor([True, True, False])
    for _ in run.steps(1):
        total = run.update(optimizer, weight.square() * mask, count=count)
    assert total.item() == pytest.approx(2.5)
    assert weight.tolist() == pytest.approx([0.0, 0.0, 3.0])


def test_a_batch_in_which_everything_is_masked_changes_nothing(run: Run) -> None:
    weight, optimizer = bare(run, [1.0, 2.0])
    for _ in run.steps(1):
        assert run.update(optimizer, weight.square() * 0, count=torch.tensor(0)).item() == 0.0
    assert weight.tolist() == [1.0, 2.0]


# -- chunks -----------------------------------------------------------------------------------------------------------------------
MASKS = {
    "even": [1, 1, 1, 1, 1, 1, 1, 1],
    "uneven": [1, 1, 1, 0, 0, 1, 0, 0],
    "an empty chunk": [1, 1, 0, 0, 1, 0, 1, 1],
    "one token": [0, 0, 0, 0, 0, 0, 1, 0],
    "weights": [0.2, 0.1, 0.0, 0.0, 0.05, 0.0, 0.3, 0.0],
    "nothing": [0, 0, 0, 0, 0, 0, 0, 0],
}


@pytest.mark.parametrize("clip", [0.0, 0.05])
@pytest.mark.parametrize("mask", MASKS)
def test_chunks_give_the_gradient_of_the_whole_masked_batch(tmp_path: Path, mask: str, clip: float) -> None:
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(8, 3, 5, generator=generator).double(), torch.randn(8, 3, generator=generator).double()
    keep = torch.tensor(MASKS[mask]).double()[:, None] * torch.tensor([1.0, 1.0, 0.0])  # (samples, tokens)
    start = torch.randn(5, generator=generator).double()

    by_hand = start.clone()
    for _ in range(3):
        if keep.sum():
            gradient = (2 * (x @ by_hand - y) * keep / keep.sum()).flatten() @ x.flatten(0, 1)
            by_hand = by_hand - gradient * (min(1.0, clip / (gradient.norm().item() + 1e-6)) if clip else 1.0)
    for accumulate in (1, 2, 4):
        with started(tmp_path / str(accumulate), accumulate=accumulate) as run:
            weight, optimizer = bare(run, start, optimizer=Optimizer("sgd", 1.0, momentum=0.0, clip=clip))
            for _ in run.steps(3):
                image, target, kept = run.shard((x, y, keep))
                run.update(optimizer, (image @ weight - target).square() * kept, count=kept.sum())
        torch.testing.assert_close(weight.detach(), by_hand, rtol=1e-6, atol=1e-8)  # counts are float32


def test_scalars_of_chunks_are_averaged(tmp_path: Path) -> None:
    with started(tmp_path / "run", accumulate=4) as run:
        weight, optimizer = bare(run, [0.0])
        for _ in run.steps(1):
            run.update(optimizer, weight.sum() * (run.roles.chunk + 1))
    assert weight.item() == pytest.approx(-2.5)


def test_a_batch_that_does_not_divide_is_refused(tmp_path: Path) -> None:
    with (
        started(tmp_path / "run", accumulate=4) as run,
        pytest.raises(UserError, match="batch of 6 does not divide into 1 processes times 4"),
    ):
        run.shard(torch.zeros(6))


# -- who learns -------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("accumulate", [1, 2])
def test_only_the_given_role_learns_and_no_gradient_is_left_behind(tmp_path: Path, accumulate: int) -> None:
    with started(tmp_path / "run", accumulate=accumulate) as run:
        a, a_opt = bare(run, [1.0], "a")
        b, b_opt = bare(run, [1.0], "b")
        c, c_opt = bare(run, [1.0], "c")
        for _ in run.steps(2):  # the second step knows that the losses of `a` reach the others
            run.update(a_opt, (2 * a + 3 * b + 5 * c).sum())
            if run.roles.chunk == 0:
                assert b.grad is c.grad is None
            run.update((b_opt, c_opt), (a.detach() + 7 * b + 11 * c).sum())
    assert [w.item() for w in (a, b, c)] == [-3.0, -13.0, -21.0]
    assert a.grad is b.grad is c.grad is None


def test_a_loss_that_reaches_another_role_only_later_teaches_the_given_one(run: Run) -> None:
    a, a_opt = bare(run, [1.0], "a")
    b, _ = bare(run, [1.0], "b")
    for step in run.steps(3):
        run.update(a_opt, (2 * a + step * b).sum())
        assert b.grad is None
    assert (a.item(), b.item()) == (-5.0, 1.0)


def test_a_role_may_be_updated_twice_in_a_step(run: Run) -> None:
    a, a_opt = bare(run, [1.0], "a")
    bare(run, [1.0], "b")
    for _ in run.steps(1):
        run.update(a_opt, a.square().sum())
        run.update(a_opt, (3 * a).sum())
    assert a.item() == pytest.approx(1 - 2 - 3)


def test_parameters_that_a_loss_does_not_use_stay_as_they_are(run: Run) -> None:
    net, optimizer = run.trainable("net", nn.ModuleDict({"used": nn.Linear(2, 1), "idle": nn.Linear(2, 1)}), Optimizer("adamw", 0.1))
    bare(run, [1.0], "other")
    before = [p.clone() for p in net["idle"].parameters()]
    for _ in run.steps(2):
        run.update(optimizer, net["used"](torch.ones(3, 2)).square())
    assert all(torch.equal(p, q) for p, q in zip(before, net["idle"].parameters(), strict=True))


def test_a_stages_network_does_not_learn_in_the_parents_updates(run: Run) -> None:
    with run.stage("first") as stage:
        w, w_opt = bare(stage, [1.0])
        for _ in stage.steps(1):
            stage.update(w_opt, w.sum())
    v, v_opt = bare(run, [1.0], "v")
    for _ in run.steps(1):
        run.update(v_opt, (v * w).sum())
    assert w.item() == 0.0
    assert v.item() == 1.0


def test_a_network_that_learns_cannot_be_frozen_too(run: Run) -> None:
    """eval() and requires_grad_(False) on a teacher that shares modules with the student would silently stop the student."""
    body = nn.Linear(2, 2)
    student, _ = run.trainable("student", nn.Sequential(body, nn.BatchNorm1d(2)), SGD)
    with pytest.raises(ValueError, match="shares parameters with the trainable role 'student'"):
        run.frozen(nn.Sequential(body, nn.Linear(2, 3)))
    assert student.training
    assert all(p.requires_grad for p in student.parameters())
    run.frozen(nn.Linear(2, 2))


def test_wrong_names_and_foreign_optimizers_are_refused(run: Run) -> None:
    weight, _ = bare(run, [1.0])
    with pytest.raises(ValueError, match="already has something called 'w'"):
        bare(run, [1.0])
    with pytest.raises(ValueError, match="already has something called 'w'"):
        run.track(w=torch.zeros(1))
    with pytest.raises(TypeError, match="cannot track note: a str"):
        run.track(note="text")
    with pytest.raises(ValueError, match="belongs to no role"):
        run.update(torch.optim.SGD([weight], 0.1), weight.sum())
    list(run.steps(1))
    with pytest.raises(ValueError, match="second loop called 'train'"):
        list(run.steps(1))


def test_the_clip_bounds_the_roles_gradient_norm_and_logs_it(run: Run) -> None:
    a, a_opt = bare(run, [0.0, 0.0], "a", Optimizer("sgd", 1.0, momentum=0.0, clip=1.0))
    b, b_opt = bare(run, [0.0, 0.0], "b", Optimizer("sgd", 1.0, momentum=0.0, clip=100.0))
    for _ in run.steps(1):
        run.update((a_opt, b_opt), (torch.tensor([3.0, 4.0]) * (a + b)).sum())
    assert a.tolist() == pytest.approx([-0.6, -0.8], abs=1e-5)
    assert b.tolist() == [-3.0, -4.0]
    (record,) = report.records(run.folder / "metrics.jsonl")
    assert (record["a/gradient norm"], record["b/gradient norm"]) == (5.0, 5.0)


def test_the_learning_rate_follows_the_schedule_of_each_role(run: Run) -> None:
    a, a_opt = bare(run, [0.0], "a", Optimizer("sgd", 1.0, momentum=0.0, schedule="linear"))
    b, b_opt = bare(run, [0.0], "b", lambda p: torch.optim.SGD(p, 0.5))
    for _ in run.steps(4):
        run.update((a_opt, b_opt), (a + b).sum())
    assert a.item() == pytest.approx(-(1 + 0.75 + 0.5 + 0.25))
    assert b.item() == pytest.approx(-2.0)


# -- moving averages --------------------------------------------------------------------------------------------------------------
def norm_net() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).double()


def average(run: Run, steps: int, seen: list[torch.Tensor] | None = None):
    net, optimizer = run.trainable("net", norm_net(), SGD)
    ema = run.ema("ema", net, 0.9)
    for _ in run.steps(steps):
        run.update(optimizer, net(run.shard(torch.randn(8, 3).double())).square())
        ema.update()
        if seen is not None:
            seen.append(net[0].weight.detach().clone())
    return net, ema


def test_ema_is_the_closed_form_with_buffers_copied_and_nothing_shared(run: Run) -> None:
    seen: list[torch.Tensor] = []
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = norm_net()[0].weight.detach().clone()
    torch.set_rng_state(state)
    net, ema = average(run, 7, seen)
    expected = 0.9**7 * first + sum(0.1 * 0.9 ** (6 - i) * w for i, w in enumerate(seen))
    torch.testing.assert_close(ema.net[0].weight, expected, atol=1e-12, rtol=1e-12)
    assert torch.equal(ema.net[1].running_mean, net[1].running_mean)
    assert ema.net[1].num_batches_tracked == 7
    assert net.training
    assert not ema.net.training
    assert not any(p.requires_grad for p in ema.net.parameters())
    assert all(p.requires_grad for p in net.parameters())
    pointers = [{p.data_ptr() for p in [*n.parameters(), *n.buffers()]} for n in (net, ema.net)]
    assert not pointers[0] & pointers[1]
    ema.update(decay=0.0)
    assert torch.equal(ema.net[0].weight, net[0].weight)
    before = ema.net[0].weight.clone()
    with torch.no_grad():
        net[0].weight += 1
    ema.update(decay=1.0)
    assert torch.equal(ema.net[0].weight, before)


def test_ema_resumes_bitwise_and_counts_steps_not_chunks(tmp_path: Path) -> None:
    with started(tmp_path / "a") as run:
        net, ema = average(run, 10)
    with started(tmp_path / "b", save_seconds=0.0) as run, pytest.raises(RuntimeError, match="stop"):
        average(run, 10, Stop(4))
    assert torch.load(tmp_path / "b" / "train.pt", weights_only=True)["step"] == 4
    with started(tmp_path / "b") as run:
        again, other = average(run, 10)
    for one, two in ((net, again), (ema.net, other.net)):
        assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))
    with started(tmp_path / "c", accumulate=2) as run:
        net, optimizer = bare_module(run)
        ema = run.ema("ema", net, 0.5)
        for _ in run.steps(1):
            run.update(optimizer, net(torch.ones(1, 1)).sum())
            ema.update()
    assert ema.net.weight.item() == pytest.approx(0.5 * 1.0 + 0.5 * 0.0)


def bare_module(run: Run):
    net = nn.Linear(1, 1, bias=False)
    nn.init.ones_(net.weight)
    return run.trainable("net", net, SGD)


class Stop(list):
    def __init__(self, after: int):
        super().__init__()
        self.after = after

    def append(self, item) -> None:
        super().append(item)
        if len(self) > self.after:
            raise RuntimeError("stop")


# -- routing ----------------------------------------------------------------------------------------------------------------------
def test_assert_grads_tells_reached_from_not_reached() -> None:
    student, critic, teacher = nn.Linear(2, 2), nn.Linear(2, 1), nn.Linear(2, 2).requires_grad_(False)
    images = torch.zeros(3, 2, requires_grad=True)
    loss = critic(student(images + 1)).mean() + teacher(images).mean()
    assert_grads(loss, to=[student, critic, images], not_to=[teacher])
    assert_grads(critic(student(images).detach()).mean(), to=[critic], not_to=[student, images])
    assert_grads(0 * student(images).mean(), to=[], not_to=[student])  # a gradient of zeros teaches nothing
    with pytest.raises(AssertionError, match="no gradient reaches item 1 of `to` \\(Linear\\)"):
        assert_grads(loss, to=[student, teacher])
    with pytest.raises(AssertionError, match="gradient reaches item 0 of `not_to` \\(Linear\\)"):
        assert_grads(loss, to=[], not_to=[critic])
    with pytest.raises(AssertionError, match="no gradient reaches item 0"):
        assert_grads(teacher(torch.ones(1, 2)).sum(), to=[student])
    loss.backward()  # the graph is still there, and nothing was accumulated meanwhile
    assert student.weight.grad is not None


# -- not finite -------------------------------------------------------------------------------------------------------------------
def test_each_bad_part_is_named_with_its_value(run: Run) -> None:
    weight, optimizer = bare(run, [1.0])

    def loop() -> None:
        for step in run.steps(3):
            bad = float("inf") if step == 2 else 1.0
            run.update(optimizer, ce=weight * bad, kd=weight.sum() * (bad - bad), good=weight.sum())

    with pytest.raises(UserError) as error:
        loop()
    assert str(error.value).startswith("run, step 2: the loss of 'w' is not finite (ce = ")
    assert "kd = nan" in str(error.value)
    assert "good =" not in str(error.value)
    assert "last good checkpoint" in str(error.value)


def test_finite_parts_whose_sum_overflows(run: Run) -> None:
    weight, optimizer = run.trainable("w", nn.Parameter(torch.tensor([3e38])), SGD)
    next(run.steps(1))
    with pytest.raises(UserError, match="sum of finite parts overflows"):
        run.update(optimizer, a=weight.sum(), b=weight.sum())


def test_a_gradient_that_is_not_finite_is_named_when_clipped_and_never_saved(tmp_path: Path) -> None:
    def loop(run: Run, clip: float) -> None:
        weight, optimizer = bare(run, [0.0], optimizer=Optimizer("sgd", 1.0, momentum=0.0, clip=clip))
        for step in run.steps(3):
            run.update(optimizer, weight.sqrt().sum() if step == 1 else 0 * weight.sum())

    for name, clip, message in (("clipped", 1.0, "gradient norm = "), ("free", 0.0, "parameters of 'w' are not finite")):
        with started(tmp_path / name, save_seconds=0.0) as run, pytest.raises(UserError, match=message):
            loop(run, clip)
        assert torch.load(tmp_path / name / "train.pt", weights_only=True)["step"] == 1


# -- lower precision --------------------------------------------------------------------------------------------------------------
def test_bf16_trains_with_fp32_weights_and_resumes_bitwise(tmp_path: Path) -> None:
    def train(folder: str, stop: int | None = None):
        with started(tmp_path / folder, "bf16", save_seconds=0.0) as run:
            teacher = run.frozen(nn.Linear(4, 3))
            net, optimizer = run.trainable("net", nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), Optimizer(lr=0.05))
            ema = run.ema("ema", net, 0.9)
            losses = []
            for step in run.steps(40):
                if step == stop:
                    return None
                x = torch.randn(32, 4)
                out, target = net(x), teacher(x)
                assert out.dtype == target.dtype == torch.bfloat16
                losses.append(run.update(optimizer, (out - target).float().square().mean(1)).item())
                ema.update()
            assert all(t.dtype == torch.float32 for t in [*net.state_dict().values(), *ema.net.state_dict().values()])
            assert losses[-1] < 0.5 * losses[0]
            return [*net.state_dict().values(), *ema.net.state_dict().values()]

    straight = train("a")
    train("b", stop=11)
    resumed = train("b")
    assert straight
    assert resumed
    assert all(torch.equal(a, b) for a, b in zip(straight, resumed, strict=True))


def test_a_frozen_base_is_not_in_the_checkpoints_and_resumes(tmp_path) -> None:
    def adapted() -> torch.nn.Module:
        net = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 2))
        net[0].requires_grad_(False)
        return net

    def train(folder, steps: int):
        with Run(folder, 0, plots=False, save_seconds=0.0) as run:
            net, optimizer = run.trainable("adapter", adapted(), Optimizer("adamw", 1e-2))
            for step in run.steps(6):
                if step == steps:
                    break
                run.update(optimizer, net(torch.randn(8, 64)).square().mean(1))
        return net

    train(tmp_path / "a", 3)
    saved = torch.load(tmp_path / "a" / "train.pt", weights_only=True)["roles"]["adapter"]["net"]
    assert set(saved) == {"1.weight", "1.bias"}
    assert all(torch.equal(a, b) for a, b in zip(train(tmp_path / "a", 9).parameters(), train(tmp_path / "b", 9).parameters(), strict=True))
