"""Registers the packed format with diffusers: after `import dmquant.hf`, `from_pretrained` of diffusers reads our folders."""

from dmquant.checkpoint.diffusers_quantizer import DmquantQuantizer, mark_as_quantized

__all__ = ["DmquantQuantizer", "mark_as_quantized"]
