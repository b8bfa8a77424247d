"""Registers the packed format with diffusers: after `import dmquant.hf`, `from_pretrained` loads folders that dmquant wrote."""

from dmquant.checkpoint.diffusers_quantizer import DmquantQuantizer, mark_as_quantized

__all__ = ["DmquantQuantizer", "mark_as_quantized"]
