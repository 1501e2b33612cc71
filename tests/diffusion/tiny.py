"""Tiny diffusers pipelines, built from configs and saved, so that tests need no download."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch


def tokenizer() -> Any:
    from transformers import CLIPTokenizer

    letters = "abcdefghijklmnopqrstuvwxyz"
    vocab = {token: i for i, token in enumerate([*letters, *(c + "</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=12)


def text(projected: bool) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=60,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=12,
        projection_dim=16,
        bos_token_id=52,
        eos_token_id=53,
        pad_token_id=53,
    )
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config)


def t5() -> tuple[Any, Any]:
    from transformers import T5Config, T5EncoderModel, T5Tokenizer

    vocab = [(token, 0.0) for token in ("<pad>", "</s>", "<unk>")] + [(c, -2.0) for c in "\u2581abcdefghijklmnopqrstuvwxyz"]
    config = T5Config(vocab_size=140, d_model=32, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    return T5EncoderModel(config), T5Tokenizer(vocab=vocab)


def vae(channels: int, **extra: Any) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        latent_channels=channels,
        norm_num_groups=4,
        sample_size=16,
        **extra,
    )


def unet(**extra: Any) -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
        **extra,
    )


def sd15(folder: Path, prediction: str = "epsilon") -> str:
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    torch.manual_seed(0)
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1, prediction_type=prediction,
    )  # fmt: skip
    StableDiffusionPipeline(
        vae(4), text(False), tokenizer(), unet(cross_attention_dim=16), scheduler, None, None, requires_safety_checker=False
    ).save_pretrained(folder)
    return str(folder)


def sdxl(folder: Path) -> str:
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    torch.manual_seed(0)
    net = unet(
        cross_attention_dim=32,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=16 + 6 * 4,
        transformer_layers_per_block=1,
    )
    scheduler = EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="leading")
    StableDiffusionXLPipeline(
        vae(4), text(False), text(True), tokenizer(), tokenizer(), net, scheduler, add_watermarker=False
    ).save_pretrained(folder)
    return str(folder)


def sd3(folder: Path) -> str:
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    torch.manual_seed(0)
    net = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=16,
        pooled_projection_dim=32,
        out_channels=4,
        pos_embed_max_size=8,
    )
    autoencoder = vae(4, use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.06, scaling_factor=1.5)
    StableDiffusion3Pipeline(
        net, FlowMatchEulerDiscreteScheduler(shift=3.0), autoencoder, text(True), tokenizer(), text(True), tokenizer(), *t5()
    ).save_pretrained(folder)
    return str(folder)


def ddpm(folder: Path) -> str:
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    torch.manual_seed(0)
    net = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    )
    DDPMPipeline(net, DDPMScheduler()).save_pretrained(folder)
    return str(folder)


def flux(folder: Path, guidance_embeds: bool = True) -> str:
    """Like FLUX.1-dev: guidance embedding and dynamic shift; without guidance embedding like Schnell."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    torch.manual_seed(0)
    net = FluxTransformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=16,
        guidance_embeds=guidance_embeds,
        axes_dims_rope=(2, 2, 4),
    )
    autoencoder = vae(4, use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.06, scaling_factor=1.5)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0 if guidance_embeds else 1.0, use_dynamic_shifting=guidance_embeds)
    FluxPipeline(scheduler, autoencoder, text(False), tokenizer(), *t5(), net).save_pretrained(folder)
    return str(folder)


def schnell(folder: Path) -> str:
    return flux(folder, guidance_embeds=False)


PIPELINES = {"sd15": sd15, "sdxl": sdxl, "sd3": sd3, "ddpm": ddpm, "flux": flux, "schnell": schnell}
FLOWS = ("sd3", "flux", "schnell")


def size(kind: str) -> int:
    """Pixels to ask for: a Flux network does not say its own size, and the pipeline's is 1024 at full scale."""
    return 16 if kind in ("flux", "schnell") else 0


def call(pipe: Any, prompts: list[str], z: torch.Tensor, **words: Any) -> torch.Tensor:
    """The latents [B, C, H, W] that a plain pipeline ends at from the latents z; Flux wants them packed."""
    if type(pipe).__name__ != "FluxPipeline":
        return pipe(prompts, latents=z, output_type="latent", **words)[0]
    b, c, h, w = z.shape
    out = pipe(prompts, latents=pipe._pack_latents(z, b, c, h, w), output_type="latent", **words)[0]
    return pipe._unpack_latents(out, h, w, 1)


def untrained(name: str, **arguments: Any) -> Any:
    """An embedded world whose students start from random weights, so that a test need not train them first."""
    from stillroom.diffusion.worlds import world

    found = world(name, **arguments)
    found.start = lambda run: found.small(1).to(run.device)  # type: ignore[method-assign]
    return found
