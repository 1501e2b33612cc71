"""diffusers pipelines as teachers, and students that plain diffusers loads.

Pipelines around one U-Net or one transformer: Stable Diffusion 1.x / 2.x (epsilon or v), SDXL, Stable Diffusion 3 and Flux (flow), and
unconditional DDPM-style pixel U-Nets. The network becomes a `Denoiser` in the process that the pipeline's scheduler describes; text is
encoded by the pipeline's own `encode_prompt`, latents are decoded by its VAE.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stillroom.core.errors import UserError, needs
from stillroom.diffusion.denoiser import Denoiser, PredictionType
from stillroom.diffusion.processes import VP, Flow, Process

PREDICTIONS: dict[str, PredictionType] = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
"""What a LoRA student adapts."""


class Backbone(nn.Module):
    """A diffusers network called as `net(x, time, cond)`; cond holds its keyword arguments."""

    def __init__(self, net: Any):
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, time: Tensor, cond: dict[str, Tensor] | None = None) -> Tensor:
        words: dict[str, Any] = dict(cond or {})
        added = {name: words.pop(name) for name in ("text_embeds", "time_ids") if name in words}
        if added:
            words["added_cond_kwargs"] = added
        return self.net(x, timestep=time, return_dict=False, **words)[0]


class Packed(Backbone):
    """A Flux transformer, which sees 2x2 patches of the latents as tokens; text tokens have no position."""

    def forward(self, x: Tensor, time: Tensor, cond: dict[str, Tensor] | None = None) -> Tensor:
        assert cond is not None
        h, w = x.shape[-2] // 2, x.shape[-1] // 2
        rows, columns = (torch.arange(n, dtype=torch.float32, device=x.device) for n in (h, w))
        out = self.net(
            pack(x),
            timestep=time,
            img_ids=torch.cartesian_prod(torch.zeros_like(rows[:1]), rows, columns),
            txt_ids=rows.new_zeros(cond["encoder_hidden_states"].shape[1], 3),
            return_dict=False,
            **cond,
        )[0]
        return unpack(out, h, w)


def pack(x: Tensor) -> Tensor:
    """Latents [B, C, 2h, 2w] as Flux's tokens [B, h w, 4 C]."""
    return nn.functional.pixel_unshuffle(x, 2).flatten(2).mT


def unpack(tokens: Tensor, h: int, w: int) -> Tensor:
    """The inverse of `pack`."""
    return nn.functional.pixel_shuffle(tokens.mT.unflatten(2, (h, w)), 2)


class Pipeline:
    """A loaded pipeline.

    denoiser: its network as a `Denoiser`; shape: (C, H, W) of what it denoises; null: the empty condition [1, ...]; guidance: the scale
    that conditions carry, for a network that takes it as an input, else None.
    """

    backbone: type[Backbone] = Backbone
    guidance: float | None = None

    def __init__(self, pipe: Any, where: str, size: int = 0):
        self.pipe, self.where = pipe, where
        self.slot = "transformer" if hasattr(pipe, "transformer") else "unet"
        net = getattr(pipe, self.slot)
        self.vae = getattr(pipe, "vae", None)
        self.scale = 2 ** (len(self.vae.config.block_out_channels) - 1) if self.vae is not None else 1
        self.encoders = hasattr(pipe, "encode_prompt")
        channels, patch, own = self._layout(net.config)
        if size % (self.scale * patch):
            raise UserError(
                f"--size {size} is not divisible by {self.scale * patch}, the factor of the network and VAE in {self.where}.", code=2
            )
        side = size // self.scale if size else own
        self.shape = (channels, side, side)
        self.process, prediction = described(pipe.scheduler, net, where, (side // patch) ** 2)
        self.denoiser = Denoiser(self.backbone(net), self.process, prediction)
        self.null = self.encode([""], null=True)

    def _layout(self, config: Any) -> tuple[int, int, int]:
        """(channels, factor that sides are divisible by, the pipeline's own side) of what the network denoises."""
        own = config.sample_size if isinstance(config.sample_size, int) else config.sample_size[0]
        return config.in_channels, config.patch_size if self.slot == "transformer" else 2 ** (len(config.block_out_channels) - 1), own

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], null: bool = False) -> dict[str, Tensor] | None:
        """The network's keyword arguments for these prompts, each [N, ...]; those of the empty prompt if `null`. None without text."""
        if not self.encoders:
            return None
        ask: dict[str, Any] = {"device": self.pipe.device, "num_images_per_prompt": 1, "do_classifier_free_guidance": True}
        if self.slot == "transformer":
            ask |= {"prompt_2": None, "prompt_3": None}
        answer = self.pipe.encode_prompt(prompt=list(prompts), **ask)
        text = {"encoder_hidden_states": answer[1 if null else 0]}
        if len(answer) == 4:
            pooled = answer[3 if null else 2]
            text["pooled_projections" if self.slot == "transformer" else "text_embeds"] = pooled
        if len(answer) == 4 and self.slot == "unet":
            side = float(self.shape[-1] * self.scale)
            text["time_ids"] = torch.tensor([[side, side, 0.0, 0.0, side, side]], device=self.pipe.device).expand(len(prompts), -1)
        return {name: value.detach().clone() for name, value in text.items()}

    def asked(self) -> dict[str, Any]:
        """Keyword arguments of the pipeline that make it ask its network as the denoiser is asked."""
        side = self.shape[-1] * self.scale
        return {"guidance_scale": 1.0, "height": side, "width": side} if self.encoders else {}

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Images [N, 3, H, W] in [0, 1]."""
        if self.vae is not None:
            config = self.vae.config
            latents = self.vae.decode(latents / config.scaling_factor + (getattr(config, "shift_factor", None) or 0.0)).sample
        return (latents / 2 + 0.5).clamp(0, 1)

    def student(self) -> Denoiser:
        """A trainable copy of the network."""
        return copy.deepcopy(self.denoiser).requires_grad_(True)

    def lora(self, rank: int, alpha: int) -> Denoiser:
        """A copy of the network with trainable LoRA (scaled by alpha / rank) on its attention and everything else frozen."""
        from peft import LoraConfig

        student = copy.deepcopy(self.denoiser).requires_grad_(False)
        adapter = LoraConfig(r=rank, lora_alpha=alpha, target_modules=ATTENTION, init_lora_weights="gaussian")
        # diffusers' model behind two wrappers, whose attributes torch types as Tensor or Module.
        student.net.net.add_adapter(adapter)  # type: ignore[union-attr, operator]
        return student

    def smaller(self, factor: int) -> Denoiser:
        """A fresh network of the same kind with channels (U-Net) or layers (transformer) divided by `factor`."""
        net = getattr(self.pipe, self.slot)
        config = dict(net.config)
        if self.slot == "transformer":
            for depth in {"num_layers", "num_single_layers"} & config.keys():
                config[depth] = max(1, config[depth] // factor)
        else:
            config["block_out_channels"] = [c // factor for c in config["block_out_channels"]]
            if any(c % config["norm_num_groups"] for c in config["block_out_channels"]):
                config["norm_num_groups"] = max(1, config["norm_num_groups"] // factor)
        return Denoiser(self.backbone(type(net).from_config(config)), self.process, self.denoiser.prediction)

    def save(self, folder: Path, student: nn.Module, times: Sequence[float], fresh_noise: bool) -> None:
        """A folder for plain diffusers: a whole pipeline, or only LoRA weights for `load_lora_weights` if the student has them.

        times: the student's grid. fresh_noise: consistency multistep (LCM scheduler) rather than the deterministic step; pipelines
        without text are always given the deterministic one.
        call.json holds the keyword arguments to call the pipeline with, scheduler.json the scheduler that LoRA users must set.
        """
        net: Any = student.net.net  # type: ignore[union-attr]
        folder.mkdir(parents=True, exist_ok=True)
        scheduler, call = self._schedule(times, fresh_noise)
        if hasattr(net, "peft_config"):
            from diffusers.utils import convert_state_dict_to_diffusers
            from peft import get_peft_model_state_dict

            # The scale alpha / rank goes into the up matrices: loaders take a file without alphas at scale 1.
            adapter = net.peft_config["default"]
            layers = {
                name: value * (adapter.lora_alpha / adapter.r) if ".lora_B." in name else value
                for name, value in get_peft_model_state_dict(net).items()
            }
            self.pipe.save_lora_weights(folder, **{f"{self.slot}_lora_layers": convert_state_dict_to_diffusers(layers)})
            scheduler.save_pretrained(folder / "scheduler")
        else:
            parts = {**self.pipe.components, self.slot: net, "scheduler": scheduler}
            type(self.pipe)(**parts).save_pretrained(folder)
        (folder / "call.json").write_text(json.dumps(call))

    def _schedule(self, times: Sequence[float], fresh_noise: bool) -> tuple[Any, dict[str, Any]]:
        from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, LCMScheduler, TCDScheduler

        call = {"num_inference_steps": len(times) - 1, **self.asked()}
        config = dict(self.pipe.scheduler.config)
        if isinstance(self.process, Flow):
            # A new one: the grid is shifted already, and must not be shifted again.
            scheduler = FlowMatchEulerDiscreteScheduler(config["num_train_timesteps"], stochastic_sampling=fresh_noise)
            return scheduler, call | {"sigmas": [float(t) for t in times[:-1]]}
        if not self.encoders:  # DDPMPipeline takes neither timesteps nor eta; trailing spacing gives it the student's grid
            plain = {"set_alpha_to_one": True, "clip_sample": False, "thresholding": False, "timestep_spacing": "trailing"}
            return DDIMScheduler.from_config({**config, **plain}), call
        scheduler = (LCMScheduler if fresh_noise else TCDScheduler).from_config({**config, "set_alpha_to_one": True})
        if not fresh_noise:
            call["eta"] = 0.0
        return scheduler, call | {"timesteps": [round(t) for t in times[:-1]]}


class Flux(Pipeline):
    """A FluxPipeline, with a guidance embedding (FLUX.1-dev) or without (Schnell, and networks whose guidance was undone).

    A network with guidance embedding was distilled from classifier-free guidance: its scale is an input, so conditions carry it.
    """

    backbone = Packed

    def __init__(self, pipe: Any, where: str, size: int = 0, guidance: float = 1.0):
        self.guidance = guidance if pipe.transformer.config.guidance_embeds else None
        super().__init__(pipe, where, size)

    def _layout(self, config: Any) -> tuple[int, int, int]:
        return config.in_channels // 4, 2, self.pipe.default_sample_size

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], null: bool = False) -> dict[str, Tensor]:
        device, tokens = self.pipe.device, self.asked()["max_sequence_length"]
        hidden, pooled, _ = self.pipe.encode_prompt(prompt=list(prompts), prompt_2=None, device=device, max_sequence_length=tokens)
        text = {"encoder_hidden_states": hidden.detach().clone(), "pooled_projections": pooled.detach().clone()}
        if self.guidance is not None:
            text["guidance"] = torch.full((len(prompts),), self.guidance, device=device)
        return text

    def asked(self) -> dict[str, Any]:
        # Text lengths that the two models were trained with.
        own = {"max_sequence_length": 256} if self.guidance is None else {"max_sequence_length": 512, "guidance_scale": self.guidance}
        return super().asked() | own


def shift_of(config: Any, tokens: int) -> float:
    """The shift that a flow-matching scheduler's config gives to images of this many tokens."""
    if not config.get("use_dynamic_shifting"):
        return float(config.get("shift", 1.0))
    low, high = config.base_image_seq_len, config.max_image_seq_len
    mu = config.base_shift + (config.max_shift - config.base_shift) * (tokens - low) / (high - low)
    return math.exp(mu) if config.get("time_shift_type", "exponential") == "exponential" else mu


def described(scheduler: Any, net: Any, where: str, tokens: int) -> tuple[Process, PredictionType]:
    """The process and prediction type that a scheduler's config states, for images of `tokens` patches.

    UserError when it does not fit the kind of network.
    """
    config, name, kind = scheduler.config, type(scheduler).__name__, type(net).__name__
    flows = kind in ("SD3Transformer2DModel", "FluxTransformer2DModel")
    if flows != name.startswith("FlowMatch"):
        wants = "a flow-matching scheduler" if flows else "a scheduler with betas and a prediction_type (DDIM, Euler, ...)"
        raise UserError(f"{where}: scheduler and network disagree: {kind} needs {wants}, but scheduler_config.json names {name}.")
    if flows:
        inside = 1000 if kind == "FluxTransformer2DModel" else 1  # Flux multiplies by 1000 itself
        return Flow(config.num_train_timesteps / inside, shift_of(config, tokens)), "velocity"
    if config.prediction_type not in PREDICTIONS:
        raise UserError(
            f"{where}: prediction_type {config.prediction_type!r} in scheduler_config.json is none of {', '.join(PREDICTIONS)}."
        )
    if config.beta_schedule not in ("linear", "scaled_linear") or config.get("rescale_betas_zero_snr", False):
        raise UserError(f"{where}: beta schedule {config.beta_schedule!r} (zero-SNR or not linear) is not supported.")
    process = VP(config.beta_start, config.beta_end, config.beta_schedule, config.num_train_timesteps)
    return process, PREDICTIONS[config.prediction_type]


def load(where: str, size: int = 0, guidance: float = 1.0) -> Pipeline:
    """A pipeline from a folder or hub id; `size` in pixels, 0 for its own; `guidance` for a network that takes the scale as an input.

    UserError for anything that is not a usable pipeline.
    """
    diffusers = needs("diffusers", "diffusers", "--teacher diffusers:...")
    folder = Path(where)
    if folder.exists() and not (folder / "model_index.json").is_file():
        raise UserError(f"{where} is not a diffusers pipeline: it holds no model_index.json. Give the folder that save_pretrained wrote.")
    absent = {}
    if folder.exists():  # parts that were saved as None (SD3 without its third text encoder) must be said to be None
        index = json.loads((folder / "model_index.json").read_text())
        absent = {name: None for name, value in index.items() if isinstance(value, list) and value[0] is None}
    try:
        pipe = diffusers.DiffusionPipeline.from_pretrained(where, **absent, trust_remote_code=False)
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"cannot load the diffusers pipeline {where}: {str(error).splitlines()[0]}") from None
    if hasattr(pipe, "set_progress_bar_config"):
        pipe.set_progress_bar_config(disable=True)
    net = getattr(pipe, "transformer", None) or getattr(pipe, "unet", None)
    kind = type(net).__name__
    if type(pipe).__name__ == "FluxPipeline":
        return Flux(pipe, where, size, guidance)
    if kind not in ("UNet2DModel", "UNet2DConditionModel", "SD3Transformer2DModel"):
        raise UserError(
            f"{where}: a {type(pipe).__name__} around a {kind} is not supported; U-Nets, Stable Diffusion 3 and FluxPipeline are."
        )
    return Pipeline(pipe, where, size)


def read_prompts(file: str) -> list[str]:
    """One prompt per line, blank lines skipped. UserError when there is no file, or nothing in it."""
    if not file:
        raise UserError("this teacher is conditioned on text: give --prompts FILE with one prompt per line.", code=2)
    try:
        lines = [line.strip() for line in Path(file).read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read --prompts {file}: {error}") from None
    if not lines:
        raise UserError(f"--prompts {file} is empty: it needs at least one line of text.")
    return lines
