import math
import os
import signal

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from stillroom.adapt.ridge import ridge_head
from stillroom.catalogue.execute import execute
from stillroom.core.config import override
from stillroom.core.engine import make
from stillroom.core.errors import UserError
from stillroom.core.run import Interrupted, Run
from stillroom.core.store import Store
from stillroom.data.load import load_images
from stillroom.nets import wrapped
from stillroom.nets.build import build
from stillroom.recipes.data import krr_st
from stillroom.testing import assert_grads
from stillroom.vision import hub

SMALL = {
    "limit": 200, "images": 8, "steps": 12, "batch_size": 32, "pool": 2, "lifetime": 4, "teacher_steps": 8, "pretrain_steps": 6,
    "repeats": 1, "finetune_steps": 3, "shots": 2, "others": ("small:mlp-16",), "net": "small:convnet-avg-4x8",
    "teacher": "small:convnet-avg-8x4",
}  # fmt: skip


def config(**changes):
    return override(krr_st.Config(), SMALL | changes)


def start(folder, **settings) -> Run:
    return Run(folder, 0, engine=make("local", "cpu"), store=Store(folder.parent / "store"), **settings)


# -- claim 1: a random inner loss biases the outer gradient; pure numpy ------------------------------------------------------------
def meta_gradient(x, y, x_new, y_new, ridge, shift=0.0):
    """Outer loss 1/2 |x_new w - y_new|^2 at w = argmin 1/2 |x w - y|^2 + ridge/2 |w|^2, and its gradient in x by the implicit function
    theorem. `shift` adds to the Hessian what the noise adds in expectation."""
    hessian = x.T @ x + (ridge + shift) * np.eye(x.shape[1])
    w = np.linalg.solve(hessian, x.T @ y)
    v = np.linalg.solve(hessian, x_new.T @ (x_new @ w - y_new))
    return 0.5 * np.sum((x_new @ w - y_new) ** 2), np.outer(y - x @ w, v) - np.outer(x @ v, w)


def test_sampled_meta_gradient_is_biased_exactly_when_the_inner_loss_is_random():
    random = np.random.default_rng(0)
    x, y, x_new, y_new = random.normal(size=(6, 3)), random.normal(size=6), random.normal(size=(20, 3)), random.normal(size=20)
    numeric = np.zeros_like(x)
    for i in np.ndindex(x.shape):
        step = np.zeros_like(x)
        step[i] = 1e-6
        numeric[i] = (meta_gradient(x + step, y, x_new, y_new, 0.1)[0] - meta_gradient(x - step, y, x_new, y_new, 0.1)[0]) / 2e-6
    np.testing.assert_allclose(meta_gradient(x, y, x_new, y_new, 0.1)[1], numeric, rtol=1e-5, atol=1e-7)

    for noise, biased in ((0.0, False), (0.5, True)):
        # E |(x + e) w - y|^2 = |x w - y|^2 + 6 noise^2 |w|^2: the expected inner problem has this Hessian and no randomness left
        exact = meta_gradient(x, y, x_new, y_new, 0.1, shift=6 * noise**2)[1]
        sampled = np.stack([meta_gradient(x + noise * random.normal(size=x.shape), y, x_new, y_new, 0.1)[1] for _ in range(4000)])
        error = np.linalg.norm(sampled.mean(0) - exact)
        chance = math.sqrt(np.sum(sampled.var(0)) / len(sampled))
        if biased:
            assert error > 0.2 * np.linalg.norm(exact)
            assert error > 5 * chance
        else:
            assert error < 1e-10 * np.linalg.norm(exact)


# -- the outer step ----------------------------------------------------------------------------------------------------------------
def test_gradient_reaches_images_and_targets_only():
    data = load_images("digits", seed=0, limit=40)
    distilled = krr_st.Distilled(data.train.images()[:6], torch.randn(6, 5), data)
    shape = {"classes": 5, "channels": 1, "size": 8, "mean": data.mean, "std": data.std}
    net, teacher = (build("convnet-avg-4x8", **shape).eval() for _ in range(2))
    real = data.train.images()[6:20]
    with torch.no_grad():
        features, answers = net.requires_grad_(False).features(real), teacher(real)
    predicted = ridge_head(net.features(distilled.pixels), features, distilled.targets, 1e-6)
    assert_grads((predicted - answers).square().mean(), to=[distilled.images, distilled.targets], not_to=[net, teacher])


def test_images_live_where_the_data_is_normalised_and_networks_get_real_scale():
    data = load_images("digits", seed=0, limit=40)
    real = data.train.images()
    distilled = krr_st.Distilled(real, torch.zeros(len(real), 1), data)
    torch.testing.assert_close(distilled.pixels, real)
    assert abs(float(distilled.images.detach().mean())) < 0.05
    assert float(distilled.images.detach().std()) == pytest.approx(1, abs=0.05)


def test_barlow_twins_by_loops():
    one, two = (torch.randn(9, 4, generator=torch.Generator().manual_seed(s), dtype=torch.float64) for s in (0, 1))
    a, b = ((x - x.mean(0)) / x.std(0, correction=0) for x in (one, two))
    expected = 0.0
    for i in range(4):
        for j in range(4):
            c = float(sum(a[k, i] * b[k, j] for k in range(9)) / 9)
            expected += (1 - c) ** 2 if i == j else 0.1 * c**2
    assert float(krr_st.barlow_twins(one, two, 0.1)) == pytest.approx(expected)
    assert float(krr_st.barlow_twins(one, one, 0.0)) == pytest.approx(0.0, abs=1e-12)


def test_fine_tuning_keeps_everything_but_the_head(tmp_path):
    data = load_images("digits", seed=0, limit=60)
    net = build("convnet-avg-4x8", classes=5, channels=1, size=8, mean=data.mean, std=data.std)
    net(data.train.images())  # moves the running statistics
    with start(tmp_path / "run", plots=False) as run:
        krr_st.finetune(config(finetune_steps=0), run, net, data)
        tuned = run.roles["net"].net
    same = {k for k, v in net.state_dict().items() if v.shape == tuned.state_dict()[k].shape and torch.equal(v, tuned.state_dict()[k])}
    assert same == {k for k in net.state_dict() if not k.startswith("head")}
    assert tuned.head.out_features == 10


# -- the whole ---------------------------------------------------------------------------------------------------------------------
def test_end_to_end_with_pictures_and_files(tmp_path):
    with start(tmp_path / "run") as run:
        result = execute("krr-st", config(), run, arm="krr-st")
    assert {"mse", "probe", "finetune", "mse small:mlp-16"} == set(result["metrics"])
    assert all(map(math.isfinite, result["metrics"].values()))
    assert (tmp_path / "run" / "samples" / "distilled images.png").exists()
    stored = load_file(tmp_path / "run" / "student" / "distilled.safetensors")
    assert stored["images"].shape == (8, 1, 8, 8)
    assert stored["targets"].shape == (8, 16)  # two halvings of 8 pixels leave 2x2 positions of 4 channels
    data = load_images("digits", seed=0)
    encoder = hub.load_encoder(f"run:{tmp_path / 'run'}", data=data)
    assert encoder(data.test.take(torch.arange(3)).images).shape == (3, 32)


@pytest.mark.parametrize("arm", krr_st.ARMS)
def test_every_arm_runs_and_learns_what_it_says(arm, tmp_path):
    cfg = override(krr_st.Config(), {**krr_st.ARMS[arm], **{k: v for k, v in SMALL.items() if k not in krr_st.ARMS[arm]}})
    with start(tmp_path / "run", plots=False) as run:
        metrics = krr_st.main(cfg, run)
        learned = len(run.roles["distilled"].parameters) if "distilled" in run.roles else 0
    assert all(map(math.isfinite, metrics.values()))
    assert learned == {"images learned": 1, "targets learned": 1, "krr-st": 2, "random inner problem": 2}.get(arm, 0)


@pytest.mark.parametrize("when", [2, 7])
def test_a_stopped_run_ends_bitwise_like_a_straight_one(when, tmp_path, monkeypatch):
    def distilled(folder):
        with start(folder, plots=False) as run:
            krr_st.main(config(), run)
        return load_file(folder / "student" / "distilled.safetensors")

    straight = distilled(tmp_path / "a")
    advance, calls = krr_st.Pool.advance, iter(range(10**6))

    def stopping(self, *args):
        if next(calls) == when:  # in the pool's loop, then in the outer one
            os.kill(os.getpid(), signal.SIGINT)
        advance(self, *args)

    monkeypatch.setattr(krr_st.Pool, "advance", stopping)
    with pytest.raises(Interrupted):
        distilled(tmp_path / "b")
    resumed = distilled(tmp_path / "b")
    assert all(torch.equal(straight[k], resumed[k]) for k in straight)


def test_chunks_give_the_whole_batchs_gradient(tmp_path):
    sets = []
    for chunks in (1, 2):
        with start(tmp_path / str(chunks), plots=False, accumulate=chunks) as run:
            krr_st.main(config(steps=1, pretrain_steps=0, finetune_steps=0), run, teacher=wrapped.Encoder(fixed_net()))
        sets.append(load_file(tmp_path / str(chunks) / "student" / "distilled.safetensors"))
    torch.testing.assert_close(sets[0]["targets"], sets[1]["targets"], rtol=1e-4, atol=1e-4)


def fixed_net():
    torch.manual_seed(0)
    return build("convnet-avg-4x8", classes=2, channels=1, size=8, mean=(0.3,), std=(0.4,))


def test_bad_input_is_named(tmp_path):
    for changes, message in (
        ({"held_out": 10}, "leaves no source class"),
        ({"images": 5000}, "more than the"),
        ({"net": "hf:x"}, "small:NAME"),
        ({"net": "small:convnet-avg-4x4x4x4"}, "16 must divide"),
        ({"teacher": "nothing:x"}, "names no trained encoder"),
        ({"target": "shapes"}, "--image-size"),
    ):
        with start(tmp_path / "run", plots=False) as run, pytest.raises(UserError, match=message):
            krr_st.main(config(**changes), run)


def test_a_transformers_backbone_can_be_the_teacher(tmp_path):
    transformers = pytest.importorskip("transformers")
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "image_size": 8, "patch_size": 4}
    model = transformers.ViTModel(transformers.ViTConfig(**shape), add_pooling_layer=False).eval()
    model.save_pretrained(tmp_path / "vit")
    data = load_images("digits", seed=0)
    with pytest.warns(UserWarning, match="preprocessor_config"):
        encoder = hub.load_encoder(f"hf:{tmp_path / 'vit'}", data=data)
    images = data.test.take(torch.arange(3)).images
    expected = model((images.expand(-1, 3, -1, -1) - 0.5) / 0.5).last_hidden_state[:, 0]
    torch.testing.assert_close(encoder.eval()(images), expected)
