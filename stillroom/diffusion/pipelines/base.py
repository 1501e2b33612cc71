"""One diffusers pipeline: its network as a denoiser, its words and latents, and students that plain diffusers loads."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stillroom.core.errors import UserError
from stillroom.diffusion.denoiser import Denoiser, PredictionType
from stillroom.diffusion.processes import VP, Flow, Process

PREDICTIONS: dict[str, PredictionType] = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}


class Backbone(nn.Module):
    """A diffusers network called as `net(x, time, cond)`; cond holds its keyword arguments."""

    def __init__(self, net: Any):
        super().__init__()
        self.net = net

    @property
    def middle(self) -> nn.Module:
        """The module whose output an adversarial head reads."""
        if hasattr(self.net, "mid_block"):
            return self.net.mid_block
        blocks = self.net.transformer_blocks
        return blocks[len(blocks) // 2]

    @property
    def features(self) -> int:
        """Its width."""
        return self.net.config.block_out_channels[-1] if hasattr(self.net, "mid_block") else self.net.inner_dim

    def forward(self, x: Tensor, time: Tensor, cond: dict[str, Tensor] | None = None) -> Tensor:
        given: dict[str, Any] = dict(cond or {})
        added = {name: given.pop(name) for name in ("text_embeds", "time_ids") if name in given}
        if added:
            given["added_cond_kwargs"] = added
        return self.net(x, timestep=time, return_dict=False, **given)[0]


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
        self.null = self.words([""], null=True)

    def _layout(self, config: Any) -> tuple[int, int, int]:
        """(channels, factor that sides are divisible by, the pipeline's own side) of what the network denoises."""
        own = config.sample_size if isinstance(config.sample_size, int) else config.sample_size[0]
        return config.in_channels, config.patch_size if self.slot == "transformer" else 2 ** (len(config.block_out_channels) - 1), own

    @torch.no_grad()
    def words(self, prompts: Sequence[str], null: bool = False) -> dict[str, Tensor] | None:
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

    def latents(self, images: Tensor) -> Tensor:
        """What the network denoises, from images [N, 3, H, W] in [0, 1]: the mean of the VAE's code, or the pixels in [-1, 1]."""
        pixels = 2 * images - 1
        if self.vae is None:
            return pixels
        config = self.vae.config
        code = self.vae.encode(pixels.to(self.vae.device, self.vae.dtype)).latent_dist.mode()
        return (code - (getattr(config, "shift_factor", None) or 0.0)) * config.scaling_factor

    def decode(self, latents: Tensor) -> Tensor:
        """Images [N, 3, H, W], in [0, 1] but for overshoot that is left to clamp; with gradient."""
        if self.vae is not None:
            config = self.vae.config
            latents = latents.to(self.vae.device, self.vae.dtype)
            latents = self.vae.decode(latents / config.scaling_factor + (getattr(config, "shift_factor", None) or 0.0)).sample
        return latents / 2 + 0.5

    def smaller(
        self, factor: int, process: Process | None = None, prediction: PredictionType | None = None, dropout: float = 0.0
    ) -> Denoiser:
        """A fresh network of the same kind with channels (U-Net) or layers (transformer) divided by `factor`.

        UserError for another process or prediction than plain diffusers can sample with this pipeline, and for dropout in a network that
        has none.
        """
        prediction = prediction or self.denoiser.prediction
        known = ("velocity",) if isinstance(self.process, Flow) else tuple(PREDICTIONS.values())
        if process not in (None, self.process) or prediction not in known:
            raise UserError(f"{self.where}: plain diffusers could not sample a network that predicts {prediction!r} in {process}.")
        net = getattr(self.pipe, self.slot)
        config = dict(net.config)
        if dropout and "dropout" not in config:
            raise UserError(f"{self.where}: a {type(net).__name__} has no dropout; use 0.", code=2)
        if "dropout" in config:
            config["dropout"] = dropout
        if self.slot == "transformer":
            for depth in {"num_layers", "num_single_layers"} & config.keys():
                config[depth] = max(1, config[depth] // factor)
        else:
            config["block_out_channels"] = [c // factor for c in config["block_out_channels"]]
            if any(c % config["norm_num_groups"] for c in config["block_out_channels"]):
                config["norm_num_groups"] = max(1, config["norm_num_groups"] // factor)
        return Denoiser(self.backbone(type(net).from_config(config)), self.process, prediction)

    def save(self, folder: Path, student: nn.Module, times: Sequence[float], fresh_noise: bool) -> None:
        """A folder for plain diffusers: a whole pipeline, or only LoRA weights for `load_lora_weights` if the student has them.

        times: the student's grid. fresh_noise: consistency multistep (LCM scheduler) rather than the deterministic step; pipelines
        without text are always given the deterministic one.
        call.json holds the keyword arguments to call the pipeline with, scheduler.json the scheduler that LoRA users must set.
        """
        net: Any = student.net.net  # type: ignore[union-attr]
        folder.mkdir(parents=True, exist_ok=True)
        scheduler, call = self.schedule(times, fresh_noise, student.prediction)  # type: ignore[arg-type]  # a Denoiser's
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

    def schedule(self, times: Sequence[float], fresh_noise: bool, prediction: PredictionType | None = None) -> tuple[Any, dict[str, Any]]:
        """The scheduler with which diffusers samples a network of this prediction at `times`, and the call's keyword arguments."""
        from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, LCMScheduler, TCDScheduler

        call = {"num_inference_steps": len(times) - 1, **self.asked()}
        config = dict(self.pipe.scheduler.config)
        if prediction is not None and not isinstance(self.process, Flow):
            config["prediction_type"] = {ours: theirs for theirs, ours in PREDICTIONS.items()}[prediction]
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
