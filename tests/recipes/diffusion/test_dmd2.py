"""dmd2: who learns when, from which samples, at which noise, with which losses; flags; kill and resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import softplus

from stillroom.core.engine import make
from stillroom.core.errors import UserError
from stillroom.core.run import Run
from stillroom.core.store import Store
from stillroom.diffusion.processes import Flow
from stillroom.recipes.diffusion import dmd2
from stillroom.recipes.diffusion.dmd2 import Config
from stillroom.testing import trace
from tests.diffusion.tiny import untrained
from tests.recipes.common import assert_resumes

QUICK: dict[str, Any] = {"updates": 2, "fake_updates": 3, "batch": 64, "evaluate": 16}


def ring(width: int = 16) -> Any:
    return untrained("ring", width=width, depth=2)


def test_the_generator_learns_every_third_iteration_and_first_and_the_fake_always(run: Run) -> None:
    seen = trace(dmd2, run, QUICK, setting=ring())
    assert [(u.step, *u.roles) for u in seen.updates()] == [
        (0, "generator"), (0, "fake", "head"), (1, "fake", "head"), (2, "fake", "head"),
        (3, "generator"), (3, "fake", "head"), (4, "fake", "head"), (5, "fake", "head"),
    ]  # fmt: skip
    assert [u.moved for u in seen.updates()][:2] == [{"generator"}, {"fake", "head"}]
    assert not seen.moved("frozen 0")
    assert [c.step for c in seen.calls("frozen 0")] == [0, 3]


def test_losses_of_a_turn_by_hand(run: Run) -> None:
    changes = {**QUICK, "low": 0.3, "high": 0.6, "gan_weight": 0.2, "discriminator_weight": 0.7}
    seen = trace(dmd2, run, changes, setting=ring())
    turn, learn = seen.updates(None)[:2]
    (made,), (real,) = seen.calls("generator", step=0), seen.calls("frozen 0", step=0)
    score, fooled, denoised, told = seen.calls("fake", step=0)
    assert made.grad
    assert [(c.grad, c.training) for c in (score, fooled, denoised, told)] == [(False, False), (True, False), (True, True), (True, True)]
    x, flow = made.result.x0, Flow()
    noise = lambda call: (call.args[0] - (1 - call.args[1][:, None].float()) * x) / call.args[1][:, None].float()
    for call in (score, fooled, denoised, told):
        assert 0.3 <= float(call.args[1].min()) <= 0.4
        assert 0.5 <= float(call.args[1].max()) <= 0.6
    assert torch.equal(score.args[0], real.args[0])
    assert torch.equal(score.args[1], real.args[1])
    assert torch.equal(score.args[1], fooled.args[1])
    assert torch.equal(denoised.args[1], told.args[1])
    noises = [noise(call) for call in (score, fooled, denoised)]
    assert all(0.8 < float(eps.std()) < 1.2 and abs(float(eps.mean())) < 0.3 for eps in noises)  # unit noise on the same samples
    assert not torch.allclose(noises[0], noises[1])
    weight = 1 / (x - real.result.x0).abs().mean(1, keepdim=True)
    torch.testing.assert_close(turn.parts["dmd"], 0.5 * (weight * (score.result.x0 - real.result.x0)).square().mean(1))
    first, truth, judged = (c.result for c in seen.calls("head", step=0))
    torch.testing.assert_close(turn.parts["adversarial"], 0.2 * softplus(-first))
    torch.testing.assert_close(learn.parts["discriminator"], 0.7 * (softplus(-truth) + softplus(judged)))
    torch.testing.assert_close(learn.parts["denoising"], (denoised.result - (noises[2] - x)).square().mean(1), rtol=1e-3, atol=1e-4)
    assert flow.noisy == 1.0


def test_the_discriminator_sees_real_data_and_generated_ones(run: Run) -> None:
    """Near the data end what the fake network sees is what it is given: points of the ring, or the generator's."""
    seen = trace(dmd2, run, {**QUICK, "low": 0.01, "high": 0.02}, setting=ring())
    (made,) = seen.calls("generator", step=1)
    denoised, told = seen.calls("fake", step=1)
    assert not made.grad
    torch.testing.assert_close(denoised.args[0], made.result.x0, atol=0.15, rtol=0.05)
    assert bool(((told.args[0].norm(dim=1) - 1.5).abs() < 0.4).all())


def test_backward_simulation_reaches_a_random_step_with_gradient_in_the_last_call_of_a_turn(run: Run) -> None:
    seen = trace(dmd2, run, {**QUICK, "steps": 3, "updates": 6, "gan_weight": 0.0}, setting=ring(8))
    grid, reached = Flow().grid(3), set()
    for step in range(18):
        calls = seen.calls("generator", step=step)[:3] if step < 17 else seen.calls("generator", step=step)
        times = [c.args[1] for c in calls]
        assert times[: len(grid) - 1] == grid[: len(times)][:3]
        if step < 17:
            assert [c.grad for c in calls] == [False] * (len(calls) - 1) + [step % 3 == 0]
            reached.add(len(calls))
    assert reached == {1, 2, 3}
    (first, *later) = next(calls for s in range(17) if len(calls := seen.calls("generator", step=s)) == 3)
    assert not torch.allclose(later[0].args[0], first.args[0])
    fresh = (later[0].args[0] - (1 - grid[1]) * first.result.x0) / grid[1]
    assert 0.7 < float(fresh.std()) < 1.3  # x0 noised anew to the next time
    assert not seen.calls("head")


def test_the_noise_between_steps_is_the_settings_and_without_a_head_the_fake_learns_alone(run: Run) -> None:
    setting = ring(8)
    setting.noise_like = lambda x, cond=None: torch.full_like(x, 0.5)
    seen = trace(dmd2, run, {**QUICK, "steps": 2, "gan_weight": 0.0, "updates": 3, "low": 0.3, "high": 0.6}, setting=setting)
    first, second = next(calls[:2] for s in range(8) if len(calls := seen.calls("generator", step=s)) == 2)
    torch.testing.assert_close(second.args[0], 0.5 * first.result.x0 + 0.25)
    assert seen.steps("fake") == list(range(9))
    assert seen.steps("generator") == [0, 3, 6]
    assert all(u.moved == {"fake"} for u in seen.updates("fake"))
    (asked,) = [c for c in seen.calls("fake", step=1) if c.grad]
    made, t = seen.calls("generator", step=1)[-1].result.x0, asked.args[1][:, None].float()
    torch.testing.assert_close(asked.args[0], (1 - t) * made + 0.5 * t)
    torch.testing.assert_close(seen.updates("fake")[1].parts["denoising"], (asked.result - (0.5 - made)).square().mean(1))
    judged = [c.args[1] for c in seen.calls("generator") if not c.training]
    assert judged == [1.0, 0.5]


def test_every_process_draws_the_same_steps(tmp_path: Path) -> None:
    """Another rank's own generator gives other noises, and the same steps."""
    found = []
    for rank in (0, 1):
        with Run(tmp_path / str(rank), 0, engine=make("local", "cpu"), store=Store(tmp_path / "store"), plots=False) as run:
            run.rank = rank
            run.engine.rank = 0
            seen = trace(dmd2, run, {**QUICK, "steps": 4, "gan_weight": 0.0}, setting=ring(8))
        found.append([[c.args[1] for c in seen.calls("generator", step=s)] for s in range(5)])
        noise = seen.calls("generator", step=0)[0].args[0]
        found[-1].append(noise)
    assert found[0][:-1] == found[1][:-1]
    assert not torch.equal(found[0][-1], found[1][-1])


@pytest.mark.parametrize("name", ["classes", "ring"])
def test_chunks_cut_noise_conditions_and_data_once(tmp_path: Path, name: str) -> None:
    with Run(tmp_path / "run", engine=make("local", "cpu"), store=Store(tmp_path / "store"), accumulate=2, plots=False) as run:
        seen = trace(dmd2, run, {**QUICK, "batch": 8}, setting=untrained(name, width=8))
    for call in [c for c in seen.calls("fake") if c.step < 5]:
        assert len(call.args[0]) == len(call.args[1]) == 4
        assert name == "ring" or len(call.args[2]) == 4


def test_where_a_one_step_student_reads_the_network_and_what_is_judged(run: Run) -> None:
    seen = trace(dmd2, run, {**QUICK, "first": 0.4, "guidance": 3.0, "gan_weight": 0.0}, setting=untrained("classes", width=8))
    times = {c.args[1] for c in seen.calls("generator")}
    assert times == {-1 + 1000 * 0.4}
    assert seen.nets["frozen 0"].weight == 3.0
    assert {c.training for c in seen.calls("generator")[-1:]} == {False}
    assert seen.metrics["energy"] == {row["name"]: row for row in run.rows}["student"]["energy"]


def test_lora_alone_learns_in_the_generator(run: Run) -> None:
    seen = trace(dmd2, run, {**QUICK, "lora_rank": 2, "lora_alpha": 6}, setting=ring(8))
    generator = seen.nets["generator"]
    learning = [name for name, p in generator.named_parameters() if p.requires_grad]
    assert all(".down." in name or ".up." in name for name in learning)
    assert generator.net.blocks[0].first.factor == 3.0
    assert all(p.requires_grad for p in seen.nets["fake"].parameters())
    assert seen.moved("generator")
    with Run(run.folder.with_name("plain"), engine=run.engine, store=run.store, plots=False) as other:
        assert trace(dmd2, other, {**QUICK, "lora_rank": 2}, setting=ring(8)).nets["generator"].net.blocks[0].first.factor == 1.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"low": 0.9, "high": 0.5}, "must be below"),
        ({"low": 0.5, "high": 0.5}, "must be below"),
        ({"steps": 2, "first": 0.5}, "--first"),
        ({"gan_weight": 0.0, "discriminator_weight": 0.5}, "--discriminator-weight"),
        ({"guidance": 3.0}, "takes no conditions"),
        ({"teacher": "rng"}, "none of ring"),
    ],
)
def test_flags_that_would_do_nothing_are_refused(run: Run, changes: dict[str, Any], message: str) -> None:
    setting = None if "teacher" in changes else ring(8)
    with pytest.raises(UserError, match=message):
        dmd2.main(Config(**changes), run, setting=setting)


def test_a_head_without_real_data_is_refused_and_nan_scores_stop(run: Run) -> None:
    setting = ring(8)
    setting.real = False
    with pytest.raises(UserError, match="needs real data"):
        dmd2.main(Config(), run, setting=setting)
    setting.mixture.centres.fill_(float("nan"))
    with pytest.raises(UserError, match=r"scores.*not finite"):
        dmd2.main(Config(gan_weight=0.0, **QUICK), run, setting=setting)


def test_a_killed_run_ends_bitwise_where_an_uninterrupted_one_does(tmp_path: Path) -> None:
    assert_resumes("dmd2", tmp_path, 5, {"steps": 2, "batch": 8}, setting=ring(8))
