"""KRR-ST's sharp edges: where gradients go, eval mode outside and train mode inside, ages, and what
a pre-trained network is measured by."""

import copy
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from stillroom.adapt.pool import Pool
from stillroom.catalogue import cards
from stillroom.core.config import override
from stillroom.core.errors import UserError
from stillroom.core.run import Run
from stillroom.data.batches import Batches
from stillroom.data.load import load_images
from stillroom.metrics.classification import evaluate
from stillroom.nets import wrapped
from stillroom.nets.build import build
from stillroom.recipes.data import krr_st
from stillroom.testing import assert_grads, trace
from stillroom.vision import hub
from tests.recipes.common import assert_resumes

SMALL = {
    "limit": 200, "images": 8, "steps": 6, "batch_size": 32, "pool": 2, "lifetime": 3, "barlow_twins.steps": 2, "pretrain_steps": 3,
    "pretrain_batch": 5, "repeats": 2, "finetune_steps": 2, "finetune_batch": 4, "finetune_augment": "none", "shots": 2,
    "others": ("small:mlp-16",), "net": "small:convnet-avg-4x8", "teacher": "small:convnet-avg-8x4",
}  # fmt: skip
STAGE = "pretrain-convnet-avg-4x8-"


def config(**changes):
    return override(krr_st.Config(), SMALL | changes)


@pytest.fixture(scope="module")
def data():
    return load_images("digits", seed=0, limit=200)


def small_net(data, name="convnet-avg-4x8", classes=5):
    torch.manual_seed(0)
    return build(name, classes=classes, channels=1, size=8, mean=data.mean, std=data.std)


# -- equations ---------------------------------------------------------------------------------------------------------------------
def test_outer_loss_is_the_error_of_the_primal_ridge_head():
    random = np.random.default_rng(0)
    synthetic, targets, real, known = (random.normal(size=shape) for shape in ((9, 4), (9, 3), (5, 4), (5, 3)))
    ones = lambda x: np.hstack([x, np.ones((len(x), 1))])
    ridge = 0.02 * np.trace(ones(synthetic) @ ones(synthetic).T)
    weight = np.linalg.solve(ones(synthetic).T @ ones(synthetic) + ridge * np.eye(5), ones(synthetic).T @ targets)
    expected = ((ones(real) @ weight - known) ** 2).mean(1)
    loss = krr_st.outer_loss(*map(torch.from_numpy, (synthetic, targets, real, known)), 0.02)
    np.testing.assert_allclose(loss.numpy(), expected, rtol=1e-9)


def test_inner_loss_is_a_mean_over_dimensions():
    loss = krr_st.inner_loss(torch.tensor([[1.0, 2, 3, 4], [0, 0, 0, 0]]), torch.tensor([[0.0, 2, 3, 2], [4, 0, 0, 0]]))
    assert loss.tolist() == [1.25, 4.0]


def test_gradient_reaches_images_and_targets_only(data):
    distilled = krr_st.Distilled(data.train.images()[:6], torch.randn(6, 5), data)
    net, teacher = (small_net(data).eval() for _ in range(2))
    real = data.train.images()[6:20]
    with torch.no_grad():
        features, known = net.requires_grad_(False).features(real), teacher(real)
    loss = krr_st.outer_loss(net.features(distilled.pixels), distilled.targets, features, known, 1e-6).mean()
    assert_grads(loss, to=[distilled.images, distilled.targets], not_to=[net, teacher])


def test_images_live_where_the_data_is_normalised_and_networks_get_real_scale(data):
    real = data.train.images()
    distilled = krr_st.Distilled(real, torch.zeros(len(real), 1), data)
    torch.testing.assert_close(distilled.pixels, real)
    assert abs(float(distilled.images.detach().mean())) < 0.05
    assert float(distilled.images.detach().std()) == pytest.approx(1, abs=0.05)


def test_the_teachers_features_are_standardised_over_the_source(data):
    teacher = krr_st.Teacher(wrapped.Encoder(small_net(data)), data.train).eval()
    features = evaluate(teacher, data.train)[0]
    torch.testing.assert_close(features.mean(0), torch.zeros(32), atol=1e-5, rtol=0)
    varied = features.std(0) > 1e-3
    torch.testing.assert_close(features.std(0)[varied], torch.ones(int(varied.sum())))


def test_a_distilled_set_follows_its_device():
    split = krr_st.as_split(torch.empty(3, 1, 8, 8, device="meta"))
    assert split.labels.device.type == "meta"


# -- data --------------------------------------------------------------------------------------------------------------------------
def test_source_and_target_share_no_class_and_the_source_no_label(run):
    data = load_images("digits", seed=0)
    source, task = krr_st.splits(config(limit=0, shots=3), run, data, None)
    assert (source.classes, task.classes) == (data.classes[:6], data.classes[6:])
    assert set(source.train.labels.tolist()) == {-1}
    assert task.train.labels.bincount().tolist() == [3, 3, 3, 3]
    for split, low, high, part in ((source.train, 0, 6, data.train), (task.test, 6, 10, data.test), (source.test, 0, 6, data.test)):
        assert torch.equal(split.images(), part.images()[(part.labels >= low) & (part.labels < high)])
    assert torch.equal(task.test.labels, data.test.labels[data.test.labels >= 6] - 6)
    every = krr_st.splits(config(limit=0, shots=0), run, data, None)[1]
    assert len(every.train) == int((data.train.labels >= 6).sum())
    alone = krr_st.splits(config(held_out=9), run, data, None)[0]
    assert alone.classes == data.classes[:1]
    last = krr_st.splits(config(images=len(alone.train), held_out=9), run, data, None)[0]
    assert len(last.train) == len(alone.train)  # a set may be as large as its source


def test_a_target_of_its_own_leaves_the_source_all_classes(run, data):
    other = load_images("digits", seed=1, limit=100)
    source, task = krr_st.splits(config(), run, data, other)
    assert (source.classes, task.classes) == (data.classes, other.classes)
    assert len(source.train) == len(data.train)
    assert torch.equal(task.test.images(), other.test.images())
    assert task.train.labels.bincount().tolist() == [2] * 10
    assert len(krr_st.splits(config(target="digits", limit=60), run, data, None)[1].test) == 60


def test_the_set_starts_from_random_images_or_from_those_at_the_centres(run, data):
    teacher = wrapped.Encoder(small_net(data))
    torch.manual_seed(5)
    rows = krr_st.first_rows(config(), run, teacher, data.train)
    torch.manual_seed(5)
    assert torch.equal(rows, torch.randperm(len(data.train))[:8])
    features, rows = evaluate(teacher, data.train)[0], krr_st.first_rows(config(init="k-means"), run, teacher, data.train)
    assert len(set(rows.tolist())) == 8
    spread = lambda chosen: float(torch.cdist(features, features[chosen]).min(1).values.square().mean())
    assert spread(rows) < 0.9 * spread(torch.arange(8))


# -- the loop ----------------------------------------------------------------------------------------------------------------------
class Seen(Pool):
    """Writes down which network was looked at and which one learned from what."""

    record: list

    def frozen(self, slot):
        net = super().frozen(slot)
        self.record.append(("look", slot, copy.deepcopy(net), None))
        return net

    def advance(self, slot, inputs, targets):
        assert not inputs.requires_grad
        assert not targets.requires_grad
        self.record.append(("learn", slot, inputs.clone(), targets.clone()))
        super().advance(slot, inputs, targets)


@pytest.fixture
def pools(monkeypatch):
    Seen.record = []
    monkeypatch.setattr(krr_st, "Pool", Seen)
    return Seen.record


def traced(run, data, changes=None, **keywords):
    watch = ["outer_loss", "inner_loss", "distil", "pretrain"]
    return trace(krr_st, run, SMALL | (changes or {}), watch, data=data, **keywords)


def start_of(seen):
    """The set as the first outer step finds it, and how it was made."""
    distilled = seen.calls("distil")[0].args[4]
    images, targets = seen.first["distilled"]
    return distilled, images * distilled.std + distilled.mean, targets


def test_outer_steps_look_at_one_network_and_let_it_learn_from_the_updated_set(run, pools, data):
    common = torch.Generator()
    common.set_state(run.common.get_state())
    seen = traced(run, data, {"steps": 8, "optimizer.schedule": "constant"})
    distilled, pixels, targets = start_of(seen)
    source = seen.calls("distil")[0].args[2]
    first = next(i for i, entry in enumerate(pools) if entry[0] == "look")
    ages = [0, 0]
    for what, slot, *given in pools[:first]:  # the pool grows up on the set as it starts
        assert what == "learn"
        ages[slot] += 1
        torch.testing.assert_close(given, [pixels, targets])
    assert ages == torch.randint(1, 3, (2,), generator=common).tolist()  # 1 to lifetime - 1

    looks, learns = pools[first::2], pools[first + 1 :: 2]
    assert [entry[0] for entry in pools[first:]] == ["look", "learn"] * 8
    assert [entry[1] for entry in looks] == [entry[1] for entry in learns]
    assert len({entry[1] for entry in looks}) == 2
    for _, slot, _, _ in learns:
        ages[slot] = 0 if ages[slot] == 3 else ages[slot] + 1
    assert [entry["age"] for entry in seen.logged if "age" in entry][-1] == ages[learns[-1][1]]

    batches, losses = Batches(source.train, 32, run.seed), seen.calls("outer_loss")
    answers = [call for call in seen.calls("frozen 0") if len(call.args[0]) == 32]
    assert seen.steps("distilled") == list(range(8))
    for step, (look, learn, loss, answer) in enumerate(zip(looks, learns, losses, answers, strict=True)):
        net, real = look[2], batches(step).images
        assert not net.training
        assert not any(p.requires_grad for p in net.parameters())
        assert torch.equal(answer.args[0], real)
        assert (answer.grad, answer.training, loss.grad) == (False, False, True)
        torch.testing.assert_close(loss.args[0], net.features(pixels))
        assert torch.equal(loss.args[1], targets)
        torch.testing.assert_close(loss.args[2], net.features(real))
        assert torch.equal(loss.args[3], answer.result)
        assert loss.args[4] == 1e-6
        assert torch.equal(seen.updates("distilled")[step].parts["outer"], loss.result)
        pixels, targets = learn[2:]  # as the update left them
        assert not torch.equal(targets, loss.args[1])
    torch.testing.assert_close(pixels, distilled.pixels.detach())
    images = seen.calls("pretrain")[0].args[3]
    assert torch.equal(images, distilled.pixels.detach())
    assert not seen.moved("frozen 0")


def test_the_chunks_of_a_step_look_at_one_network_which_learns_once(tmp_path, pools, data):
    with Run(tmp_path / "run", 0, plots=False, accumulate=2) as run:
        changes = {"steps": 6, "lifetime": 12, "pretrain_batch": 4, "barlow_twins.batch_size": 16, "repeats": 1, "others": ()}
        seen = traced(run, data, changes)
    first = next(i for i, entry in enumerate(pools) if entry[0] == "look")
    grown = [[entry[1] for entry in pools[:first]].count(slot) for slot in (0, 1)]
    assert grown[0] != grown[1]
    assert [entry[0] for entry in pools[first:]] == ["look", "look", "learn"] * 6
    slots = [entry[1] for entry in pools[first:]]
    assert slots[::3] == slots[1::3] == slots[2::3]
    assert set(slots) == {0, 1}
    assert [update.chunk for update in seen.updates("distilled")] == [0, 1] * 6


@pytest.mark.parametrize(("learn", "moved"), [("images", (True, False)), ("targets", (False, True)), ("both", (True, True))])
def test_what_is_learned_moves_and_the_rest_stays(learn, moved, run, pools, data):
    seen = traced(run, data, {"learn": learn, "repeats": 1, "others": ()})
    first, last = (next(entry for entry in order if entry[0] == "learn") for order in (pools, pools[::-1]))
    assert tuple(not torch.equal(first[k], last[k]) for k in (2, 3)) == moved
    assert len(seen.nets["distilled"]) == sum(moved)
    torch.testing.assert_close(first[3], seen.nets["frozen 0"](first[2]))  # targets start as the teacher's features of the real images
    source = seen.calls("distil")[0].args[2].train.images()
    assert all(((source - image).abs().flatten(1).amax(1) < 1e-5).any() for image in first[2])


def test_the_real_images_of_an_outer_step_are_augmented_alike_for_teacher_and_network(run, pools, data):
    seen = traced(run, data, {"augment": "shift", "steps": 1, "repeats": 1, "others": ()})
    net, loss = next(entry[2] for entry in pools if entry[0] == "look"), seen.calls("outer_loss")[0]
    shown = next(call.args[0] for call in seen.calls("frozen 0") if len(call.args[0]) == 32)
    real = Batches(seen.calls("distil")[0].args[2].train, 32, run.seed)(0).images
    assert not torch.equal(shown, real)
    torch.testing.assert_close(loss.args[2], net.features(shown))


def test_a_random_inner_problem_is_random_there_and_nowhere_else(run, pools, data):
    seen = traced(run, data, {"inner_noise": 0.5, "steps": 2, "images": 40, "repeats": 1, "others": ()})
    distilled, start, _ = start_of(seen)
    grown = [(entry[2] - start) / distilled.std for entry in pools[: next(i for i, e in enumerate(pools) if e[0] == "look")]]
    assert all(float(shift.std()) == pytest.approx(0.5, rel=0.05) for shift in grown)
    assert not torch.equal(grown[0], grown[1])
    net, synthetic = next(entry[2] for entry in pools if entry[0] == "look"), seen.calls("outer_loss")[0].args[0]
    assert float((net.features(start) - synthetic).abs().mean()) > 0.01
    images = seen.calls("pretrain")[0].args[3]
    assert torch.equal(images, distilled.pixels.detach())
    assert float(((pools[-1][2] - images) / distilled.std).std()) == pytest.approx(0.5, rel=0.05)
    shown = torch.cat([call.args[0] for call in seen.calls("net", STAGE + "0") if call.training])
    assert all(any(torch.equal(x, y) for y in images) for x in shown)


def test_networks_are_pre_trained_on_the_set_then_measured_probed_and_fine_tuned(run, data):
    seen = traced(run, data, {"steps": 1})
    source = seen.calls("distil")[0].args[2]
    images, targets = seen.calls("pretrain")[0].args[3:]
    assert [call.args[1].path.rpartition("/")[2] for call in seen.calls("pretrain")] == [STAGE + "0", STAGE + "1", "pretrain-mlp-16-0"]
    learning = [call for call in seen.calls("net", STAGE + "0") if call.training]
    for call, update, loss in zip(learning, seen.updates("net", STAGE + "0"), seen.calls("inner_loss"), strict=False):
        rows = [next(i for i, y in enumerate(images) if torch.equal(x, y)) for x in call.args[0]]
        assert len(set(rows)) == 5
        assert torch.equal(loss.args[1], targets[rows])
        assert torch.equal(loss.args[0], call.result)
        assert torch.equal(update.parts["mse"], loss.result)
        assert update.rates == (0.1,)
    assert len(learning) == len(seen.updates("net", STAGE + "0")) == 3

    known = evaluate(seen.nets["frozen 0"], source.test)[0]
    error = lambda net: float((evaluate(net, source.test)[0] - known).square().mean())
    one, tuned, two, tuned_too, mlp = (seen.nets["net" + "'" * i] for i in range(5))
    assert seen.metrics["mse"] == pytest.approx((error(one) + error(two)) / 2, rel=1e-5)
    assert seen.metrics["mse small:mlp-16"] == pytest.approx(error(mlp), rel=1e-5)
    assert set(seen.metrics) == {"mse", "mse small:mlp-16", "probe", "finetune"}

    assert [len(seen.updates(stage=f"finetune-{i}")) for i in range(2)] == [2, 2]
    assert all(update.parts["ce"].shape == (4,) for update in seen.updates(stage="finetune-0"))
    assert tuned.head.out_features == 4
    kept = dict([*one.named_parameters(), *one.named_buffers()])
    for (name, after), before in zip([*tuned.named_parameters(), *tuned.named_buffers()], seen.first["net'"], strict=True):
        assert name.startswith("head") or torch.equal(before, kept[name])
        assert not name.endswith("weight") or not torch.equal(before, after)
    _, task = krr_st.splits(config(), run, data, None)
    right = lambda net: float((evaluate(net, task.test)[0].argmax(1) == task.test.labels).float().mean())
    assert seen.metrics["finetune"] == pytest.approx((right(tuned) + right(tuned_too)) / 2)
    assert seen.metrics["probe"] == pytest.approx(sum(krr_st.probe(task, wrapped.Encoder(net)) for net in (one, two)) / 2)


def test_a_probe_learns_from_the_training_and_is_judged_on_the_test_images(run, data):
    """Features that settle the class in training, and say in testing that it is always the first."""
    _, task = krr_st.splits(config(shots=3), run, data, None)

    class Settled(nn.Module):
        def forward(self, images):
            train = len(images) == len(task.train)
            return nn.functional.one_hot(task.train.labels if train else torch.zeros(len(images), dtype=torch.int64), 4).float()

    assert len(task.train) != len(task.test)
    assert krr_st.probe(task, Settled()) == pytest.approx(float((task.test.labels == 0).float().mean()))


def test_nothing_learns_without_outer_steps(run, data):
    seen = traced(run, data, {"steps": 0, "pretrain_steps": 0, "repeats": 1, "others": ()})
    assert not seen.updates("distilled")
    assert not seen.updates("net", STAGE + "0")
    images, targets = seen.calls("pretrain")[0].args[3:]
    torch.testing.assert_close(seen.nets["frozen 0"](images), targets)


def test_the_teacher_is_trained_on_the_source_or_taken_as_it_is(run, data):
    source, _ = krr_st.splits(config(), run, data, None)
    given, images = wrapped.Encoder(small_net(data)), source.train.images()[:3]
    assert krr_st.find_teacher(override(krr_st.Config(), krr_st.TINY), run, source, given) is given
    found = krr_st.find_teacher(config(), run, source)
    assert found(images).shape == (3, 16)
    assert torch.equal(found(images), krr_st.find_teacher(config(), run, source)(images))  # from the store


# -- flags and the whole -----------------------------------------------------------------------------------------------------------
def test_bad_input_is_named(run, data, tmp_path):
    for changes, message in (
        ({"held_out": 10}, "leaves no source class"),
        ({"images": 5000}, "more than the"),
        ({"net": "hf:x"}, "small:NAME"),
        ({"net": "small:convnet-avg-4x4x4x4"}, "16 must divide"),
        ({"others": ("small:mlp-16", "small:convnet-avg-4x8")}, "named twice"),
        ({"teacher": "nothing:x", "barlow_twins.steps": 4}, "names no encoder"),
        ({"target": "shapes"}, "--image-size"),
        ({"target": "digits", "held_out": 3}, "--held-out 3 has no effect beside a target"),
        ({"teacher": "run:x", "barlow_twins.noise": 0.1, "barlow_twins.steps": 4}, "--barlow-twins.noise 0.1 has no effect on a teacher"),
    ):
        with Run(tmp_path / message, 0, store=run.store, plots=False) as other, pytest.raises(UserError, match=message):
            krr_st.main(config(**changes), other)
    with pytest.raises(UserError, match=r"--barlow-twins.steps 2 has no effect on a teacher"):
        krr_st.main(config(), run, data=data, teacher=wrapped.Encoder(small_net(data)))


def test_claims_speak_of_arms_and_metrics_that_are_there():
    cfg = krr_st.Config()
    assert {claim.metric for claim in krr_st.CLAIMS} == {"mse", "probe", "finetune", *(f"mse {other}" for other in cfg.others)}
    assert {arm for claim in krr_st.CLAIMS for arm in (claim.arm, claim.versus)} == krr_st.ARMS.keys()
    for arm in krr_st.ARMS:
        cards.config_of(krr_st, arm)


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


def test_a_stopped_run_ends_bitwise_like_a_straight_one(tmp_path):
    result = assert_resumes("krr-st", tmp_path, 8, SMALL | {"repeats": 1, "barlow_twins.steps": 4})  # in the outer loop
    assert all(map(math.isfinite, result["metrics"].values()))
    stored = load_file(tmp_path / "straight" / "student" / "distilled.safetensors")
    assert stored["images"].shape == (8, 1, 8, 8)
    assert stored["targets"].shape == (8, 16)  # two halvings of 8 pixels leave 2x2 positions of 4 channels
    data = load_images("digits", seed=0)
    encoder = hub.load_encoder(f"run:{tmp_path / 'straight'}", data=data)
    assert encoder(data.test.take(torch.arange(3)).images).shape == (3, 32)
