"""Blocks on the shelf answer what they would, without running."""

from contextlib import ExitStack
from itertools import islice

import pytest
import torch
from diffusers import UNet2DModel

from dmquant.diffusion.blocks import find_blocks
from dmquant.methods.dilatequant.activation_cache import Shelf
from dmquant.methods.dilatequant.block_reconstruction import Memory
from dmquant.methods.dilatequant.block_runner import trace
from dmquant.methods.dilatequant.disk_tensor import Stack
from tests.diffusion.test_pipeline import every_denoiser
from tests.methods.dilatequant.test_block_runner import links_of


def fill(shelf, student, samples, links):
    """Puts blocks away behind one another, as training does; teacher and student are one."""
    for block, link in links.items():
        weight, how = torch.ones(len(samples)), dict(shelf=shelf, cache_bytes=1 << 30, batch=2)
        with Memory(student, student, block, link, samples, weight, **how) as memory:
            if block in find_blocks(student):
                memory.put_away()


@every_denoiser
@torch.no_grad()
def test_a_network_with_all_its_blocks_on_the_shelf_answers_as_it_does(kind, tmp_path):
    student, samples, links = links_of(kind)
    shelf, index = Shelf(tmp_path, 1 << 30), torch.tensor([0, 1])
    fill(shelf, student, samples, links)
    expected, ran = samples[index].call(student), []
    with ExitStack() as hooks:
        for name in (name for block in find_blocks(student) for name in block.modules):
            child = next(student.get_submodule(name).children())
            hooks.callback(child.register_forward_pre_hook(lambda module, args: ran.append(module)).remove)
        for is_teacher in (False, True):
            with shelf.standing_in(student, index, is_teacher=is_teacher):
                assert torch.equal(samples[index].call(student), expected)
        assert not ran
        assert torch.equal(samples[index].call(student), expected) and ran
    assert not any("forward" in vars(module) for module in student.modules())


def test_what_does_not_fit_runs(tmp_path):
    student, samples, links = links_of(UNet2DModel)
    shelf = Shelf(tmp_path, 2 * 5 * 8 * 8 * 8 * 4)  # of conv_in: 5 samples, 8 channels, 8 x 8
    fill(shelf, student, samples, dict(islice(links.items(), 6)))
    assert not shelf.has_room([Stack(tmp_path / "one", (1, 1), torch.float32)])
    with shelf.standing_in(student, torch.tensor([0]), is_teacher=False):
        assert "forward" in vars(student.conv_in) and "forward" not in vars(student.down_blocks[0].resnets[0])
        trace(student, list(links)[-1], samples[:1])


def test_modules_run_again_after_a_failure(tmp_path):
    student, samples, links = links_of(UNet2DModel)
    shelf = Shelf(tmp_path, 1 << 30)
    fill(shelf, student, samples, dict(islice(links.items(), 4)))
    with pytest.raises(KeyboardInterrupt), shelf.standing_in(student, torch.tensor([0]), is_teacher=False):
        raise KeyboardInterrupt
    assert not any("forward" in vars(module) for module in student.modules())


@torch.no_grad()
def test_another_process_finds_the_shelf_as_it_was_but_for_what_is_trained_once_more(tmp_path):
    student, samples, links = links_of(UNet2DModel)
    some, index = dict(islice(links.items(), 6)), torch.tensor([3, 1])
    expected = samples[index].call(student)
    fill(Shelf(tmp_path, 1 << 30), student, samples, some)
    shelf, blocks = Shelf(tmp_path, 1 << 30), find_blocks(student)
    *kept, again = [block for block in some if block in blocks]
    shelf.forget(again)
    assert [block for block, link in some.items() if shelf.recall(block, link)] == kept
    with shelf.standing_in(student, index, is_teacher=False):
        assert torch.equal(samples[index].call(student), expected)
        assert "forward" in vars(student.get_submodule(kept[-1].modules[0]))
        assert "forward" not in vars(student.get_submodule(again.modules[0]))


def test_what_a_link_reads_and_what_nobody_shelves_is_gone_when_it_is_done(tmp_path):
    student, samples, links = links_of(UNet2DModel)
    fill(Shelf(tmp_path, 0), student, samples, dict(islice(links.items(), 6)))
    assert not list(tmp_path.iterdir())
