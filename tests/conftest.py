"""Tiny pipelines, made in memory: everything that runs them takes a fraction of a second on one core."""

import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

# threads of so small a model mostly wait for each other; processes that tests start inherit this
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Triton's interpreter stands in for a GPU; read where Triton is first imported, which torch.compile does too
os.environ.setdefault("TRITON_INTERPRET", "1")
MAX_WORKERS = 4
collect_ignore = ["plugin"]  # a package of its own, which testing/test_plugin.py installs and tests


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """A process per core for the whole suite. One file or folder starts sooner without: each process imports torch anew."""
    is_whole = config.args == config.getini("testpaths")
    num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(num_cores, MAX_WORKERS) if is_whole and num_cores > 1 else 0


def pytest_runtest_setup(item: pytest.Item) -> None:
    """What a test says of C code has no object where nothing compiles any. Every other test runs there as well."""
    if item.get_closest_marker("needs_compiler") and not is_compiler_there():
        pytest.skip("no C compiler on the PATH")


@pytest.fixture(scope="session")
def has_compiler() -> bool:
    """Whether kernels of C take part: for tests of what holds with and without them."""
    return is_compiler_there()


@cache
def is_compiler_there() -> bool:
    """Only whether one is there: one that fails, or makes a kernel that is wrong, leaves no test out."""
    from dmquant.kernels import build

    try:
        return bool(build.find_compiler())
    except build.CannotCompile:
        return False


@pytest.fixture(autouse=True, scope="session")
def offline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test may reach a hub, nor see the caches, the Inception weights or the debug switch of the person who runs it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        # most tests compare packed and quantized layers bit for bit, which holds of the reference; tests/kernels has its own
        patch.setenv("DMQUANT_KERNELS", "torch")
        patch.setenv("DMQUANT_CACHE", str(tmp_path_factory.getbasetemp() / "images"))
        for name in ("DMQUANT_DEBUG", "DMQUANT_INCEPTION_WEIGHTS", "NO_COLOR", "FORCE_COLOR"):
            patch.delenv(name, raising=False)
        yield


@pytest.fixture
def by_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Layers are computed by the C kernels, where there is a compiler, on random numbers that repeat."""
    import torch

    monkeypatch.setenv("DMQUANT_KERNELS", "c")
    with torch.no_grad():
        torch.manual_seed(0)
        yield


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved float pipeline of some 20 thousand random parameters, 8x8 RGB. Read it; do not write into it."""
    from dmquant.testing import make_tiny_pipeline

    folder = tmp_path_factory.mktemp("pipelines") / "tiny"
    make_tiny_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pipeline(tiny_folder):
    """The tiny pipeline, opened."""
    from dmquant.diffusion.pipeline import open_pipeline

    return open_pipeline(tiny_folder)


@pytest.fixture(scope="module")
def samples(pipeline):
    """Four calls recorded along each of its trajectories of three steps."""
    from dmquant.diffusion.trajectories import record

    return record(pipeline, 4, steps=3, seed=0)
