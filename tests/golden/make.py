"""Writes a set of golden folders: for each method a tiny pipeline as this version saves it, and what it computes.

    python tests/golden/make.py tests/golden/0.2.0

A set is made once, with a release that writes other files than the one before, and never changed.
tests/checkpoint/test_golden_folders.py reads all sets, so that what a released version wrote loads forever. METHOD/ is the
folder that dmquant.save wrote. METHOD.safetensors beside it holds one call of the denoiser (x, timestep, output) and, in its
metadata, the SHA-256 of each layer's decoded weight.
"""

import argparse
import hashlib
import os
from contextlib import ExitStack
from itertools import count
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
from torch import Tensor, nn

import dmquant
from dmquant.nn.convert import packed_layers
from dmquant.nn.packed_weight import dense

# 2,947 parameters: two thirds of a file are the names of its tensors
TINY_UNET: dict[str, Any] = {
    "sample_size": 4, "block_out_channels": (4,), "layers_per_block": 1, "norm_num_groups": 2, "attention_head_dim": 2,
    "down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",),
}  # fmt: skip
# together every kind of grid that a file can hold, and weights of 1, 2, 3, 4 and 8 bits
METHODS: dict[str, dict[str, Any]] = {
    "lsq": {"weight_bits": 4, "act_bits": 4, "attention_bits": 8},
    "efficientdm": {"weight_bits": 2, "act_bits": 8, "lookup": "linear"},
    "binarydm": {"weight_bits": 1, "act_bits": 4, "basis": "multi"},
    "dilatequant": {"weight_bits": 3, "act_bits": 6, "attention_bits": 8, "head_grids": True, "split": "all"},
}
RUN = {"max_steps": 2, "trajectories": 4, "sampling_steps": 3, "calibration_samples": 4, "batch": 2, "clip_images": 2}
TIMESTEPS = (333, 550)  # one that is calibrated, and one between two
NOISE, NUM_TRIALS = 1e-6, 8  # relative; ten times the rounding of a float32 sum
TOLERANCE = 1e-5  # of the largest magnitude of an output


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="folder of the set, named by the version")
    folder = parser.parse_args().folder
    os.environ["DMQUANT_KERNELS"] = "torch"  # as in the tests
    for method in METHODS:
        make(method, folder)


def make(method: str, folder: Path) -> Path:
    """Writes FOLDER/METHOD and FOLDER/METHOD.safetensors; returns the folder of the pipeline."""
    torch.manual_seed(0)
    pipeline = DDIMPipeline(UNet2DModel(**TINY_UNET), DDIMScheduler())
    saved = dmquant.save(dmquant.quantize(pipeline, method, **RUN, **METHODS[method]), folder / method)
    unet = dmquant.load(saved, device="cpu").unet
    x, timestep = find_steady_input(unet), torch.tensor(TIMESTEPS)
    call = {"x": x, "timestep": timestep, "output": denoise(unet, x, timestep)}
    safetensors.torch.save_file(call, saved.with_suffix(".safetensors"), metadata=hash_weights(unet))
    return saved


def find_steady_input(unet: nn.Module) -> Tensor:
    """Returns the first random input (2, 3, 4, 4) whose output does not depend on how sums are rounded.

    Another processor adds in another order. A value in the middle between two codes would then get the other code there, and
    the output would differ by far more than by rounding.
    """
    inputs = (torch.randn(len(TIMESTEPS), 3, 4, 4, generator=torch.Generator().manual_seed(seed)) for seed in count())
    return next(x for x in inputs if is_steady(unet, x))


def is_steady(unet: nn.Module, x: Tensor) -> bool:
    """Whether the output stays within the tolerance in all trials of adding noise to the output of each packed layer."""
    generator, timestep = torch.Generator().manual_seed(0), torch.tensor(TIMESTEPS)

    def disturb(layer: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
        return output * (1 + NOISE * torch.randn(output.shape, generator=generator))

    expected = denoise(unet, x, timestep)
    with ExitStack() as hooks:
        for layer in packed_layers(unet).values():
            hooks.callback(layer.register_forward_hook(disturb).remove)
        return all(is_close(denoise(unet, x, timestep), expected) for _ in range(NUM_TRIALS))


@torch.no_grad()
def denoise(unet: nn.Module, x: Tensor, timestep: Tensor) -> Tensor:
    return unet(x, timestep).sample


def is_close(found: Tensor, expected: Tensor) -> bool:
    return torch.allclose(found, expected, rtol=0, atol=TOLERANCE * float(expected.abs().max()))


def hash_weights(unet: nn.Module) -> dict[str, str]:
    """SHA-256 of the float32 values that the weight of each packed layer stands for, by the layer's name."""
    weights = {name: dense(layer.weight, torch.float32) for name, layer in packed_layers(unet).items()}
    return {name: hashlib.sha256(weight.contiguous().numpy().tobytes()).hexdigest() for name, weight in weights.items()}


if __name__ == "__main__":
    main()
