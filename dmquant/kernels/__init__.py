"""Low-bit arithmetic for packed layers: the codes are multiplied as they are, and no float weight is made.

A packed layer asks `run(layer, x)`. The answer is its output, or None where no kernel takes it: the layer then makes float
weights, the reference that runs everywhere. Chosen once per layer, at its first call, by what this machine can do and a short
timing; `DMQUANT_KERNELS=auto|c|onednn|torch|triton|exact` narrows the choice. What kernels leave to the reference: inputs that
are not quantized, or on the CPU not float32, other devices than the CPU and CUDA's, gradients, autocast, groups, dilation,
padding with other than zeros.

The CPU kernels are C, compiled when first needed (compiler.py). All of them are exact in integers and end with one float
expression, so that the same seed gives the same image whichever runs: that of a quantized model whose sums nobody rounds, which
torch computes with `exact`. oneDNN and the reference round otherwise; they take a layer where they are a quarter faster.
Attention whose factors are quantized is multiplied by codes as well (attention.py). Not done: ARM, kernels for weights in groups.

On a CUDA device Triton's kernels (gpu/) take float32, bfloat16 and float16. They were never run on one: see there.

A pipeline that is loaded also gets its blocks fused (nn/fused): norm, activation, residual, enlargement and padding are done by
the kernels on the way.
"""
