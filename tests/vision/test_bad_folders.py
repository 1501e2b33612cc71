"""Folders of models that lie, are damaged or mean harm: a message that names the file, never a traceback, a question or foreign code."""

import ast
import json
import pickle
import sys
from pathlib import Path

import pytest
import torch

import stillroom
from stillroom.core.errors import UserError
from stillroom.data.embedded import digits, shapes
from stillroom.lm.teachers import load_causal
from stillroom.nets.checked import INDEX, Fields, only_safetensors
from stillroom.nets.pretrained import pretrained
from stillroom.vision.hub import load_classifier, load_student
from stillroom.vision.saving import save_classifier
from tests.damage import Trap, rewrite, survives

transformers = pytest.importorskip("transformers")
DIGITS, SHAPES = digits(), shapes(count=30, size=16)
PROCESSOR = {
    "do_resize": True, "do_rescale": True, "do_normalize": True, "do_center_crop": False, "size": {"height": 8, "width": 8},
    "crop_size": None, "rescale_factor": 1 / 255, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4],
}  # fmt: skip
SMALL = {"name": "mlp-8", "classes": 10, "channels": 1, "size": 8, "mean": [0.3], "std": [0.4]}


def save_vit(folder: Path, **shards) -> Path:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = transformers.ViTConfig(**sizes, image_size=8, patch_size=4, num_labels=6)
    transformers.ViTForImageClassification(config).save_pretrained(folder, **shards)
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    return folder


@pytest.fixture(scope="module")
def vit(tmp_path_factory) -> Path:
    return save_vit(tmp_path_factory.mktemp("vit"))


# --- code ------------------------------------------------------------------------------------------------------------------------------

CODE = "from pathlib import Path\nPath(__file__).with_name('ran').touch()\nimport sys\nsys.ran_foreign_code = True\n"


@pytest.fixture
def asked(monkeypatch):
    """What was asked on standard input; a process that reads it would be answered yes."""
    questions: list[str] = []
    monkeypatch.setattr("builtins.input", lambda question="": questions.append(question) or "y")
    return questions


LOADERS = {
    "hf": lambda folder: load_classifier(f"hf:{folder}", data=SHAPES),
    "run": lambda folder: load_classifier(f"run:{folder}", data=SHAPES),
    "fresh": lambda folder: load_classifier(f"hf:{folder}", data=SHAPES, fresh=True),
    "masked": lambda folder: pretrained(f"hf:{folder}", "AutoModelForMaskedLM"),
    "causal": lambda folder: load_causal(f"hf:{folder}"),
}


@pytest.mark.parametrize("load", LOADERS.values(), ids=LOADERS)
def test_code_that_a_config_names_is_refused_without_a_question(load, tmp_path, asked):
    classes = ("AutoModelForImageClassification", "AutoModelForMaskedLM", "AutoModelForCausalLM")
    auto_map = {"AutoConfig": "foreign.Config"} | dict.fromkeys(classes, "foreign.Net")
    save_vit(tmp_path)
    rewrite(tmp_path / "config.json", model_type="foreign", auto_map=auto_map)
    (tmp_path / "foreign.py").write_text(CODE)
    with pytest.raises(UserError, match="custom code"):
        load(tmp_path)
    assert not asked
    assert not hasattr(sys, "ran_foreign_code")


def test_every_call_that_could_run_foreign_code_says_that_it_must_not():
    """Classes that choose a model by its config. (from_config of diffusers' schedulers takes no code.)"""
    found = 0
    for file in Path(stillroom.__file__).parent.rglob("*.py"):
        tree = ast.parse(file.read_text())
        for call in ast.walk(tree):
            if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Attribute):
                continue
            name = ast.unparse(call.func)
            if call.func.attr == "from_pretrained" or (call.func.attr == "from_config" and "uto" in name):
                found += 1
                given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
                assert given.get("trust_remote_code") == "False", f"{file}:{call.lineno}: {name}"
    assert found >= 8


# --- weights ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["weights.bin", "../outside.safetensors", "/etc/passwd", "gone.safetensors", "sub/x.safetensors", 3, None])
def test_an_index_names_only_safetensors_of_its_own_folder(name, tmp_path):
    folder = save_vit(tmp_path / "model", max_shard_size="4KB")
    index = folder / f"model{INDEX}"
    load_classifier(f"hf:{folder}", data=SHAPES)
    (tmp_path / "outside.safetensors").write_bytes(next(folder.glob("*.safetensors")).read_bytes())
    (folder / "weights.bin").write_bytes(pickle.dumps(Trap()))
    table = json.loads(index.read_text())["weight_map"]
    rewrite(index, weight_map=table | {"classifier.weight": name})
    for load in (
        lambda: load_classifier(f"hf:{folder}", data=SHAPES),
        lambda: load_classifier(f"run:{folder}", data=SHAPES),
        lambda: pretrained(f"hf:{folder}", "ViTForImageClassification"),
        lambda: only_safetensors(folder),
    ):
        with pytest.raises(UserError, match=r"model\.safetensors\.index\.json: weight_map\.classifier\.weight"):
            load()
    assert not Trap.opened


def test_language_models_look_at_their_index_too(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "a.safetensors").touch()
    (tmp_path / f"model{INDEX}").write_text('{"weight_map": {"x": "../a.safetensors"}}')
    with pytest.raises(UserError, match=r"weight_map\.x is '\.\./a\.safetensors'"):
        load_causal(f"hf:{tmp_path}")


# --- fields ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("classes", 0), ("classes", True), ("classes", 10**12), ("channels", "1"), ("size", -8), ("size", 8.0), ("mean", [0.1, 0.2]),
        ("mean", [float("nan")]), ("std", [0.0]), ("std", 1), ("std", None), ("name", 3), ("name", "mlp-999999999"),
        ("name", "mlp" + "9" * 5000),
        ("name", "vit-p1-w16-d99999"), ("name", "mlp-65536x65536"), ("name", "xyz"),
    ],
)  # fmt: skip
def test_a_field_of_a_small_network_is_named(field, value, tmp_path):
    for spec in ({**SMALL, field: value}, {k: v for k, v in SMALL.items() if k != field}, {**SMALL, "more": 1}):
        (tmp_path / "config.json").write_text(json.dumps({"stillroom": spec}))
        with pytest.raises(UserError, match=rf"config\.json: stillroom.*{'more' if 'more' in spec else field}"):
            load_student(tmp_path)


@pytest.mark.parametrize(
    ("file", "field", "value"),
    [
        ("config.json", "hidden_size", "x"), ("config.json", "num_hidden_layers", 10**9), ("config.json", "patch_size", 0),
        ("config.json", "id2label", [1]), ("config.json", "id2label", {"a": "b"}), ("config.json", "num_labels", 10**12),
        ("config.json", "layer_norm_eps", None), ("config.json", "hidden_act", 3), ("config.json", "encoder_stride", 10**30),
        ("preprocessor_config.json", "size", {"height": "8"}), ("preprocessor_config.json", "size", 10**9),
        ("preprocessor_config.json", "size", []), ("preprocessor_config.json", "image_mean", [0.1, "x", 0.2]),
        ("preprocessor_config.json", "image_std", [0.1, 0.0, 0.2]), ("preprocessor_config.json", "rescale_factor", 0),
        ("preprocessor_config.json", "do_resize", "no"), ("preprocessor_config.json", "image_mean", {}),
    ],
)  # fmt: skip
def test_a_field_of_a_config_or_processor_is_named(file, field, value, tmp_path):
    rewrite(save_vit(tmp_path) / file, **{field: value})
    with pytest.raises(UserError, match=rf"(?s){file}.*{field}"):
        load_classifier(f"hf:{tmp_path}", data=SHAPES)


def test_a_network_larger_than_its_weights_is_refused_before_it_is_made(tmp_path):
    rewrite(save_vit(tmp_path) / "config.json", hidden_size=2**14)  # six gigabytes
    with pytest.raises(UserError, match=r"config\.json describes a network of 1\.\de\+09 parameters"):
        load_classifier(f"hf:{tmp_path}", data=SHAPES)


def test_a_processor_whose_images_the_model_cannot_take_is_refused_at_load(tmp_path):
    rewrite(save_vit(tmp_path) / "preprocessor_config.json", size={"height": 12, "width": 12})
    with pytest.raises(UserError, match="fits no image of 3 x 16 x 16"):
        load_classifier(f"hf:{tmp_path}", data=SHAPES)
    rewrite(tmp_path / "preprocessor_config.json", size={"height": 8, "width": 8}, image_mean=[0.5] * 2)
    with pytest.raises(UserError, match="image_mean has 2 values"):
        load_classifier(f"hf:{tmp_path}", data=SHAPES)


def test_one_number_serves_all_channels(tmp_path):
    rewrite(save_vit(tmp_path) / "preprocessor_config.json", image_mean=0.5, image_std=[0.25])
    normalise = load_classifier(f"hf:{tmp_path}", data=SHAPES).normalise
    torch.testing.assert_close(normalise(torch.full((1, 3, 2, 2), 0.75)), torch.ones(1, 3, 2, 2))


def test_fields_say_what_is_missing():
    with pytest.raises(UserError, match=r"f: a\.b is missing, where a text was expected"):
        Fields("f", {}, "a").text("b")
    with pytest.raises(UserError, match="f: a is 3, where an object was expected"):
        Fields("f", 3, "a")


# --- fuzz ------------------------------------------------------------------------------------------------------------------------------


def test_mutants_of_a_small_networks_file_are_refused_or_load(tmp_path):
    save_classifier(load_classifier("small:mlp-8", data=DIGITS), tmp_path / "net")
    file = tmp_path / "net" / "config.json"
    assert survives(lambda: load_classifier(f"run:{tmp_path}/net", data=DIGITS), file, file.read_text(), 300) > 250


@pytest.mark.parametrize(("name", "cases"), [("config.json", 200), ("preprocessor_config.json", 200)])
@pytest.mark.parametrize("fresh", [False, True])
def test_mutants_of_a_transformers_folder_are_refused_or_load(name, cases, fresh, vit):
    file = vit / name
    load = lambda: load_classifier(f"hf:{vit}", data=SHAPES, fresh=fresh)
    assert survives(load, file, file.read_text(), cases) > cases / 4


@pytest.mark.parametrize("content", ["", "{", "[]", "3", "null", "[" * 5000, "\x00"])
@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json"])
def test_files_that_hold_no_object_are_named(name, content, tmp_path):
    save_vit(tmp_path)
    (tmp_path / name).write_text(content)
    for kind in ("hf", "run"):
        with pytest.raises(UserError, match=name):
            load_classifier(f"{kind}:{tmp_path}", data=SHAPES)
