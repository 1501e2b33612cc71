"""SLA's sharp edges: order of views and labels, what is averaged, who sees which view, where gradients go."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from stillroom import cli
from stillroom.core.errors import UserError
from stillroom.core.run import Run
from stillroom.data.embedded import digits, shapes
from stillroom.recipes.classification import sla

TINY = dataclasses.replace(sla.Config(), steps=4, batch_size=8, augment="none", student="small:convnet-w4")


def test_views_are_sample_major_and_rotate_counter_clockwise() -> None:
    views, m = sla.transforms("rotation", 1)
    images = torch.arange(8.0).view(2, 1, 2, 2)
    rows = views(images)
    assert (m, rows.shape[0]) == (4, 8)
    assert rows[1, 0].tolist() == [[1, 3], [0, 2]]  # [[0, 1], [2, 3]] a quarter turn counter-clockwise
    assert torch.equal(rows[4], images[1])


@pytest.mark.parametrize(("name", "m"), [("rotation2", 2), ("color6", 6), ("color3", 3), ("rotation2+color3", 6), ("rotation+color6", 24)])
def test_families_are_distinct_and_start_with_the_identity(name, m) -> None:
    views, count = sla.transforms(name, 3)
    image = torch.rand(1, 3, 4, 4)
    rows = views(image)
    assert count == m == len(rows)
    assert torch.equal(rows[:1], image)
    assert len({tuple(r.flatten().tolist()) for r in rows}) == m


def test_colours_of_grey_images_are_refused() -> None:
    with pytest.raises(UserError, match="use rotation"):
        sla.transforms("color6", 1)


def test_aggregate_by_loops() -> None:
    m, classes, batch = 3, 5, 4
    joint = torch.randn(batch * m, classes * m, dtype=torch.float64)
    expected = torch.zeros(batch, classes, dtype=torch.float64)
    for b in range(batch):
        for i in range(classes):
            for j in range(m):
                expected[b, i] += joint[b * m + j, i * m + j] / m
    torch.testing.assert_close(sla.aggregate(joint, m), expected)


def test_loss_against_the_formula_in_float64(tmp_path) -> None:
    data = digits(0, labelled=40, transfer=0)
    cfg = dataclasses.replace(TINY, steps=1, batch_size=40, temperature=2.0, kd_weight=0.7, ce_weight=0.4)
    kept = {}

    class Keep(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.body = torch.nn.Linear(64, 50)

        def forward(self, images):
            kept["logits"] = self.body(images.flatten(1))
            return kept["logits"]

    class Stop(Run):
        def update(self, optimizer, **parts):
            kept["first"] = kept["logits"].detach().double()
            kept["parts"] = {name: value.detach().clone() for name, value in parts.items()}
            super().update(optimizer, **parts)
            raise InterruptedError

    with Stop(tmp_path / "r", 0, plots=False) as run, pytest.raises(InterruptedError):
        sla.main(cfg, run, data=data, student=Keep())
    from stillroom.data.batches import Batches

    y, z, parts = Batches(data.train, 40, 0)(0).labels, kept["first"], kept["parts"]
    joint = 0.0
    for b in range(40):
        for j in range(4):
            joint -= float(z[4 * b + j, :40].log_softmax(0)[y[b] * 4 + j]) / 160
    u, s = z[::4, 40:], sla.aggregate(z[:, :40], 4)
    p, q = (s / 2).softmax(1), (u / 2).softmax(1)
    assert float(parts["joint"]) == pytest.approx(joint, rel=1e-5)
    assert float(parts["kd"]) == pytest.approx(float(0.7 * 4 * (p * (p.log() - q.log())).sum(1).mean()), rel=1e-4)
    assert float(parts["ce"]) == pytest.approx(float(-0.4 * u.log_softmax(1)[torch.arange(40), y].mean()), rel=1e-5)


def test_the_target_is_detached_and_head_u_sees_one_view() -> None:
    """Gradient of the distillation and cross-entropy terms: none in the joint columns, none in the rows of turned views."""
    z = torch.randn(12, 15, requires_grad=True)  # 4 images x 3 views, 4 classes: 12 joint columns, 3 of u are enough here
    joint, single = slice(0, 12), slice(12, 15)
    target = sla.aggregate(z[:, joint], 3)[:, :3].detach()
    (sla.kl(target, z[::3, single]).sum() + sla.cross_entropy(z[::3, single], torch.tensor([0, 1, 2, 0])).sum()).backward()
    assert not z.grad[:, joint].any()
    assert not z.grad[1::3].any()
    assert z.grad[::3, single].all()


def test_heads_share_no_column() -> None:
    for mode, outputs in {"plain": 10, "da": 10, "mt": 14, "sla": 40, "sla+sd": 50}.items():
        n, joint, single, other = sla.heads(mode, 10, 4)  # type: ignore[arg-type]
        assert n == outputs
        assert sorted([*range(n)[joint], *range(n)[single], *range(n)[other]]) == list(range(n))


@pytest.mark.parametrize("arm", sla.ARMS)
def test_every_arm_runs_and_deploys_a_plain_classifier(arm: str, run: Run) -> None:
    from stillroom.core.config import override
    from stillroom.vision import hub

    metrics = sla.main(override(TINY, sla.ARMS[arm]), run)
    assert {"accuracy", "aggregated"} <= set(metrics)
    if arm == "plain":
        assert metrics["accuracy"] == pytest.approx(metrics["aggregated"])
    student = hub.load_classifier(f"run:{run.folder}", data=digits(0, 50))
    assert student(torch.rand(2, 1, 8, 8)).shape == (2, 10)


def test_colour_families_run(run: Run) -> None:
    cfg = dataclasses.replace(TINY, transform="rotation2+color3", steps=2)
    assert sla.main(cfg, run, data=shapes(0, 60, 16))["accuracy"] >= 0


def test_end_to_end(tmp_path, capsys) -> None:
    assert cli.main(["run", "sla", "--out", str(tmp_path / "r"), "--steps", "5", "--quiet"]) == 0
    assert "student: sla+sd" in capsys.readouterr().out
