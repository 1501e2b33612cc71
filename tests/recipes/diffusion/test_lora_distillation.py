"""LoRA-enhanced distillation: one network in two roles, target and loss by hand, bytes held, both arms by trace, resume."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from stillroom.adapt import lora
from stillroom.core.errors import UserError
from stillroom.core.run import Run
from stillroom.diffusion.denoiser import Denoiser
from stillroom.diffusion.processes import VP, Flow
from stillroom.diffusion.worlds import saved
from stillroom.nets.denoisers import PointNet
from stillroom.recipes.diffusion import lora_distillation as recipe
from stillroom.recipes.diffusion.lora_distillation import Config, distillation_loss, guided_target, held_bytes, times_of, undistilled
from stillroom.testing import assert_grads, trace
from tests.diffusion.tiny import untrained
from tests.recipes.common import assert_resumes

QUICK: dict[str, Any] = {"updates": 3, "batch": 16, "evaluate": 12}


def classes() -> Any:
    return untrained("classes", width=16, depth=2)


def base(dropout: float = 0.0) -> Denoiser:
    torch.manual_seed(0)
    return Denoiser(PointNet(2, 16, 2, 4, dropout), VP(time_scale=1e-3), "eps")


def test_the_target_is_the_guided_raw_output_without_gradient() -> None:
    net, x, t, cond = base(), torch.randn(5, 2), torch.full((5,), 400.0), torch.tensor([0, 1, 2, 3, 0])
    null, conditional = net.raw(x, t, torch.full((5,), -1)), net.raw(x, t, cond)
    target = guided_target(net, -1, 4.0, x, t, cond)
    torch.testing.assert_close(target, null + 4 * (conditional - null))
    assert not target.requires_grad
    loss = distillation_loss(net, x, t, cond, target)
    torch.testing.assert_close(loss, (conditional - target).square().mean(1))
    assert loss.dtype == torch.float32
    half = distillation_loss(copy.deepcopy(net).to(torch.bfloat16), x.to(torch.bfloat16), t, cond, target)
    assert half.dtype == torch.float32


def test_gradient_goes_to_the_adapters_alone() -> None:
    net = lora.add(base(), 2)
    x, t, cond = torch.randn(5, 2), torch.full((5,), 400.0), torch.tensor([0, 1, 2, 3, 0])
    assert_grads(distillation_loss(net, x, t, cond, x).mean(), to=[net.net.blocks[0].first.up], not_to=[net.net.enter])  # type: ignore[index, union-attr]


def test_the_teacher_is_the_student_without_adapters_and_dropout() -> None:
    student = lora.add(base(dropout=0.8), 2).train()
    plain = base().eval()
    with torch.no_grad():
        for p in student.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p))
    x, t, cond = torch.randn(5, 2), torch.full((5,), 400.0), torch.tensor([0, 1, 2, 3, 0])
    with undistilled(student, None) as teacher:
        assert teacher is student
        assert torch.equal(teacher.raw(x, t, cond), plain.raw(x, t, cond))
    assert student.training
    with undistilled(student, plain) as teacher:
        assert teacher is plain


def test_times_are_whole_steps_of_a_discrete_process_or_the_way_of_another() -> None:
    t = times_of(VP(steps=10), 4000, torch.device("cpu"))
    assert sorted(t.unique().tolist()) == list(range(10))
    assert t.dtype == torch.float64
    t = times_of(Flow(), 4000, torch.device("cpu"))
    assert float(t.min()) < 0.01 < 0.99 < float(t.max())


def test_bytes_are_counted_once_and_thrice_where_they_learn() -> None:
    first, second = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2).requires_grad_(False)
    assert held_bytes([first]) == 3 * 4 * 8
    assert held_bytes([first, second, second]) == 3 * 4 * 8 + 4 * 8
    net = torch.nn.Sequential(first, torch.nn.BatchNorm1d(2))
    assert held_bytes([net]) == 12 * (8 + 4) + 2 * 2 * 4 + 8


def test_the_shared_network_by_its_trace(run: Run) -> None:
    """Each step asks the one network twice: without gradient as the teacher on both conditions, with gradient as the student."""
    seen = trace(recipe, run, {**QUICK, "guidance": 3.0}, ["guided_target", "distillation_loss"], setting=classes())
    assert [u.roles for u in seen.updates()] == [("student",)] * 3
    assert list(seen.nets) == ["student"]  # no second network
    assert set(seen.updates()[0].moved) == {"student"}
    student = seen.nets["student"]
    frozen = {name: p for name, p in student.named_parameters() if not p.requires_grad}
    assert frozen
    assert all(any(torch.equal(p, old) for old in seen.first["student"]) for p in frozen.values())
    for update, target, loss in zip(seen.updates(), seen.calls("guided_target"), seen.calls("distillation_loss"), strict=True):
        assert target.args[1:3] == (-1, 3.0)
        x, t, cond = target.args[3:6]
        assert all(torch.equal(a, b) for a, b in zip(loss.args[1:4], (x, t, cond)))
        assert torch.equal(loss.args[4], target.result)
        assert torch.equal(update.parts["loss"], loss.result)
        assert len(t.unique()) > 4
        assert float(x.std()) > 0.5
    calls = [c for c in seen.calls("student") if c.grad]
    assert len(calls) == 3
    assert all(c.training for c in calls)
    (first, *_), before = seen.calls("guided_target"), classes()
    with lora.off(student), torch.no_grad():  # bit-identical after training
        assert torch.equal(guided_target(student, -1, 3.0, *first.args[3:6]), first.result)
    layers = [m for m in student.modules() if isinstance(m, lora.Lora)]
    assert {(layer.rank, layer.factor) for layer in layers} == {(4, 1.0)}
    assert before.null == -1


def test_noised_data_are_at_their_time(run: Run) -> None:
    """Without noise what the network sees is alpha x0, x0 on the circle of the classes."""
    setting = classes()
    setting.noise_like = lambda x, cond=None: torch.zeros_like(x)
    seen = trace(recipe, run, {**QUICK, "batch": 512, "updates": 1}, ["guided_target"], setting=setting)
    x, t, _ = seen.calls("guided_target")[0].args[3:6]
    radius = (x / VP().alpha(t).float()[:, None]).norm(dim=1)
    assert float(radius.mean()) == pytest.approx(1.54, abs=0.1)


def test_full_distillation_trains_all_weights_against_a_teacher_apart(run: Run) -> None:
    seen = trace(recipe, run, {**QUICK, "train": "all"}, ["guided_target"], setting=classes())
    assert all(torch.equal(a, b) for a, b in zip(seen.first["student"], seen.first["frozen 0"]))
    assert all(p.requires_grad for p in seen.nets["student"].parameters())
    assert not seen.moved("frozen 0")
    assert {c.args[0] is seen.nets["frozen 0"] for c in seen.calls("guided_target")} == {True}
    assert seen.metrics["held_share"] == 1.0


def test_the_lora_arm_holds_less_and_nothing_learned_closes_no_gap(run: Run) -> None:
    seen = trace(recipe, run, {**QUICK, "updates": 0}, setting=classes())
    assert seen.metrics["gap_closed"] == pytest.approx(0.0, abs=1e-6)
    student = seen.nets["student"]
    few = sum(p.numel() for p in student.parameters() if p.requires_grad)
    buffers = sum(b.numel() for b in student.buffers())
    rest = sum(p.numel() for p in student.parameters()) - few + buffers
    assert seen.metrics["held_bytes"] == 4 * (rest + 3 * few)
    assert seen.metrics["held_share"] == pytest.approx((rest + 3 * few) / (4 * rest - 2 * buffers))
    rows = {row["name"]: row for row in run.rows}
    assert rows["guidance, two passes"]["evaluations"] == 2 * rows["student"]["evaluations"] == 8
    assert rows["no guidance"]["sample_error"] == pytest.approx(seen.metrics["sample_error"], rel=1e-4)


def test_the_scale_slides_to_no_guidance_and_the_student_is_saved_merged(tmp_path: Path, run: Run) -> None:
    found = {}
    for scale in (0.0, 1.0):
        with Run(tmp_path / str(scale), engine=run.engine, store=run.store, plots=False) as other:
            seen = trace(recipe, other, {**QUICK, "updates": 20, "scale": scale}, setting=classes())
            found[scale] = seen.metrics
    assert found[0.0]["gap_closed"] == pytest.approx(0.0, abs=1e-6)
    assert found[1.0]["sample_error"] != found[0.0]["sample_error"]
    loaded, student = saved(tmp_path / "1.0"), seen.nets["student"]
    x, cond = torch.randn(4, 2), torch.tensor([0, 1, 2, 3])
    torch.testing.assert_close(loaded.net.raw(x, 300.0, cond), student.raw(x, 300.0, cond))
    assert len(loaded.times) == 5


def test_without_data_the_guided_teachers_samples_stand_for_them(run: Run) -> None:
    setting = classes()
    setting.real = False
    seen = trace(recipe, run, {**QUICK, "bank": 5, "updates": 1}, setting=setting)
    assert seen.nets["frozen 0"].weight == 4.0
    assert (run.store.folder / next(run.store.folder.glob("pairs-*/")).name).exists()


def test_width_is_the_embedded_bases(run: Run) -> None:
    seen = trace(recipe, run, {**QUICK, "updates": 0, "width": 12})
    assert seen.nets["net"].net.spec["width"] == 12  # the pre-trained network itself


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": "all", "rank": 8}, "are LoRA's"),
        ({"train": "all", "scale": 0.5}, "are LoRA's"),
        ({"guidance": 1.0}, "nothing to distil"),
        ({"teacher": "ring", "width": 8}, "--width 8"),
        ({"teacher": "ring"}, "by no second pass"),
    ],
)
def test_flags_that_would_do_nothing_are_refused(run: Run, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        recipe.main(Config(**changes), run)


def test_a_killed_run_ends_bitwise_where_an_uninterrupted_one_does(tmp_path: Path) -> None:
    assert_resumes("lora-distillation", tmp_path, 2, QUICK, setting=classes())
