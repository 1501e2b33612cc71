import copy

import pytest
import torch
from torch import nn

from stillroom.core.errors import UserError
from stillroom.nets.build import NAMES, build, keep_outputs, with_head

GREY = {"classes": 10, "channels": 1, "size": 8, "mean": (0.3,), "std": (0.4,)}
COLOUR = {"classes": 7, "channels": 3, "size": 32, "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4)}


@pytest.mark.parametrize("shape", [GREY, COLOUR])
@pytest.mark.parametrize("name", NAMES)
def test_every_net_classifies_and_can_be_rebuilt(name, shape):
    torch.manual_seed(0)
    net = build(name, **shape).eval()
    images = torch.rand(2, shape["channels"], shape["size"], shape["size"])
    features = net.features(images)
    assert features.ndim == 2
    assert isinstance(net.head, nn.Linear)
    logits = net(images)
    assert logits.shape == (2, shape["classes"])
    torch.testing.assert_close(logits, net.head(features))
    again = build(**net.spec).eval()
    again.load_state_dict(net.state_dict())
    assert torch.equal(again(images), logits)
    assert again.spec == net.spec


@pytest.mark.parametrize("name", ["convnet-avg-4x8", "mlp-16", "vit-p4-w16-d1"])
def test_a_body_under_a_new_head_keeps_all_but_the_head(name):
    torch.manual_seed(0)
    net, images = build(name, **GREY), torch.rand(5, 1, 8, 8)
    net(images)  # moves running statistics
    net.eval()
    other = with_head(net, 3).eval()
    torch.testing.assert_close(other.features(images), net.features(images))
    assert other(images).shape == (5, 3)
    assert (other.spec["classes"], net.spec["classes"], other.head.out_features) == (3, 10, 3)
    same = with_head(net, 10)
    assert not torch.equal(same.head.weight, net.head.weight)
    assert not {id(p) for p in same.parameters()} & {id(p) for p in net.parameters()}


@pytest.mark.parametrize(("name", "parameters"), [("resnet20", 269_722), ("resnet32", 464_154), ("preact-resnet18", 11_172_170)])
def test_parameter_counts_on_cifar10(name, parameters):
    """.27 and .46 million in He et al. 2015, table 6; pre-activation ResNet-18: the usual 11,171,146 and the last norm's 1024."""
    net = build(name, **{**COLOUR, "classes": 10})
    assert sum(p.numel() for p in net.parameters()) == parameters


@pytest.mark.parametrize("name", ["mlp-64x64x64", "convnet", "resnet32", "preact-resnet18"])
def test_signal_keeps_its_scale_through_the_layers(name):
    torch.manual_seed(0)
    net = build(name, **COLOUR)
    features = net.features(torch.rand(8, 3, 32, 32))
    assert 0.05 < features.std() < 20


def test_the_net_normalises_its_input():
    torch.manual_seed(0)
    net = build("mlp-16", **COLOUR)
    mean, std = (torch.tensor(COLOUR[key]).view(3, 1, 1) for key in ("mean", "std"))
    plain = build("mlp-16", **{**COLOUR, "mean": (0.0,) * 3, "std": (1.0,) * 3})
    weights = {key: value for key, value in net.state_dict().items() if "mean" not in key and "std" not in key}
    plain.load_state_dict(weights, strict=False)
    images = torch.rand(4, 3, 32, 32)
    torch.testing.assert_close(net(images), plain((images - mean) / std))


@pytest.mark.parametrize(
    ("name", "near"), [("resnet21", "resnet20"), ("convnet16", "convnet-w16"), ("mlp-", "mlp"), ("mlp-0", "mlp"), ("xyz", "resnet8")]
)
def test_unknown_names_suggest_near_ones(name, near):
    with pytest.raises(UserError, match=near):
        build(name, **GREY)


@pytest.mark.parametrize("name", ["mlp-99999", "mlp-65536x65536", "vit-p1-w16-d9999", "resnet9998", "mlp" + "-1" * 99, "convnet-w30000"])
def test_networks_that_are_not_small_are_refused_before_they_are_made(name):
    with pytest.raises(UserError, match=r"no small network|parameters"):
        build(name, **GREY)


@pytest.mark.parametrize("name", NAMES)
def test_counting_the_parameters_draws_nothing(name, monkeypatch):
    torch.manual_seed(0)
    net = build(name, **GREY)
    after = torch.rand(1)
    monkeypatch.setattr("stillroom.nets.build.check_parameters", lambda *_: None)
    torch.manual_seed(0)
    plain = build(name, **GREY)
    assert torch.equal(after, torch.rand(1))
    assert all(torch.equal(value, plain.state_dict()[key]) for key, value in net.state_dict().items())


@pytest.mark.parametrize("rows", [slice(2, 5), slice(None, None, 4), torch.tensor([3, 0])])
def test_keep_outputs_gives_the_same_logits(rows):
    torch.manual_seed(0)
    net = build("convnet-w4", **GREY).eval()
    before = copy.deepcopy(net.state_dict())
    images = torch.rand(3, 1, 8, 8)
    kept = keep_outputs(net, rows)
    torch.testing.assert_close(kept(images), net(images)[:, rows])
    assert kept.spec["classes"] == kept.head.out_features == kept(images).shape[1]
    build(**kept.spec).load_state_dict(kept.state_dict())
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())
    assert net.spec["classes"] == 10


def test_keep_outputs_of_a_plain_module():
    net = nn.Sequential(nn.Linear(4, 6, bias=False), nn.ReLU(), nn.Linear(6, 5))
    x = torch.rand(2, 4)
    torch.testing.assert_close(keep_outputs(net, slice(3))(x), net(x)[:, :3])
    with pytest.raises(ValueError, match="no linear layer"):
        keep_outputs(nn.ReLU(), slice(1))


def tiny(kind: str):
    transformers = pytest.importorskip("transformers")
    if kind == "vit":
        sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
        return transformers.ViTForImageClassification(transformers.ViTConfig(**sizes, image_size=8, patch_size=4, num_labels=6))
    return transformers.ResNetForImageClassification(
        transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=6)
    )


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_keep_outputs_of_a_transformers_classifier_round_trips(kind, tmp_path):
    net = tiny(kind).eval()
    net.config.id2label = {row: f"name{row}" for row in range(6)}
    kept = keep_outputs(net, slice(1, 4))
    images = torch.rand(2, 3, 8, 8)
    torch.testing.assert_close(kept(images).logits, net(images).logits[:, 1:4])
    assert kept.config.id2label == {0: "name1", 1: "name2", 2: "name3"}
    assert kept(images, labels=torch.tensor([0, 2])).loss.isfinite()
    assert net.config.num_labels == 6
    kept.save_pretrained(tmp_path)
    again = type(net).from_pretrained(tmp_path).eval()
    torch.testing.assert_close(again(images).logits, kept(images).logits)
