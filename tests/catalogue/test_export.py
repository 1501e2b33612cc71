import json

import pytest
import torch
from torch import nn

from stillroom import cli
from stillroom.catalogue import cards, export, report
from stillroom.catalogue.execute import execute
from stillroom.catalogue.export import export as write
from stillroom.core import config as configs
from stillroom.core.errors import UserError
from stillroom.core.run import Run
from stillroom.nets import wrapped
from stillroom.nets.build import build
from stillroom.vision import saving

IMAGES = torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr("stillroom.metrics.cost.SECONDS", 0.001)


def small(folder) -> nn.Module:
    torch.manual_seed(0)
    net = build("convnet-w4", classes=4, channels=3, size=8, mean=(0.5,) * 3, std=(0.25,) * 3).eval()
    net(IMAGES)
    saving.save_classifier(net, folder / "student")
    return net


def vit(folder) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16, "image_size": 8, "patch_size": 4}
    model = transformers.ViTForImageClassification(transformers.ViTConfig(**sizes, num_labels=4))
    net = wrapped.Wrapped(model, 8, (0.5,) * 3, (0.5,) * 3).eval()
    saving.save_classifier(net, folder / "student")
    return net


@pytest.mark.parametrize("kind", [small, vit])
def test_onnx_agrees_with_pytorch_at_any_batch(kind, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    net = kind(tmp_path)
    folder, rows = write(tmp_path, "onnx")
    assert rows["onnx"]["difference"] < 1e-5
    session = runtime.InferenceSession(str(folder / "model.onnx"))
    assert session.get_inputs()[0].shape[1:] == [3, 8, 8]
    for count in (1, 2, 5):
        (logits,) = session.run(None, {"images": IMAGES[:count].numpy()})
        torch.testing.assert_close(torch.from_numpy(logits), net(IMAGES[:count]).detach(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", [small, vit])
def test_torch_export_loads_without_the_class(kind, tmp_path):
    net = kind(tmp_path)
    folder, rows = write(tmp_path, "torch-export")
    loaded = torch.export.load(folder / "model.pt2").module()
    torch.testing.assert_close(loaded(IMAGES), net(IMAGES), atol=1e-5, rtol=1e-4)
    assert rows["torch-export"]["bytes"] == sum(file.stat().st_size for file in folder.iterdir())


def test_safetensors_is_the_librarys_own_folder(tmp_path):
    net = vit(tmp_path)
    folder, _ = write(tmp_path, "safetensors", tmp_path / "elsewhere")
    assert folder == tmp_path / "elsewhere"
    transformers = pytest.importorskip("transformers")
    plain = transformers.AutoModelForImageClassification.from_pretrained(folder).eval()
    torch.testing.assert_close(plain(pixel_values=(IMAGES - 0.5) / 0.5).logits, net(IMAGES))


def test_a_finished_run_shows_what_was_exported(tmp_path, capsys):
    changes = {"teacher_steps": 4, "steps": 4, "student": "small:convnet-w4", "teacher": "small:convnet-w4"}
    config = configs.override(cards.load("quantized-distillation").Config(), changes)
    with Run(tmp_path / "run", plots=False) as run:
        execute("quantized-distillation", config, run)
    report.write(tmp_path / "run")
    for to in ("safetensors", "torch-export"):
        assert cli.main(["export", str(tmp_path / "run"), "--to", to]) == 0
    assert "written and checked" in capsys.readouterr().out
    assert list(json.loads((tmp_path / "run" / "exports.json").read_text())) == ["eager", "safetensors", "torch-export"]
    page = (tmp_path / "run" / "report.html").read_text()
    assert "exported student" in page
    assert "torch-export" in page
    assert (tmp_path / "run" / "exported" / "safetensors" / "model.safetensors").exists()  # packed weights come unpacked
    (tmp_path / "run" / "exports.json").write_text("{")
    refused(tmp_path / "run", "safetensors", "exports.json is damaged")


def refused(folder, to, *parts: str) -> None:
    with pytest.raises(UserError) as error:
        write(folder, to)
    for part in parts:
        assert part in str(error.value)


def test_mistakes_are_named(tmp_path, monkeypatch):
    refused(tmp_path / "nowhere", "onnx", "nowhere", "no such run")
    refused(tmp_path, "onnx", "no saved student", "finish the run")
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline" / "model_index.json").write_text("{}")
    refused(tmp_path / "pipeline", "onnx", "diffusers pipeline", "image classifiers")
    small(tmp_path)
    (tmp_path / "student" / "exits.json").write_text("{}")
    refused(tmp_path, "torch-export", "depend on the image", "EarlyExit.load")
    (tmp_path / "student" / "exits.json").unlink()
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    refused(tmp_path, "onnx", "pip install 'stillroom[export]'")
    assert not (tmp_path / "exported" / "onnx").exists()


def test_only_an_earlier_export_of_the_same_run_is_replaced(tmp_path):
    small(tmp_path / "run")
    small(tmp_path / "other")
    out = tmp_path / "out"
    out.mkdir()
    assert write(tmp_path / "run", "safetensors", out)[0] == out  # an empty folder may be used
    write(tmp_path / "run", "torch-export", out)  # and an earlier export replaced
    assert (out / "model.pt2").exists()
    assert not (out / "model.safetensors").exists()

    def kept(run, folder) -> None:
        before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        with pytest.raises(UserError, match="name"):
            write(run, "safetensors", folder)
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before

    kept(tmp_path / "other", out)
    (out / "notes.txt").write_text("precious")
    kept(tmp_path / "run", out)
    for folder in (tmp_path / "run", tmp_path / "run" / "student", tmp_path, tmp_path / "other" / "student"):
        kept(tmp_path / "run", folder)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("precious")
    kept(tmp_path / "run", tmp_path / "mine")
    kept(tmp_path / "run", tmp_path / "mine" / "thesis.tex")
    (tmp_path / "link").symlink_to(tmp_path / "mine")
    kept(tmp_path / "run", tmp_path / "link")
    (tmp_path / "marked").mkdir()
    (tmp_path / "marked" / export.MARK).write_text("[]")
    kept(tmp_path / "run", tmp_path / "marked")


def test_a_finished_run_whose_student_is_gone_says_so(tmp_path):
    small(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "result.json").write_text("{}")
    (tmp_path / "student" / "model.safetensors").write_bytes(b"")
    refused(tmp_path, "safetensors", "model.safetensors could not be read")
    (tmp_path / "student" / "model.safetensors").unlink()
    refused(tmp_path, "safetensors", "student: no weights were found")
    (tmp_path / "student" / "config.json").unlink()
    refused(tmp_path, "safetensors", "no saved student")
    (tmp_path / "student").rmdir()
    refused(tmp_path, "safetensors", "finished run without a student")


def test_a_student_that_comes_out_different_is_not_kept(tmp_path, monkeypatch):
    small(tmp_path)
    monkeypatch.setattr(export, "_torch_export", lambda net, images, place: lambda x: net(x) + 1)
    refused(tmp_path, "torch-export", "differs from PyTorch", "nothing was kept")
    assert not (tmp_path / "exported" / "torch-export").exists()
    monkeypatch.setattr(export, "_torch_export", lambda net, images, place: lambda x: net(x) * float("nan"))
    refused(tmp_path, "torch-export", "differs from PyTorch")
