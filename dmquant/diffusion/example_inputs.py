"""Example arguments of one denoiser call: zeros in the sizes of the denoiser's config."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import ModelMixin
from torch import Tensor

from dmquant.errors import InputError


def example_inputs(denoiser: ModelMixin, *, batch: int = 1, device: str = "meta") -> dict[str, Any]:
    """Returns keyword arguments of one denoiser call: zeros in the sizes of its config. Raises InputError for an unknown class.

    Text has 77 tokens for UNets, 300 for PixArt, 154 for SD3 and 512 for Flux; Flux images have 1024 x 1024 pixels.
    """
    kind = type(denoiser).__name__
    if kind not in INPUTS:
        raise InputError(f"the inputs of a {kind} are not known; known: {', '.join(INPUTS)}")
    return INPUTS[kind](denoiser.config, _Zeros(batch, device, denoiser.dtype))


@dataclass(frozen=True)
class _Zeros:
    """Makes tensors of one batch size on one device."""

    batch: int
    device: str
    dtype: torch.dtype

    def __call__(self, *shape: int) -> Tensor:
        return torch.zeros(self.batch, *shape, device=self.device, dtype=self.dtype)

    def integers(self, *shape: int) -> Tensor:
        return torch.zeros(self.batch, *shape, device=self.device, dtype=torch.long)


def _image(config: Mapping[str, Any], zeros: _Zeros) -> Tensor:
    size = config["sample_size"]
    height, width = (size, size) if isinstance(size, int) else size
    return zeros(config["in_channels"], height, width)


def _unet_inputs(config: Mapping[str, Any], zeros: _Zeros) -> dict[str, Any]:
    kind = config["class_embed_type"]
    inputs = {"sample": _image(config, zeros), "timestep": zeros.integers()}
    if kind == "timestep" or (kind is None and config["num_class_embeds"] is not None):
        inputs["class_labels"] = zeros.integers()
    elif kind == "identity":
        inputs["class_labels"] = zeros(config.get("time_embedding_dim") or 4 * config["block_out_channels"][0])
    elif kind is not None:
        inputs["class_labels"] = zeros(config["projection_class_embeddings_input_dim"])
    return inputs


def _conditional_unet_inputs(config: Mapping[str, Any], zeros: _Zeros) -> dict[str, Any]:
    width = config["encoder_hid_dim"] or config["cross_attention_dim"]
    inputs = _unet_inputs(config, zeros) | {"encoder_hidden_states": zeros(77, width if isinstance(width, int) else width[0])}
    if config["addition_embed_type"] == "text_time":  # SDXL: pooled text and six numbers about the image
        pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
        inputs["added_cond_kwargs"] = {"text_embeds": zeros(pooled), "time_ids": zeros(6)}
    return inputs


def _dit_inputs(config: Mapping[str, Any], zeros: _Zeros) -> dict[str, Any]:
    return {"hidden_states": _image(config, zeros), "timestep": zeros.integers(), "class_labels": zeros.integers()}


def _pixart_inputs(config: Mapping[str, Any], zeros: _Zeros) -> dict[str, Any]:
    return {
        "hidden_states": _image(config, zeros),
        "timestep": zeros.integers(),
        "encoder_hidden_states": zeros(300, config["caption_channels"]),
        "added_cond_kwargs": {"resolution": zeros(2), "aspect_ratio": zeros(1)},
    }


def _sd3_inputs(config: Mapping[str, Any], zeros: _Zeros) -> dict[str, Any]:
    return {
        "hidden_states": _image(config, zeros),
        "timestep": zeros.integers(),
        "encoder_hidden_states": zeros(154, config["joint_attention_dim"]),
        "pooled_projections": zeros(config["pooled_projection_dim"]),
    }


def _flux_inputs(config: Mapping[str, Any], zeros: _Zeros) -> dict[str, Any]:
    ids = {name: torch.zeros(count, 3, device=zeros.device) for name, count in (("img_ids", 64 * 64), ("txt_ids", 512))}
    return ids | {
        "hidden_states": zeros(64 * 64, config["in_channels"]),
        "timestep": zeros(),
        "encoder_hidden_states": zeros(512, config["joint_attention_dim"]),
        "pooled_projections": zeros(config["pooled_projection_dim"]),
        "guidance": zeros() if config["guidance_embeds"] else None,
    }


INPUTS = {
    "UNet2DModel": _unet_inputs,
    "UNet2DConditionModel": _conditional_unet_inputs,
    "DiTTransformer2DModel": _dit_inputs,
    "PixArtTransformer2DModel": _pixart_inputs,
    "SD3Transformer2DModel": _sd3_inputs,
    "FluxTransformer2DModel": _flux_inputs,
}
