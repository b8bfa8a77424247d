"""Blocks of diffusers that run by kernels with fused norms, activations and residuals."""
