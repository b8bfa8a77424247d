"""A tiny text pipeline and a tiny CLIP: random weights, a tokenizer of single letters, nothing fetched."""

import warnings
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)  # fmt: skip
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

LETTERS = [chr(code) for code in range(ord("a"), ord("z") + 1)]
WORDS = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
LONGEST = 16  # tokens
SHAPE = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
TEXT = {
    **SHAPE, "vocab_size": len(WORDS), "max_position_embeddings": LONGEST, "bos_token_id": len(WORDS) - 2,
    "eos_token_id": len(WORDS) - 1, "pad_token_id": len(WORDS) - 1,
}  # fmt: skip
VISION = {**SHAPE, "image_size": 16, "patch_size": 8}
UNET = {
    "sample_size": 4, "in_channels": 4, "out_channels": 4, "block_out_channels": (8, 16), "layers_per_block": 1,
    "norm_num_groups": 4, "attention_head_dim": 4, "cross_attention_dim": SHAPE["hidden_size"],
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
}  # fmt: skip


def make_tokenizer() -> CLIPTokenizer:
    return CLIPTokenizer(vocab={word: index for index, word in enumerate(WORDS)}, merges=[], model_max_length=LONGEST)


def make_text_pipeline(seed: int = 0) -> StableDiffusionPipeline:
    """Stable Diffusion's parts and its own call; images of 8x8 pixels."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        unet, text_encoder = UNet2DConditionModel(**UNET).eval(), CLIPTextModel(CLIPTextConfig(**TEXT)).eval()
        vae = AutoencoderKL(
            block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4, sample_size=8,
            down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        ).eval()  # fmt: skip
    scheduler = DDIMScheduler(clip_sample=False, steps_offset=1)
    return StableDiffusionPipeline(
        vae, text_encoder, make_tokenizer(), unet, scheduler, None, None, requires_safety_checker=False
    )


def make_sdxl_pipeline(seed: int = 0) -> StableDiffusionXLPipeline:
    """SDXL's parts: two text encoders, and six numbers about each image beside the pooled text."""
    width, time_dim = SHAPE["hidden_size"], 2
    conditions = {
        "cross_attention_dim": 2 * width, "addition_embed_type": "text_time", "addition_time_embed_dim": time_dim,
        "projection_class_embeddings_input_dim": 6 * time_dim + width,
    }  # fmt: skip
    sd = make_text_pipeline(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        unet = UNet2DConditionModel(**{**UNET, **conditions}).eval()
        second = CLIPTextModelWithProjection(CLIPTextConfig(**TEXT, projection_dim=width)).eval()
    return StableDiffusionXLPipeline(
        sd.vae, sd.text_encoder, second, sd.tokenizer, make_tokenizer(), unet, sd.scheduler, add_watermarker=False
    )


def save_clip(folder: Path, seed: int = 0) -> Path:
    """A CLIP of 16x16 pixels with everything that belongs to it, as a folder of the hub holds it."""
    with torch.random.fork_rng(), warnings.catch_warnings():
        torch.manual_seed(seed)
        CLIPModel(CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=8)).save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder
