"""Memory is handed out again when nobody holds it, and never before."""

import gc
import threading

import pytest
import torch

from dmquant.kernels import pages

LARGE = (3, 1000, 200)  # more than a step, and no whole number of them


@pytest.fixture(autouse=True)
def nothing_kept(monkeypatch):
    monkeypatch.setattr(pages, "spare", [])


def test_memory_comes_back_when_a_tensor_goes():
    x = pages.empty(LARGE)
    place = x.data_ptr()
    assert x.shape == LARGE and x.dtype == torch.float32 and x.is_contiguous() and not pages.spare
    del x
    assert len(pages.spare) == 1 and pages.empty(LARGE).data_ptr() == place


def test_memory_stays_with_whoever_holds_a_view():
    x = pages.empty(LARGE).fill_(1.0)
    part = x[1:].transpose(1, 2)[0]
    del x
    pages.empty(LARGE).fill_(2.0)
    assert (part == 1).all()
    del part
    assert len(pages.spare) == 2


def test_two_tensors_share_nothing_and_sizes_are_not_mixed():
    x, y = pages.empty(LARGE).fill_(1.0), pages.empty(LARGE).fill_(2.0)
    assert (x == 1).all() and (y == 2).all()
    del x, y
    z = pages.empty((4, *LARGE)).fill_(3.0)
    assert (z == 3).all() and len(pages.spare) == 2


@pytest.mark.parametrize("shape", [(2, 30, 90, 80), (2, 3, 4, 5), (1, 1, 600, 700)])
def test_images_may_lie_channels_last(shape):
    x = pages.empty(shape, torch.channels_last)
    assert x.shape == shape and x.permute(0, 2, 3, 1).is_contiguous()


def test_a_system_without_huge_pages_gives_small_ones(monkeypatch):
    monkeypatch.delattr(pages.mmap, "MADV_HUGEPAGE", raising=False)
    assert pages.empty(LARGE).fill_(1.0).sum() == 3 * 1000 * 200


def test_small_tensors_come_from_the_allocator():
    pages.empty((10, 10))
    pages.empty((0, 10))
    assert not pages.spare


def test_no_more_is_kept_than_the_limit_and_the_oldest_goes(monkeypatch):
    monkeypatch.setattr(pages, "LIMIT", 3 * pages.STEP)
    sizes = [(pages.STEP // 4 * count,) for count in (1, 2, 1, 3)]
    for kept, size in zip(([1], [1, 2], [2, 1], [3]), sizes):
        held = pages.empty(size)
        del held
        assert sorted(len(memory) // pages.STEP for memory in pages.spare) == sorted(kept)


def test_tensors_may_go_in_a_cycle_or_in_another_thread():
    cycle = [pages.empty(LARGE)]
    cycle.append(cycle)
    del cycle
    gc.collect()
    assert len(pages.spare) == 1

    def fill(value: float) -> None:
        kept.append(all((pages.empty(LARGE).fill_(value) == value).all() for _ in range(50)))

    kept: list[bool] = []

    threads = [threading.Thread(target=fill, args=(float(value),)) for value in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert kept == [True] * 3 and 1 <= len(pages.spare) <= 4
