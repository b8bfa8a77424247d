"""Cached blocks return the outputs that they would compute, without running."""

from contextlib import ExitStack
from itertools import islice

import pytest
import torch
from diffusers import UNet2DModel

from dmquant.diffusion.blocks import find_blocks
from dmquant.methods.dilatequant.activation_cache import ActivationCache
from dmquant.methods.dilatequant.block_reconstruction import UnitData
from dmquant.methods.dilatequant.block_runner import trace_unit
from dmquant.methods.dilatequant.disk_tensor import DiskTensor
from tests.diffusion.test_pipeline import every_denoiser
from tests.methods.dilatequant.test_block_runner import runners_of


def fill(cache, student, samples, runners):
    """Caches blocks in order of execution, as training does. The student is its own teacher."""
    for block, runner in runners.items():
        weight, how = torch.ones(len(samples)), dict(cache=cache, max_bytes=1 << 30, batch=2)
        with UnitData(student, student, block, runner, samples, weight, **how) as data:
            if block in find_blocks(student):
                data.cache_outputs()


@every_denoiser
@torch.no_grad()
def test_a_network_whose_blocks_are_all_cached_has_the_same_output(kind, tmp_path):
    student, samples, runners = runners_of(kind)
    cache, index = ActivationCache(tmp_path, 1 << 30), torch.tensor([0, 1])
    fill(cache, student, samples, runners)
    expected, ran = samples[index].call(student), []
    with ExitStack() as hooks:
        for name in (name for block in find_blocks(student) for name in block.modules):
            child = next(student.get_submodule(name).children())
            hooks.callback(child.register_forward_pre_hook(lambda module, args: ran.append(module)).remove)
        for is_teacher in (False, True):
            with cache.replaying(student, index, is_teacher=is_teacher):
                assert torch.equal(samples[index].call(student), expected)
        assert not ran
        assert torch.equal(samples[index].call(student), expected) and ran
    assert not any("forward" in vars(module) for module in student.modules())


def test_blocks_whose_outputs_do_not_fit_run(tmp_path):
    student, samples, runners = runners_of(UNet2DModel)
    cache = ActivationCache(tmp_path, 2 * 5 * 8 * 8 * 8 * 4)  # of conv_in: 5 samples, 8 channels, 8 x 8
    fill(cache, student, samples, dict(islice(runners.items(), 6)))
    assert not cache.fits([DiskTensor(tmp_path / "one", (1, 1), torch.float32)])
    with cache.replaying(student, torch.tensor([0]), is_teacher=False):
        assert "forward" in vars(student.conv_in) and "forward" not in vars(student.down_blocks[0].resnets[0])
        trace_unit(student, list(runners)[-1], samples[:1])


def test_modules_run_again_after_an_exception(tmp_path):
    student, samples, runners = runners_of(UNet2DModel)
    cache = ActivationCache(tmp_path, 1 << 30)
    fill(cache, student, samples, dict(islice(runners.items(), 4)))
    with pytest.raises(KeyboardInterrupt), cache.replaying(student, torch.tensor([0]), is_teacher=False):
        raise KeyboardInterrupt
    assert not any("forward" in vars(module) for module in student.modules())


@torch.no_grad()
def test_another_process_reloads_all_cached_blocks_but_the_one_that_is_trained_again(tmp_path):
    student, samples, runners = runners_of(UNet2DModel)
    some, index = dict(islice(runners.items(), 6)), torch.tensor([3, 1])
    expected = samples[index].call(student)
    fill(ActivationCache(tmp_path, 1 << 30), student, samples, some)
    cache, blocks = ActivationCache(tmp_path, 1 << 30), find_blocks(student)
    *kept, again = [block for block in some if block in blocks]
    cache.discard(again)
    assert [block for block, runner in some.items() if cache.reload(block, runner)] == kept
    with cache.replaying(student, index, is_teacher=False):
        assert torch.equal(samples[index].call(student), expected)
        assert "forward" in vars(student.get_submodule(kept[-1].modules[0]))
        assert "forward" not in vars(student.get_submodule(again.modules[0]))


def test_files_of_a_unit_that_is_not_cached_are_deleted_after_its_training(tmp_path):
    student, samples, runners = runners_of(UNet2DModel)
    fill(ActivationCache(tmp_path, 0), student, samples, dict(islice(runners.items(), 6)))
    assert not list(tmp_path.iterdir())
