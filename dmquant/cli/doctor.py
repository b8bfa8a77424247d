"""Collects facts about this machine for `dmquant doctor` and bug reports: versions, devices, kernels, files, disk space."""

import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from huggingface_hub import constants

from dmquant import __version__
from dmquant.diffusion.pipeline import ASSETS
from dmquant.errors import MissingResource
from dmquant.evaluation.metrics.inception_weights import find_inception
from dmquant.kernels import status

REQUIRED = (
    "torch", "diffusers", "accelerate", "safetensors", "filelock", "psutil", "torchmetrics", "huggingface_hub", "numpy",
    "pillow", "pydantic", "typer", "rich", "jinja2",
)  # fmt: skip
OPTIONAL = ("transformers", "triton")
LOW_SPACE_BYTES = 2 * 10**9


@dataclass(frozen=True)
class Finding:
    """One fact about this machine. If it is a problem, `is_ok` is False and `advice` tells how to solve it."""

    name: str
    value: str
    is_ok: bool = True
    advice: str = ""


def collect_findings() -> list[Finding]:
    """Returns all facts that a bug report should contain."""
    return [*_packages(), *_devices(), *_kernels(), *_files()]


def _packages() -> Iterator[Finding]:
    yield Finding("dmquant", __version__)
    yield Finding("python", f"{platform.python_version()} on {platform.platform()}")
    for name in (*REQUIRED, *OPTIONAL):
        try:
            yield Finding(name, version(name))
        except PackageNotFoundError:
            yield Finding(name, "not installed", name in OPTIONAL, f"pip install {name}")


def _devices() -> Iterator[Finding]:
    threads = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads in use"
    yield Finding("cpu", f"{threads}, {torch.backends.cpu.get_cpu_capability()}")
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        capability = f"compute capability {device.major}.{device.minor}"
        yield Finding(f"cuda:{index}", f"{device.name}, {device.total_memory / 1e9:.0f} GB, {capability}")
    if not torch.cuda.is_available():
        yield Finding("cuda", "none" if torch.version.cuda is None else "no usable GPU, though this torch is built for CUDA")
    if torch.backends.mps.is_available():
        yield Finding("mps", "available")


def _kernels() -> Iterator[Finding]:
    states = status.kernel_status()
    in_use = [name for name, reason in states.items() if not reason]
    yield Finding("kernels", ", ".join(in_use) or "torch: packed weights are unpacked to float before each product")
    yield from (Finding(f"kernel {name}", reason or "in use") for name, reason in states.items())


def _files() -> Iterator[Finding]:
    for name in ("pipeline", "extractor", "reference"):
        is_there = any((ASSETS / name).glob("*"))
        yield Finding(f"embedded {name}", "present" if is_there else "missing", is_there, "install dmquant again")
    yield _inception()
    yield _cache()
    free_bytes = shutil.disk_usage(Path.cwd()).free
    yield Finding("free disk space", f"{free_bytes / 1e9:.1f} GB", free_bytes >= LOW_SPACE_BYTES, "free at least 2 GB")
    yield Finding("hub", "offline (HF_HUB_OFFLINE)" if constants.HF_HUB_OFFLINE else "online")


def _inception() -> Finding:
    try:
        return Finding("inception weights", str(find_inception()))
    except MissingResource:
        # no problem: only --extractor inception needs them
        return Finding("inception weights", "not on this machine; download them with: dmquant fetch inception")


def _cache() -> Finding:
    folder = Path(constants.HF_HOME)
    home = next(path for path in (folder, *folder.parents) if path.exists())
    return Finding("cache", str(folder), os.access(home, os.W_OK), "set HF_HOME to a folder that can be written")
