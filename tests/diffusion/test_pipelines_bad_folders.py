"""Folders of pipelines that are damaged or mean harm: a message that names the file, before diffusers opens anything, or a pipeline."""

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch

from stillroom.core.errors import UserError
from stillroom.diffusion import pipelines
from stillroom.nets.checked import INDEX
from tests.damage import Trap, rewrite, survives

from .tiny import ddpm, sd15

diffusers = pytest.importorskip("diffusers")


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    return Path(sd15(tmp_path_factory.mktemp("sd15")))


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "pipe"))


@pytest.fixture
def closed(monkeypatch):
    """diffusers, which must not be asked to open anything."""
    for kind in (diffusers.DiffusionPipeline, diffusers.ModelMixin):
        monkeypatch.setattr(kind, "from_pretrained", lambda *args, **kwargs: pytest.fail("it was opened"))


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_pickles_stay_closed(part, folder, closed):
    for file in (folder / part).glob("*.safetensors"):
        file.unlink()
    (folder / part / "pytorch_model.bin").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(UserError, match=rf"{part}: pytorch_model\.bin is a pickle"):
        pipelines.load(str(folder))
    assert not Trap.opened


@pytest.mark.parametrize("name", ["../vae/diffusion_pytorch_model.safetensors", "/etc/passwd", "weights.bin", "gone.safetensors", 3])
def test_an_index_names_only_safetensors_of_its_own_folder(name, folder, closed):
    index = folder / "unet" / f"diffusion_pytorch_model{INDEX}"
    index.write_text(json.dumps({"metadata": {}, "weight_map": {"x": name}}))
    with pytest.raises(UserError, match=r"unet/diffusion_pytorch_model\.safetensors\.index\.json: weight_map\.x"):
        pipelines.load(str(folder))


def test_a_sharded_pipeline_loads(folder):
    unet = diffusers.UNet2DConditionModel.from_pretrained(folder / "unet", trust_remote_code=False)
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    unet.save_pretrained(folder / "unet", max_shard_size="50KB")
    assert (folder / "unet" / f"diffusion_pytorch_model{INDEX}").is_file()
    again = pipelines.load(str(folder)).denoiser.net.net
    assert all(torch.equal(a, b) for a, b in zip(unet.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize(
    "value",
    [["os", "system"], ["antigravity", "x"], ["diffusers", 3], ["diffusers"], [None, "x"], [], ["", ""], ["diffusers", "DDPMPipeline"]],
)
def test_a_part_comes_from_diffusers_or_transformers(value, folder, closed):
    rewrite(folder / "model_index.json", unet=value)
    with pytest.raises(UserError, match=r"model_index\.json: unet is"):
        pipelines.load(str(folder))


@pytest.mark.parametrize("value", [None, 3, ["pipeline", "Foreign"], {}])
def test_the_class_is_a_name(value, folder, closed):
    (folder / "pipeline.py").write_text("raise SystemExit")
    rewrite(folder / "model_index.json", _class_name=value)
    with pytest.raises(UserError, match=r"model_index\.json: _class_name"):
        pipelines.load(str(folder))


def test_a_part_lies_in_its_own_folder(folder, closed):
    """diffusers would take it from the pipeline's folder instead, where nothing was checked."""
    shutil.rmtree(folder / "text_encoder")
    with pytest.raises(UserError, match=r"text_encoder is not a folder"):
        pipelines.load(str(folder))


def test_an_adapter_in_place_of_a_part_is_not_followed(folder, closed):
    (folder / "text_encoder" / "config.json").unlink()
    (folder / "text_encoder" / "adapter_config.json").write_text('{"base_model_name_or_path": "/somewhere/else"}')
    with pytest.raises(UserError, match=r"text_encoder/adapter_config\.json"):
        pipelines.load(str(folder))


@pytest.mark.parametrize(
    "name", ["model_index.json", "unet/config.json", "vae/diffusion_pytorch_model.safetensors", "tokenizer/tokenizer.json"]
)
def test_a_pipe_keeps_nobody_waiting(name, folder, closed):
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    with pytest.raises(UserError, match=r"holds no model_index\.json" if name == "model_index.json" else rf"{name} is neither"):
        pipelines.load(str(folder))


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("scheduler/scheduler_config.json", "num_train_timesteps", 10**11), ("unet/config.json", "layers_per_block", 10**9),
        ("text_encoder/config.json", "hidden_size", "x"), ("text_encoder/config.json", "transformers_weights", "../unet/x.safetensors"),
        ("vae/config.json", "latent_channels", 10**30),
    ],
)  # fmt: skip
def test_a_field_of_a_part_is_named(name, field, value, folder, closed):
    rewrite(folder / name, **{field: value})
    with pytest.raises(UserError, match=f"{name}: {field}"):
        pipelines.load(str(folder))


@pytest.mark.parametrize("content", ["", "{", "[]", "\x00"])
@pytest.mark.parametrize("name", ["model_index.json", "unet/config.json", "scheduler/scheduler_config.json"])
def test_files_that_hold_no_object_are_named(name, content, folder, closed):
    (folder / name).write_text(content)
    with pytest.raises(UserError, match=name):
        pipelines.load(str(folder))


def test_weights_that_are_damaged_or_lack_a_layer_are_refused(folder):
    from safetensors.torch import load_file, save_file

    for part in ("unet/diffusion_pytorch_model", "text_encoder/model"):
        file = folder / f"{part}.safetensors"
        good = load_file(file)
        save_file(dict(list(good.items())[1:]), file, metadata={"format": "pt"})
        with pytest.raises(UserError, match=f"{folder}"):
            pipelines.load(str(folder))
        file.write_bytes(b"\xff" * 64)
        with pytest.raises(UserError, match=f"{folder}"):
            pipelines.load(str(folder))
        save_file(good, file, metadata={"format": "pt"})


def test_what_lies_on_the_hub_is_checked_as_what_lies_here(folder, monkeypatch):
    asked = []
    monkeypatch.setattr(diffusers.DiffusionPipeline, "download", lambda name, **how: asked.append((name, how)) or str(folder))
    assert pipelines.load("org/pipe").where == "org/pipe"
    assert asked == [("org/pipe", {"use_safetensors": True, "trust_remote_code": False})]
    rewrite(folder / "model_index.json", unet=["os", "system"])
    with pytest.raises(UserError, match=r"model_index\.json: unet is"):
        pipelines.load("org/pipe")


@pytest.mark.parametrize(("name", "cases"), [("model_index.json", 60), ("unet/config.json", 60), ("scheduler/scheduler_config.json", 40)])
def test_mutants_of_a_pipelines_files_are_refused_or_load(name, cases, tmp_path):
    folder = Path(ddpm(tmp_path / "pipe"))
    file = folder / name

    assert survives(lambda: pipelines.load(str(folder)), file, file.read_text(), cases, folder) > 0
