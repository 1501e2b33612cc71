"""diffusers pipelines as teachers, and students that plain diffusers loads.

Pipelines around one U-Net or one MMDiT: Stable Diffusion 1.x / 2.x (epsilon or v), SDXL, Stable Diffusion 3 (flow), and unconditional
DDPM-style pixel U-Nets. The network becomes a `Denoiser` in the process that the pipeline's scheduler describes; text is encoded by the
pipeline's own `encode_prompt`, latents are decoded by its VAE.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stillroom.diffusion.denoiser import Denoiser, PredictionType
from stillroom.diffusion.processes import VP, Flow, Process
from stillroom.errors import UserError

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


class Pipeline:
    """A loaded pipeline.

    denoiser: its network as a `Denoiser`; shape: (C, H, W) of what it denoises; null: the empty condition [1, ...].
    """

    def __init__(self, pipe: Any, where: str, size: int = 0):
        self.pipe, self.where = pipe, where
        self.slot = "transformer" if hasattr(pipe, "transformer") else "unet"
        net = getattr(pipe, self.slot)
        self.process, prediction = described(pipe.scheduler, net, where)
        self.denoiser = Denoiser(Backbone(net), self.process, prediction)
        self.vae = getattr(pipe, "vae", None)
        self.scale = 2 ** (len(self.vae.config.block_out_channels) - 1) if self.vae is not None else 1
        self.encoders = hasattr(pipe, "encode_prompt")
        self.shape = self._shape(net.config, size)
        self.null = self.encode([""], null=True)

    def _shape(self, config: Any, size: int) -> tuple[int, int, int]:
        own = config.sample_size if isinstance(config.sample_size, int) else config.sample_size[0]
        inner = config.patch_size if self.slot == "transformer" else 2 ** (len(config.block_out_channels) - 1)
        if size % (self.scale * inner):
            raise UserError(
                f"--size {size} is not divisible by {self.scale * inner}, the factor of the network and VAE in {self.where}.", code=2
            )
        side = size // self.scale if size else own
        return config.in_channels, side, side

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
        student.net.net.add_adapter(adapter)  # type: ignore[union-attr, operator]
        return student

    def smaller(self, factor: int) -> Denoiser:
        """A fresh network of the same kind with channels (U-Net) or layers (transformer) divided by `factor`."""
        net = getattr(self.pipe, self.slot)
        config = dict(net.config)
        if self.slot == "transformer":
            config["num_layers"] = max(1, config["num_layers"] // factor)
        else:
            config["block_out_channels"] = [c // factor for c in config["block_out_channels"]]
            if any(c % config["norm_num_groups"] for c in config["block_out_channels"]):
                config["norm_num_groups"] = max(1, config["norm_num_groups"] // factor)
        return Denoiser(Backbone(type(net).from_config(config)), self.process, self.denoiser.prediction)

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

        call: dict[str, Any] = {"num_inference_steps": len(times) - 1}
        if self.encoders:
            call["guidance_scale"] = 1.0
        config = dict(self.pipe.scheduler.config)
        if isinstance(self.process, Flow):
            # The grid is shifted already; the pipeline's own shift must not be applied twice.
            scheduler = FlowMatchEulerDiscreteScheduler.from_config({**config, "shift": 1.0, "stochastic_sampling": fresh_noise})
            return scheduler, call | {"sigmas": [float(t) for t in times[:-1]]}
        if not self.encoders:  # DDPMPipeline takes neither timesteps nor eta; trailing spacing gives it the student's grid
            plain = {"set_alpha_to_one": True, "clip_sample": False, "thresholding": False, "timestep_spacing": "trailing"}
            return DDIMScheduler.from_config({**config, **plain}), call
        scheduler = (LCMScheduler if fresh_noise else TCDScheduler).from_config({**config, "set_alpha_to_one": True})
        if not fresh_noise:
            call["eta"] = 0.0
        return scheduler, call | {"timesteps": [round(t) for t in times[:-1]]}


def described(scheduler: Any, net: Any, where: str) -> tuple[Process, PredictionType]:
    """The process and prediction type that a scheduler's config states. UserError when it does not fit the kind of network."""
    config, name, kind = scheduler.config, type(scheduler).__name__, type(net).__name__
    flows = kind in ("SD3Transformer2DModel", "FluxTransformer2DModel")
    if flows != name.startswith("FlowMatch"):
        wants = "a flow-matching scheduler" if flows else "a scheduler with betas and a prediction_type (DDIM, Euler, ...)"
        raise UserError(f"{where}: scheduler and network disagree: {kind} needs {wants}, but scheduler_config.json names {name}.")
    if flows:
        return Flow(time_scale=float(config.num_train_timesteps)), "velocity"
    if config.prediction_type not in PREDICTIONS:
        raise UserError(
            f"{where}: prediction_type {config.prediction_type!r} in scheduler_config.json is none of {', '.join(PREDICTIONS)}."
        )
    if config.beta_schedule not in ("linear", "scaled_linear") or config.get("rescale_betas_zero_snr", False):
        raise UserError(f"{where}: beta schedule {config.beta_schedule!r} (zero-SNR or not linear) is not supported.")
    process = VP(config.beta_start, config.beta_end, config.beta_schedule, config.num_train_timesteps)
    return process, PREDICTIONS[config.prediction_type]


def load(where: str, size: int = 0) -> Pipeline:
    """A pipeline from a folder or hub id; `size` in pixels, 0 for its own. UserError for anything that is not a usable pipeline."""
    try:
        import diffusers
    except ImportError:
        raise UserError("--teacher diffusers:... needs diffusers: pip install 'stillroom[diffusers]'") from None
    folder = Path(where)
    if folder.exists() and not (folder / "model_index.json").is_file():
        raise UserError(f"{where} is not a diffusers pipeline: it holds no model_index.json. Give the folder that save_pretrained wrote.")
    absent = {}
    if folder.exists():  # parts that were saved as None (SD3 without its third text encoder) must be said to be None
        index = json.loads((folder / "model_index.json").read_text())
        absent = {name: None for name, value in index.items() if isinstance(value, list) and value[0] is None}
    try:
        pipe = diffusers.DiffusionPipeline.from_pretrained(where, **absent)
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"cannot load the diffusers pipeline {where}: {str(error).splitlines()[0]}") from None
    if hasattr(pipe, "set_progress_bar_config"):
        pipe.set_progress_bar_config(disable=True)
    net = getattr(pipe, "transformer", None) or getattr(pipe, "unet", None)
    if type(net).__name__ not in ("UNet2DModel", "UNet2DConditionModel", "SD3Transformer2DModel"):
        raise UserError(f"{where}: pipelines around a {type(net).__name__} are not supported (U-Nets and SD3 transformers are).")
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
