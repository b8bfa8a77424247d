"""Low-bit arithmetic on tensors: integer codes are multiplied as they are stored, and no float weight is made.

`ops.quantized_conv(x, operands, geometry, fused)` quantizes an input and convolves it with a packed weight. Its implementations:

- C (csrc/, compiled at first use by build.py). All C kernels add in 32-bit integers and end with the same float expression, so
  they give the same bits, and an image does not depend on which of them runs.
- Triton (triton/), for float32, bfloat16 and float16 on a CUDA device.
- oneDNN (onednn.py), where there is no C compiler.
- reference.py, in torch, with the bits of the C kernels.

Attention with quantized factors is in attention.py. This package knows tensors only. dmquant/nn applies it to layers:
kernel_choice.py chooses the kernel of a layer, dispatch.py calls it, fused/ replaces blocks of diffusers, and cuda_graph.py
records calls of a denoiser. `DMQUANT_KERNELS=auto|c|onednn|torch|triton|exact` narrows the choice.

Not supported, and left to dequantized weights and torch: float inputs, other dtypes than float32 on the CPU, devices other than
CPU and CUDA, gradients, autocast, groups, dilation, and padding with values other than zero. There are no ARM instructions.
"""
