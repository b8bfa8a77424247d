"""Runs the C kernels under AddressSanitizer and UndefinedBehaviorSanitizer on random cases and compares their results.

    python benchmarks/sanitize_kernels.py

Needs gcc with its sanitizers. The sanitizer must be loaded before Python, so the script starts itself a second time with
LD_PRELOAD. Leaks are not reported: each thread keeps its scratch memory until it ends.
"""

import argparse
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

SANITIZERS = ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=150)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if os.environ.get("DMQUANT_SANITIZED"):
        check(args.cases, args.seed)
    else:
        sys.exit(start_again())


def start_again() -> int:
    build = os.environ.get("CC") or "gcc"
    library = subprocess.run([build, "-print-file-name=libasan.so"], capture_output=True, text=True, check=True).stdout.strip()
    with tempfile.TemporaryDirectory() as folder:
        environment = {
            **os.environ, "CC": build, "DMQUANT_SANITIZED": "1", "LD_PRELOAD": library, "XDG_CACHE_HOME": folder,
            "ASAN_OPTIONS": "detect_leaks=0", "PYTHONMALLOC": "malloc", "PYTHONPATH": str(Path(__file__).parents[1]),
        }  # fmt: skip
        return subprocess.run([sys.executable, *sys.argv], env=environment).returncode


def check(cases: int, seed: int) -> None:
    import torch

    from dmquant.kernels import build, reference, registry
    from dmquant.nn import dispatch
    from tests.kernels.test_ops import error, expected, make_layer

    build.OPTIONS = (*build.OPTIONS, *SANITIZERS)
    draw = random.Random(seed)
    torch.manual_seed(seed)
    usable = [kernel for kernel in registry.KERNELS if not registry.find_missing(kernel)]
    print("kernels:", ", ".join(kernel.name for kernel in usable))
    for case in range(cases):
        weight_bits, act_bits, bases = draw.randint(1, 8), draw.randint(1, 8), draw.choice([0, 0, 2])
        channels, outputs = draw.choice([1, 3, 31, 64, 65, 130]), draw.choice([1, 16, 33, 70])
        side = draw.choice([1, 2, 5, 8, 17, 40])
        kernel, stride, padding = draw.choice([1, 2, 3, 3, 5]), draw.choice([1, 1, 2, 3]), draw.randint(0, 2)
        if side + 2 * padding < kernel:
            continue
        options = {"bases": bases, "symmetric": draw.random() < 0.5, "stride": stride, "padding": padding}
        layer = make_layer((outputs, channels, kernel, kernel), weight_bits, act_bits, **options)
        x = torch.randn(draw.randint(1, 3), channels, side, draw.choice([1, 3, side, side + 1]) + kernel)
        layer.weight.block(reference.NAME)
        wanted = dispatch.launch(layer, layer.weight.blocked, x)
        layer.weight.release()
        assert error(wanted, expected(layer, x)) < 1e-5, (case, layer, tuple(x.shape))
        torch.set_num_threads(draw.randint(1, 3))
        for each in usable:
            if each.fits(1 if bases else weight_bits, act_bits, dispatch.geometry_of(layer)):
                layer.weight.block(each.name)
                found = dispatch.launch(layer, layer.weight.blocked, x)
                assert torch.equal(found, wanted), (case, each.name, layer, tuple(x.shape))
                check_fused(layer, x, draw)
                layer.weight.release()
        check_attention(draw)
    print(f"{cases} cases without a finding")


def check_fused(layer, x, draw: random.Random) -> None:
    """Checks a layer with norm, activation, factors, a bias for each image, a residual and upsampling against the same
    operations one by one, and on a slice of channels against a copy of it.
    """
    from dataclasses import replace

    import torch

    from dmquant.kernels import norm
    from dmquant.kernels.operands import FusedOps
    from dmquant.nn import dispatch

    upsample, last = draw.choice([1, 1, 2, 3]), x.permute(0, 2, 3, 1)
    groups = draw.choice([1, x.shape[1]])
    gain, offset = norm.moments(last, *torch.randn(2, x.shape[1]).unbind(), groups, 1e-5)
    activation, factor = draw.choice((norm.NONE, norm.SILU, norm.GELU, norm.TANH_GELU)), torch.rand(x.shape[1])
    bias = torch.randn(len(x), layer.out_channels)
    fused = FusedOps(gain, offset, activation, factor, upsample=upsample)
    made = norm.normalize(last, gain, offset, factor=factor, activation=activation).permute(0, 3, 1, 2)
    made = made.repeat_interleave(upsample, 2).repeat_interleave(upsample, 3)
    wanted = dispatch.launch(layer, layer.weight.blocked, made, bias=bias)
    residual = torch.randn_like(wanted)
    found = dispatch.launch(layer, layer.weight.blocked, x, replace(fused, residual=residual), bias=bias)
    assert torch.equal(found, wanted + residual), (layer, tuple(x.shape), upsample)
    whole = torch.cat([torch.randn_like(x), x], 1).contiguous(memory_format=torch.channels_last)
    part = whole[:, x.shape[1] :]  # its last pixel ends where the memory ends
    for ops in (fused, FusedOps()):
        found, wanted = (dispatch.launch(layer, layer.weight.blocked, image, ops) for image in (part, x))
        assert torch.equal(found, wanted), (layer, tuple(x.shape))
    token = {"gain": gain, "offset": offset, "factor": factor, "epsilon": 1e-5}
    made = norm.normalize(last, **token).permute(0, 3, 1, 2)
    found = dispatch.launch(layer, layer.weight.blocked, x, FusedOps(**token))
    assert torch.equal(found, dispatch.launch(layer, layer.weight.blocked, made)), (layer, tuple(x.shape))
    pair = torch.cat([x, torch.randn_like(x)], 1)
    gated = norm.normalize(pair.permute(0, 2, 3, 1), activation=norm.GATED).permute(0, 3, 1, 2)
    found = dispatch.launch(layer, layer.weight.blocked, pair, FusedOps(activation=norm.GATED))
    assert torch.equal(found, dispatch.launch(layer, layer.weight.blocked, gated)), (layer, tuple(x.shape))


def check_attention(draw: random.Random) -> None:
    """Compares all variants of attention on a random shape bit for bit with each other, and the first with float64."""
    import torch

    from dmquant.kernels import attention, registry
    from tests.kernels.test_attention import factors, grids

    bits, size = draw.randint(1, 8), [draw.randint(1, largest) for largest in (2, 3, 40, 150, 130)]
    arguments = (*factors(*size), *grids(*size[:2], bits), bits, draw.random())
    usable = [number for number, kernel in enumerate(attention.VARIANTS) if not registry.find_missing(kernel)]
    found, wanted = [attention.attend(*arguments, number) for number in usable], attention.reference(*arguments)
    assert all(torch.equal(other, found[0]) for other in found), (size, bits)
    # a probability near the middle of two codes may be rounded to the other one
    step = arguments[3][2].max() * arguments[3][3].max() * (1 << bits)
    difference = (found[0] - wanted).abs()
    assert difference.median() <= 1e-6 * wanted.abs().max() and difference.max() <= 2 * step, (size, bits)


if __name__ == "__main__":
    main()
