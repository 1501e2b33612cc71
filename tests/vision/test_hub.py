import json
import pickle
import sys
import types

import pytest
import torch
from torch import nn

from stillroom.core.errors import UserError
from stillroom.data.embedded import digits, shapes
from stillroom.nets.build import build, keep_outputs
from stillroom.nets.wrapped import Wrapped
from stillroom.vision.hub import load_classifier, load_encoder
from stillroom.vision.saving import save_classifier

transformers = pytest.importorskip("transformers")
DIGITS, SHAPES = digits(), shapes(count=30, size=16)


def tiny(kind: str, classes: int, channels: int = 3) -> nn.Module:
    torch.manual_seed(0)
    common = {"num_labels": classes, "num_channels": channels}
    if kind == "vit":
        sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
        return transformers.ViTForImageClassification(transformers.ViTConfig(**sizes, image_size=8, patch_size=4, **common)).eval()
    if kind == "resnet":
        config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", **common)
        return transformers.ResNetForImageClassification(config).eval()
    config = transformers.ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, image_size=16, **common)
    return transformers.ConvNextForImageClassification(config).eval()


def refused(*parts: str, spec: str, data=SHAPES, **options) -> None:
    with pytest.raises(UserError) as error:
        load_classifier(spec, data=data, **options)
    for part in parts:
        assert part in str(error.value)


@pytest.mark.parametrize("kind", ["vit", "resnet", "convnext"])
def test_transformers_classifier_round_trips_with_plain_transformers(kind, tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    tiny(kind, 6).save_pretrained(source)
    processor = {"do_resize": True, "size": {"height": 12, "width": 12}, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]}
    if kind == "vit":
        processor["size"] = {"height": 8, "width": 8}
    (source / "preprocessor_config.json").write_text(json.dumps(processor))
    net = load_classifier(f"hf:{source}", data=SHAPES).eval()
    images = SHAPES.test.images()[:4]
    save_classifier(net, target)
    plain = transformers.AutoModelForImageClassification.from_pretrained(target).eval()
    side = processor["size"]["height"]
    mean, std = (torch.tensor(processor[key]).view(3, 1, 1) for key in ("image_mean", "image_std"))
    small = nn.functional.interpolate(images, size=(side, side), mode="bilinear", antialias=True)
    torch.testing.assert_close(plain(pixel_values=(small - mean) / std).logits, net(images))
    for spec in (f"hf:{target}", f"run:{target}"):
        torch.testing.assert_close(load_classifier(spec, data=SHAPES).eval()(images), net(images))


def test_the_saved_image_processor_does_what_the_net_does(tmp_path):
    tiny("vit", 6).save_pretrained(tmp_path / "source")
    net = load_classifier(f"hf:{tmp_path}/source", data=SHAPES, fresh=True).eval()
    save_classifier(net, tmp_path / "saved")
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "saved")
    pixels = SHAPES.test.pixels[:3]
    theirs = torch.as_tensor(processor(list(pixels.permute(0, 2, 3, 1).numpy()), return_tensors="pt")["pixel_values"])
    images = nn.functional.interpolate(SHAPES.test.images()[:3], size=(8, 8), mode="bilinear", antialias=True)
    torch.testing.assert_close(theirs, net.normalise(images), atol=0.05, rtol=0)  # theirs rounds the resized pixels to whole numbers


def test_transformers_reads_a_normalisation_of_other_scales(tmp_path):
    tiny("resnet", 6).save_pretrained(tmp_path)
    pixel = torch.full((1, 3, 4, 4), 0.5)
    for processor, expected in (
        ({"do_rescale": True, "rescale_factor": 1 / 127.5, "image_mean": [0.5] * 3, "image_std": [0.25] * 3}, (1 - 0.5) / 0.25),
        ({"do_rescale": False, "image_mean": [100.0] * 3, "image_std": [50.0] * 3}, (127.5 - 100) / 50),
        ({"do_normalize": False}, 0.5),
    ):
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
        result = load_classifier(f"hf:{tmp_path}", data=SHAPES).normalise(pixel)
        torch.testing.assert_close(result, torch.full_like(pixel, expected))


def test_fresh_transformers_net_has_the_classes_and_channels_of_the_data(tmp_path):
    source = tiny("vit", 1000)
    source.save_pretrained(tmp_path / "source")
    net = load_classifier(f"hf:{tmp_path}/source", data=DIGITS, fresh=True)
    assert net(DIGITS.test.images()[:2]).shape == (2, 10)
    assert net.model.config.num_channels == 1
    assert net.model.config.id2label[3] == "3"
    weights = [dict(model.named_parameters()) for model in (net.model, source)]
    same = [name for name in weights[0] if weights[0][name].shape == weights[1][name].shape and weights[0][name].std() > 0]
    assert same
    assert not any(torch.equal(weights[0][name], weights[1][name]) for name in same)
    save_classifier(net, tmp_path / "saved")
    again = load_classifier(f"run:{tmp_path}/saved", data=DIGITS)
    torch.testing.assert_close(again.eval()(DIGITS.test.images()[:2]), net.eval()(DIGITS.test.images()[:2]))


def test_a_small_encoder_is_a_fresh_body_by_name():
    torch.manual_seed(0)
    encoder, again = (load_encoder("small:convnet-avg-4x8", data=SHAPES, fresh=fresh) for fresh in (False, True))
    images = SHAPES.test.images()[:4]
    assert encoder(images).shape == (4, 8 * 4 * 4)
    torch.testing.assert_close(encoder(images), encoder.net.body(images))
    assert not torch.equal(encoder.net.body[1].weight, again.net.body[1].weight)


def test_encoders_with_random_weights_have_the_channels_and_normalisation_of_the_data(tmp_path):
    tiny("vit", 6).save_pretrained(tmp_path / "vit")
    (tmp_path / "vit" / "preprocessor_config.json").write_text("{}")
    net = build("mlp-16", classes=3, channels=3, size=16, mean=SHAPES.mean, std=SHAPES.std)
    save_classifier(net, tmp_path / "run" / "student")
    for spec, data in ((f"hf:{tmp_path / 'vit'}", DIGITS), (f"run:{tmp_path / 'vit'}", DIGITS), (f"run:{tmp_path / 'run'}", SHAPES)):
        fresh, images = load_encoder(spec, data=data, fresh=True), data.test.images()[:4]
        trained = load_encoder(spec, data=SHAPES)
        assert fresh(images).shape == (4, 16)
        assert not torch.equal(next(p for p in fresh.parameters() if p.ndim > 1).flatten()[:8],
                               next(p for p in trained.parameters() if p.ndim > 1).flatten()[:8])  # fmt: skip
        normalise = fresh.normalise if hasattr(fresh, "normalise") else fresh.net.body[0]
        torch.testing.assert_close(normalise.mean.flatten(), torch.tensor(data.mean))
    torch.testing.assert_close(load_encoder(f"run:{tmp_path / 'run'}", data=SHAPES)(images), net.features(images))


def test_what_names_no_encoder_is_refused():
    for spec in ("vit", "small:", "timm:vit", "hf:"):
        with pytest.raises(UserError, match="names no encoder"):
            load_encoder(spec, data=SHAPES)


def test_grey_images_are_repeated_over_a_colour_model(tmp_path):
    tiny("vit", 10).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="no preprocessor_config"):
        net = load_classifier(f"hf:{tmp_path}", data=DIGITS).eval()
    images = DIGITS.test.images()[:2]
    torch.testing.assert_close(net(images), net(images.repeat(1, 3, 1, 1)))
    torch.testing.assert_close(net(images), net.model(images.repeat(1, 3, 1, 1) * 2 - 1).logits)
    tiny("vit", 6, channels=1).save_pretrained(tmp_path / "grey")
    refused("1 channel", "has 3", spec=f"hf:{tmp_path}/grey")


def test_a_wrapped_net_keeps_outputs_and_gradients(tmp_path):
    net = Wrapped(tiny("vit", 8), 8, (0.5,) * 3, (0.5,) * 3)
    images = SHAPES.test.images()[:2]
    kept = keep_outputs(net, slice(0, 6))
    torch.testing.assert_close(kept(images), net(images)[:, :6])
    save_classifier(kept, tmp_path)
    torch.testing.assert_close(load_classifier(f"hf:{tmp_path}", data=SHAPES).eval()(images), kept(images))
    images.requires_grad_()
    net(images).sum().backward()
    assert images.grad.abs().sum() > 0


def test_small_nets_round_trip(tmp_path):
    net = load_classifier("small:convnet-w4", data=DIGITS)
    net(DIGITS.train.images())  # moves the running statistics
    save_classifier(net, tmp_path / "student")
    images = DIGITS.test.images()[:5]
    for spec in (f"run:{tmp_path}", f"run:{tmp_path}/student"):
        torch.testing.assert_close(load_classifier(spec, data=DIGITS).eval()(images), net.eval()(images))
    fresh = load_classifier(f"run:{tmp_path}", data=DIGITS, fresh=True)
    assert not torch.equal(fresh.head.weight, net.head.weight)
    refused("10 classes", "has 6", spec=f"run:{tmp_path}")
    save_classifier(build("mlp-8", classes=6, channels=1, size=8, mean=(0.5,), std=(0.5,)), tmp_path / "student")
    refused("1 channels and 8 pixels", "3 channels and 16", spec=f"run:{tmp_path}")


def test_any_other_module_is_saved_for_python(tmp_path):
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10, bias=False))
    save_classifier(net, tmp_path / "net")
    from safetensors.torch import load_file

    assert torch.equal(load_file(tmp_path / "net" / "model.safetensors")["1.weight"], net[1].weight)
    refused("torch.nn.modules.container.Sequential", "load_file", spec=f"run:{tmp_path}/net", data=DIGITS)


def test_saving_replaces_whole_and_leaves_nothing_half_written(tmp_path):
    net = load_classifier("small:mlp-8", data=DIGITS)
    save_classifier(net, tmp_path / "net")
    (tmp_path / "net" / "old").touch()
    save_classifier(net, tmp_path / "net")
    assert sorted(path.name for path in (tmp_path / "net").iterdir()) == ["config.json", "model.safetensors"]
    net.spec = {"not": object()}
    with pytest.raises(TypeError):
        save_classifier(net, tmp_path / "net")
    assert [path.name for path in tmp_path.iterdir()] == ["net"]
    load_classifier(f"run:{tmp_path}/net", data=DIGITS)


class Trap:
    opened = False

    def __reduce__(self):
        return (setattr, (Trap, "opened", True))


@pytest.mark.parametrize("kind", ["hf", "run"])
@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
def test_pickled_weights_are_named_and_never_opened(kind, name, tmp_path):
    tiny("vit", 6).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    refused("no weights", spec=f"{kind}:{tmp_path}")
    (tmp_path / name).write_bytes(pickle.dumps(Trap()))
    refused(name, "pickle", "safetensors", spec=f"{kind}:{tmp_path}")
    assert not Trap.opened


def test_what_cannot_be_loaded_says_why(tmp_path):
    refused("small:NAME", spec="resnet8")
    refused("small:NAME", spec="small:")
    refused("resnet20", spec="small:resnet21")
    refused("no such folder", spec=f"run:{tmp_path}/nowhere")
    refused("no config.json", spec=f"hf:{tmp_path}")
    (tmp_path / "config.json").write_text("{")
    refused("not readable JSON", spec=f"run:{tmp_path}")
    tiny("vit", 4).save_pretrained(tmp_path / "four")
    refused("4 classes", "has 6", spec=f"hf:{tmp_path}/four")
    save_classifier(load_classifier("small:mlp-8", data=SHAPES), tmp_path / "small")
    refused("run:", spec=f"hf:{tmp_path}/small")
    weights = tmp_path / "small" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:200])
    refused("damaged", spec=f"run:{tmp_path}/small")


def test_a_damaged_or_headless_transformers_folder_is_refused(tmp_path):
    net = tiny("vit", 6)
    net.save_pretrained(tmp_path / "whole")
    weights = tmp_path / "whole" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:500])
    refused("could not be loaded", spec=f"hf:{tmp_path}/whole")
    net.vit.config.num_labels = 6
    net.vit.save_pretrained(tmp_path / "headless")
    refused("not a trained classifier", "classifier.", spec=f"hf:{tmp_path}/headless")


def test_an_unknown_hub_id_is_refused_offline(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refused("could not be loaded", spec="hf:nobody/nothing")


def test_missing_packages_name_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    refused("stillroom[timm]", spec="timm:resnet18")
    monkeypatch.setitem(sys.modules, "transformers", None)
    refused("stillroom[hf]", spec="hf:somewhere")


def test_timm_models_are_wrapped_by_their_own_config(monkeypatch):
    """With a stand-in: timm itself needs torchvision, which is not installed here."""

    def create_model(name, pretrained, num_classes=6, in_chans=3):
        net = nn.Sequential(nn.Flatten(), nn.Linear(in_chans * 64, num_classes))
        net.num_classes = num_classes
        return net

    data = types.SimpleNamespace(resolve_model_data_config=lambda model: {"mean": (0.1,) * 3, "std": (0.2,) * 3, "input_size": (3, 8, 8)})
    monkeypatch.setitem(sys.modules, "timm", types.SimpleNamespace(create_model=create_model, data=data))
    net = load_classifier("timm:any", data=SHAPES)
    assert net(SHAPES.test.images()[:2]).shape == (2, 6)
    assert net.normalise.mean.flatten().tolist() == pytest.approx([0.1] * 3)
    assert load_classifier("timm:any", data=DIGITS, fresh=True)(DIGITS.test.images()[:2]).shape == (2, 10)
    refused("6 classes", "has 10", spec="timm:any", data=DIGITS)
