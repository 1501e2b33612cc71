"""Embedded worlds: arguments, store keys, devices, saved students; what all settings do: drawing, guidance, learners, judging."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from stillroom.core.engine import make
from stillroom.core.errors import UserError
from stillroom.core.run import Run
from stillroom.core.store import Store
from stillroom.diffusion import teachers, worlds
from stillroom.diffusion.denoiser import Denoiser, Guided
from stillroom.diffusion.exact import four_classes, ring
from stillroom.diffusion.processes import EDM, VP, Flow, Trig, describe, named
from stillroom.diffusion.processes.vp import _ratios
from stillroom.diffusion.sampling import consistency, gamma_step, sde_step
from stillroom.diffusion.teachers import StudentConfig, TeacherConfig
from stillroom.diffusion.worlds import Points, World, saved, world
from tests.diffusion.every import PROCESSES
from tests.diffusion.tiny import untrained


@pytest.mark.parametrize("process", PROCESSES)
def test_a_process_is_described_and_made_again(process: Any) -> None:
    assert named(**json.loads(json.dumps(describe(process)))) == process


def test_two_widths_of_one_world_are_two_entries_and_the_same_width_is_one(run: Run) -> None:
    narrow, wide = (Points("mine", ring(), width=width, depth=1, steps=2) for width in (8, 16))
    sizes = [world.start(run).net.spec["width"] for world in (narrow, wide, narrow)]  # type: ignore[index, union-attr]
    assert sizes == [8, 16, 8]
    entries = lambda: len(list(run.store.folder.glob("init-mine-*/")))
    assert entries() == 2
    for other in ({"depth": 2}, {"steps": 3}, {"process": EDM(), "prediction": "edm"}, {"classes": 2}):
        before = entries()
        Points("mine", ring(), **{"width": 8, "depth": 1, "steps": 2, **other}).start(run)  # type: ignore[arg-type]
        assert entries() == before + 1, other


def test_the_network_that_starts_where_the_teacher_is_learns_to_be_there(run: Run) -> None:
    found = Points("mine", ring(), width=32, depth=2, steps=300, process=Trig(1.0))
    before, after = found.small(1), found.start(run)
    assert after.process == Trig(1.0)
    x0 = found.mixture.sample(512)
    x, t = Trig(1.0).mix(x0, torch.randn_like(x0), 0.7), 0.7
    with torch.no_grad():
        wrong, right = (float((net(x, t).x0 - found.teacher(x, t, None, Trig(1.0)).x0).square().mean()) for net in (before, after))
    assert right < wrong / 5


def test_the_exact_teachers_data_are_what_torch_multinomial_would_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit by bit, as ledgers were made with it; and without it, for the host would wait for its checks."""
    mixture, cond = four_classes(), torch.randint(-1, 4, (192,))
    probability = mixture.log_weights.exp().expand(192, -1).masked_fill((cond[:, None] >= 0) & (cond[:, None] != mixture.labels), 0.0)
    for some, given in ((mixture.log_weights.exp().expand(192, -1), None), (probability, cond)):
        torch.manual_seed(7)
        centre = mixture.centres[torch.multinomial(some, 1)[:, 0]]
        expected = centre + mixture.std * torch.randn(centre.shape)
        torch.manual_seed(7)
        with monkeypatch.context() as refused:
            refused.setattr(torch, "multinomial", None)
            assert torch.equal(mixture.sample(192, given), expected)


def test_a_condition_that_no_component_has_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="a condition that no component has"):
        four_classes().sample(3, torch.tensor([0, 9, 1]))


def test_conditions_and_data_of_a_world() -> None:
    found = world("classes")
    x, cond = found.samples(400)
    assert cond is not None
    assert sorted(cond.unique().tolist()) == [0, 1, 2, 3]
    nearest = torch.cdist(x, found.mixture.centres).argmin(1)
    assert float((found.mixture.labels[nearest] == cond).float().mean()) > 0.8
    assert world("ring").samples(3)[1] is None
    assert world("digits", classes=10).small(2).net.spec["classes"] == 10  # type: ignore[index, union-attr]
    with pytest.raises(UserError, match="no positive multiple of 4"):
        world("digits").small(8)
    with pytest.raises(KeyError):
        world("rng")


def test_the_method_says_process_and_prediction_of_a_fresh_network() -> None:
    assert world("ring").small(2).prediction == "velocity"
    assert world("classes").small(2).prediction == "eps"
    net = world("classes").small(2, EDM(), "edm", dropout=0.25)
    assert (net.process, net.prediction) == (EDM(), "edm")
    assert {m.p for m in net.modules() if isinstance(m, torch.nn.Dropout)} == {0.25}


def test_a_condition_is_drawn_placed_and_cut_once(tmp_path: Path) -> None:
    """Of a batch of 8 in two chunks each gets 4 noises, 4 conditions and 4 data: none is cut twice."""
    found = world("classes")
    with Run(tmp_path / "run", engine=make("local", "cpu"), store=Store(tmp_path / "store"), accumulate=2) as run:
        for _ in run.steps(1):
            z, cond = found.draw(run, 8)
            data, words = found.data(run, 8)
            assert [len(each) for each in (z, cond, data, words)] == [4] * 4
            assert torch.isfinite(found.teacher(z, 500.0, cond).x0).all()


def test_networks_of_exact_teachers_and_their_labels_follow_the_device() -> None:
    """torch's meta device stands for an accelerator: whatever stayed on the CPU would not meet the rest."""
    found, device = world("classes"), torch.device("meta")
    x, cond = found.samples(4, device)
    assert {x.device, cond.device, found.mixture.centres.device} == {device}  # type: ignore[union-attr]
    assert found.noise(3, device).device == device


def test_tables_are_made_once_for_a_device() -> None:
    _ratios.cache_clear()
    process = VP()
    for k in (3, 5.5, 700):
        process.alpha(torch.tensor([float(k)]))
        process.time(process.rho(torch.tensor([float(k)])))
    assert _ratios.cache_info().misses == 1


def test_a_saved_student_is_loaded_by_its_folder(run: Run) -> None:
    found = world("classes", width=16)
    start = found.small(1)
    student = found.learner(start, 2, 4)
    with torch.no_grad():
        for p in student.parameters():
            p.add_(0.1 * torch.randn_like(p))
    run.save_student(student, lambda net, folder: found.save(net, folder, [999.0, -1.0], fresh_noise=True))
    loaded = saved(run.folder)
    assert (loaded.world, loaded.times, loaded.fresh_noise) == ("classes", [999.0, -1.0], True)
    x, cond = found.samples(5)
    torch.testing.assert_close(loaded.net(x, 300.0, cond).x0, student(x, 300.0, cond).x0)  # LoRA was merged
    assert type(loaded.net.net.blocks[0].first) is torch.nn.Linear  # type: ignore[index, union-attr]
    again = TeacherConfig(teacher=f"run:{run.folder}").setting()
    assert isinstance(again, World)
    torch.testing.assert_close(again.start(run)(x, 300.0, cond).x0, loaded.net(x, 300.0, cond).x0)
    assert again.small(2).prediction == "eps"


def test_folders_without_a_student_are_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no few-step student"):
        saved(tmp_path)
    (tmp_path / worlds.SPEC).write_text('{"stillroom": {"denoiser": {"network": {"kind": "mlp"}}}}')
    with pytest.raises(UserError, match="holds no few-step student"):
        teachers.load(f"run:{tmp_path}")
    found = Points("mine", ring(), width=8)
    found.save(found.small(1), tmp_path, [1.0, 0.0], False)
    with pytest.raises(UserError, match="was made in Python"):
        teachers.load(f"run:{tmp_path}")
    with pytest.raises(UserError, match="none of ring"):
        teachers.load("rng")
    with pytest.raises(UserError, match="--fid"):
        teachers.load("ring", fid="teacher")


def test_flags_of_a_students_config() -> None:
    with pytest.raises(UserError, match="--lora-alpha 4"):
        StudentConfig(lora_alpha=4).setting()
    assert isinstance(StudentConfig(lora_rank=2, lora_alpha=4, world_steps=7).setting(), World)
    assert TeacherConfig(world_steps=7).setting().steps == 7  # type: ignore[attr-defined]


def test_guidance_of_a_setting() -> None:
    found = world("classes")
    assert found.guided(1.0) is found.teacher
    guided = found.guided(3.0)
    assert isinstance(guided, Guided)
    assert (guided.weight, guided.null) == (3.0, -1)
    with pytest.raises(UserError, match="takes no conditions"):
        world("ring").guided(2.0)


def test_a_learner_is_a_copy_whose_weights_or_adapters_learn() -> None:
    found = world("ring", width=16)
    start = found.small(1)
    whole, few = found.learner(start), found.learner(start, 2, 2)
    assert all(p.requires_grad for p in whole.parameters())
    assert not {id(p) for p in whole.parameters()} & {id(p) for p in start.parameters()}
    learning = [name for name, p in few.named_parameters() if p.requires_grad]
    assert learning
    assert all(".down." in name or ".up." in name for name in learning)
    assert all(p.requires_grad for p in start.parameters())


class Projected(Points):
    """Data on the line x = y."""

    def noise_like(self, x: torch.Tensor, cond: Any = None) -> torch.Tensor:
        return torch.randn_like(x).mean(1, keepdim=True).expand_as(x)


def test_noise_of_a_setting_reaches_every_sampler() -> None:
    found = Projected("line", ring(), width=8)
    z = found.noise(6)
    assert torch.equal(z[:, 0], z[:, 1])

    class Nothing(torch.nn.Module):
        process = Flow()

        def forward(self, x: torch.Tensor, t: Any, cond: Any, process: Any) -> Any:
            from stillroom.diffusion.denoiser import Prediction

            return Prediction(torch.zeros_like(x), torch.zeros_like(x))

    for step in (gamma_step, sde_step):
        x, _ = step(Nothing(), torch.zeros(6, 2), 0.9, 0.5, None, Flow(), noise=found.noise_like)  # type: ignore[operator]
        assert torch.equal(x[:, 0], x[:, 1])
        assert float(x.abs().min()) > 0
    torch.manual_seed(0)
    cold = gamma_step(Nothing(), torch.zeros(6, 2), 0.9, 0.5, None, Flow(), scale=0.5)[0]
    torch.manual_seed(0)
    torch.testing.assert_close(2 * cold, gamma_step(Nothing(), torch.zeros(6, 2), 0.9, 0.5, None, Flow())[0])
    torch.manual_seed(0)
    by_time = sde_step(Nothing(), torch.zeros(6, 2), 0.9, 0.5, None, Flow(), strength=lambda t: 2 * t)[0]
    torch.manual_seed(0)
    torch.testing.assert_close(by_time, sde_step(Nothing(), torch.zeros(6, 2), 0.9, 0.5, None, Flow(), strength=1.8)[0])


def test_the_judge_asks_in_batches_without_dropout_and_compares_on_the_same_noise(run: Run) -> None:
    found = untrained("ring", width=8)
    found.at_once = 5
    start = Denoiser(found.network(8, dropout=0.5), Flow(), "velocity").train()
    asked: list[tuple[bool, int]] = []
    student = copy.deepcopy(start)
    for net in (start, student):
        net.register_forward_hook(lambda module, args, out: asked.append((module.training, len(args[0]))))
    grid = [1.0, 0.5, 0.0]
    metrics = found.judge(run, student, start, grid, count=12, guidance=1.0, also={"one step": [1.0, 0.0]})
    assert {training for training, _ in asked} == {False}
    assert {n for _, n in asked} == {5, 2}
    rows = {row["name"]: row for row in run.rows}
    assert list(rows) == ["teacher network at as few steps", "student, one step", "student"]
    assert rows["student"]["energy"] == metrics["energy"] == rows["teacher network at as few steps"]["energy"]  # the same network and noise
    assert metrics["one_step_energy"] == rows["student, one step"]["energy"] != metrics["energy"]
    assert not saved(run.folder).fresh_noise
    found.judge(run, student, start, grid, count=12, guidance=1.0, step=consistency)
    assert saved(run.folder).fresh_noise
    assert saved(run.folder).times == grid


def test_a_reference_is_data_or_the_guided_teachers_own_samples() -> None:
    found = world("ring")
    torch.manual_seed(0)
    assert float(torch.cdist(found.reference(200, 1.0, 40)[0], found.mixture.centres).min(1).values.max()) < 0.5
    found.real = False
    x, _ = found.reference(200, 1.0, 40)
    assert float(torch.cdist(x, found.mixture.centres).min(1).values.median()) < 0.2
