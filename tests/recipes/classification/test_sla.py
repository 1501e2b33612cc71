"""SLA's sharp edges: order of views and labels, what is averaged, who sees which view, where gradients go."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor
from torch.profiler import profile

from stillroom import cli
from stillroom.core.config import check
from stillroom.core.errors import UserError
from stillroom.core.run import Run
from stillroom.data.batches import Batches
from stillroom.data.embedded import digits, shapes
from stillroom.recipes.classification import sla
from stillroom.testing import trace
from tests.recipes.common import assert_resumes

DATA = digits(0, labelled=150, transfer=0)


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


def test_colours_are_permuted_without_an_index_that_would_be_sent_to_the_device() -> None:
    images = torch.rand(5, 3, 4, 4)
    with profile() as seen:
        rows = sla.transforms("color6", 3)[0](images)
    expected = [images[:, [int(c) for c in order]] for order in sla.COLOURS["color6"]]
    assert torch.equal(rows, torch.stack(expected, 1).flatten(0, 1))
    assert "aten::index" not in {event.key for event in seen.key_averages()}


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


def reference(z: Tensor, y: Tensor, cfg: sla.Config, classes: int, m: int) -> dict[str, Tensor]:
    """Every term by loops over images and views, in float64."""
    n, joint = len(y), "sla" in cfg.mode
    u = z[:, classes * m * joint : classes * m * joint + classes]
    rows = [(b, j, m * b + j) for b in range(n) for j in range(m)]
    if not joint:
        parts = {"ce": -sum(u[r].log_softmax(0)[y[b]] for b, _, r in rows) / len(rows)}
        if cfg.mode == "mt":
            parts["transform"] = -sum(z[r, classes:].log_softmax(0)[j] for _, j, r in rows) / len(rows)
        return parts
    parts = {"joint": -sum(z[r, : classes * m].log_softmax(0)[y[b] * m + j] for b, j, r in rows) / (n if cfg.sum_views else len(rows))}
    if cfg.mode == "sla+sd":
        s = torch.stack([torch.stack([z[m * b + j, i * m + j] for j in range(m)]).mean() for b in range(n) for i in range(classes)])
        p, q = (s.view(n, classes).detach() / cfg.temperature).softmax(1), (u[::m] / cfg.temperature).softmax(1)
        parts["kd"] = cfg.kd_weight * cfg.temperature**2 * (p * (p / q).log()).sum() / n
        parts["ce"] = -cfg.ce_weight * sum(u[m * b].log_softmax(0)[y[b]] for b in range(n)) / n
    return parts


@pytest.mark.parametrize("mode", ["plain", "da", "mt", "sla", "sla+sd"])
def test_losses_and_gradients_against_loops_in_float64(mode: str) -> None:
    m, classes = (1 if mode == "plain" else 3), 4
    cfg = sla.Config(mode=mode, temperature=2.0, kd_weight=0.7, ce_weight=0.4, sum_views=True)  # type: ignore[arg-type]
    outputs, *_ = sla.heads(cfg.mode, classes, m)
    z, y = torch.randn(5 * m, outputs, dtype=torch.float64, requires_grad=True), torch.tensor([3, 0, 1, 1, 2])
    for config in (cfg, dataclasses.replace(cfg, sum_views=False)):
        found, expected = sla.losses(z, y, config, classes, m), reference(z, y, config, classes, m)
        assert found.keys() == expected.keys()
        for name, value in found.items():
            torch.testing.assert_close(value, expected[name])
            gradients = [torch.autograd.grad(parts, z, retain_graph=True)[0] for parts in (value, expected[name])]
            torch.testing.assert_close(*gradients)


def test_the_target_is_detached_and_head_u_sees_one_view() -> None:
    """Gradient of the distillation and cross-entropy terms: none in the joint columns, none in the rows of turned views."""
    z = torch.randn(12, 15, requires_grad=True)  # 3 images x 4 views of 3 classes: 12 joint columns and 3 of u
    parts = sla.losses(z, torch.tensor([0, 1, 2]), sla.Config(), 3, 4)
    (gradient,) = torch.autograd.grad(parts["kd"] + parts["ce"], z)
    assert not gradient[:, :12].any()
    assert not gradient[torch.arange(12) % 4 > 0].any()
    assert gradient[::4, 12:].all()


@pytest.mark.parametrize("mode", ["plain", "da", "mt", "sla", "sla+sd"])
def test_every_mode_trains_on_all_views_in_one_pass(mode: str, run: Run) -> None:
    m = 1 if mode == "plain" else 4
    seen = trace(
        sla, run, {"mode": mode, "steps": 2, "batch_size": 8, "student": "small:convnet-w4", "augment": "none"}, watch=["losses"], data=DATA
    )
    assert seen.steps("student") == [0, 1]
    for step, call in enumerate(c for c in seen.calls("student") if c.training):
        batch = Batches(DATA.train, 8, 0)(step)
        assert torch.equal(call.args[0], torch.stack([batch.images.rot90(j, (-2, -1)) for j in range(m)], 1).flatten(0, 1))
        given = seen.calls("losses")[step]
        assert torch.equal(given.args[0], call.result)
        assert torch.equal(given.args[1], batch.labels)
        assert given.args[3:] == (10, m)
        assert seen.updates("student")[step].parts.keys() == given.result.keys()
        for name, value in seen.updates("student")[step].parts.items():
            assert torch.equal(value, given.result[name])


@pytest.mark.parametrize("mode", ["sla", "sla+sd", "da"])
def test_what_is_measured(mode: str, run: Run) -> None:
    """One pass, the average of the views, and (sla+sd) the joint head's own single pass, from the trained network by loops."""
    seen = trace(sla, run, {"mode": mode, "steps": 3, "student": "small:convnet-w4"}, data=DATA)
    net, test = seen.nets["student"].eval(), DATA.test
    with torch.no_grad():
        z = torch.stack([net(test.images().rot90(j, (-2, -1))) for j in range(4)])  # (view, N, outputs)
    right = lambda logits: float((logits.argmax(1) == test.labels).double().mean())
    joint = "sla" in mode
    averaged = torch.stack([z[j][:, j:40:4] for j in range(4)]).mean(0) if joint else z.mean(0)
    one = {"sla": z[0][:, 0:40:4], "sla+sd": z[0][:, 40:], "da": z[0]}[mode]
    assert seen.metrics["aggregated"] == pytest.approx(right(averaged))
    assert seen.metrics["accuracy"] == pytest.approx(right(one))
    assert seen.metrics.get("single") == (pytest.approx(right(z[0][:, 0:40:4])) if mode == "sla+sd" else None)


def test_heads_share_no_column() -> None:
    for mode, outputs in {"plain": 10, "da": 10, "mt": 14, "sla": 40, "sla+sd": 50}.items():
        n, joint, single, other = sla.heads(mode, 10, 4)  # type: ignore[arg-type]
        assert n == outputs
        assert sorted([*range(n)[joint], *range(n)[single], *range(n)[other]]) == list(range(n))


@pytest.mark.parametrize("mode", ["mt", "sla+sd"])  # a joint head that is cut, and single outputs that are
def test_the_student_is_a_plain_classifier_that_keeps_its_label_names(mode: str, tmp_path) -> None:
    """A transformers student trained on other classes: it is saved under the names of the data's."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = transformers.ViTConfig(image_size=16, patch_size=8, num_channels=3, num_labels=3, **sizes)
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    data = shapes(0, 36, 16)
    with Run(tmp_path / "r", 0, plots=False) as run:
        trace(sla, run, {"mode": mode, "steps": 1, "student": f"hf:{tmp_path / 'vit'}"}, data=data)
    student = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "r" / "student")
    assert tuple(student.config.id2label.values()) == data.classes
    assert student.config.label2id == {name: number for number, name in enumerate(data.classes)}
    assert student.classifier.out_features == len(data.classes)


def test_flags_that_a_mode_ignores_are_refused(run: Run) -> None:
    for mode, flag, value in (("sla", "kd_weight", 2.0), ("da", "sum_views", True), ("mt", "temperature", 3.0), ("sla", "ce_weight", 0.5)):
        with pytest.raises(UserError, match=f"--{flag.replace('_', '-')} changes nothing in --mode {mode}"):
            sla.refuse_ignored(dataclasses.replace(sla.Config(), mode=mode, **{flag: value}))
        with pytest.raises(UserError):
            trace(sla, run, {"mode": mode, flag: value})
    sla.refuse_ignored(sla.Config(mode="sla", sum_views=True))
    sla.refuse_ignored(sla.Config(temperature=3.0))
    check(sla.full())


def test_colour_families_run(run: Run) -> None:
    seen = trace(sla, run, {"transform": "rotation2+color3", "steps": 2, "student": "small:convnet-w4"}, data=shapes(0, 36, 16))
    assert seen.calls("student")[0].args[0].shape == (32 * 6, 3, 16, 16)


def test_killed_and_started_again(tmp_path) -> None:
    assert_resumes("sla", tmp_path, after=4, changes={"student": "small:convnet-w4"})


def test_the_command(tmp_path, capsys) -> None:
    assert cli.main(["run", "sla", "--out", str(tmp_path / "r"), "--steps", "2", "--student", "small:convnet-w4", "--quiet"]) == 0
    assert "student: sla+sd" in capsys.readouterr().out
    assert (tmp_path / "r" / "samples" / "views of one image.png").is_file()
