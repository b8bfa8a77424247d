"""Memory is handed out again when nobody holds it, and never before."""

import gc
import threading

import pytest
import torch

from dmquant.kernels import buffer_pool

LARGE = (3, 1000, 200)  # more than a step, and no whole number of them


@pytest.fixture(autouse=True)
def nothing_kept(monkeypatch):
    monkeypatch.setattr(buffer_pool, "free", [])


def test_memory_comes_back_when_a_tensor_goes():
    x = buffer_pool.empty(LARGE)
    place = x.data_ptr()
    assert x.shape == LARGE and x.dtype == torch.float32 and x.is_contiguous() and not buffer_pool.free
    del x
    assert len(buffer_pool.free) == 1 and buffer_pool.empty(LARGE).data_ptr() == place


def test_memory_stays_with_whoever_holds_a_view():
    x = buffer_pool.empty(LARGE).fill_(1.0)
    part = x[1:].transpose(1, 2)[0]
    del x
    buffer_pool.empty(LARGE).fill_(2.0)
    assert (part == 1).all()
    del part
    assert len(buffer_pool.free) == 2


def test_two_tensors_share_nothing_and_sizes_are_not_mixed():
    x, y = buffer_pool.empty(LARGE).fill_(1.0), buffer_pool.empty(LARGE).fill_(2.0)
    assert (x == 1).all() and (y == 2).all()
    del x, y
    z = buffer_pool.empty((4, *LARGE)).fill_(3.0)
    assert (z == 3).all() and len(buffer_pool.free) == 2


@pytest.mark.parametrize("shape", [(2, 30, 90, 80), (2, 3, 4, 5), (1, 1, 600, 700)])
def test_images_may_lie_channels_last(shape):
    x = buffer_pool.empty(shape, torch.channels_last)
    assert x.shape == shape and x.permute(0, 2, 3, 1).is_contiguous()


def test_a_system_without_huge_pages_gives_small_ones(monkeypatch):
    monkeypatch.delattr(buffer_pool.mmap, "MADV_HUGEPAGE", raising=False)
    assert buffer_pool.empty(LARGE).fill_(1.0).sum() == 3 * 1000 * 200


def test_small_tensors_come_from_the_allocator():
    buffer_pool.empty((10, 10))
    buffer_pool.empty((0, 10))
    assert not buffer_pool.free


def test_with_a_limit_of_0_all_tensors_come_from_the_allocator(monkeypatch):
    monkeypatch.setattr(buffer_pool, "LIMIT", 0)
    monkeypatch.delattr(buffer_pool, "acquire")
    for order in (torch.contiguous_format, torch.channels_last):
        x = buffer_pool.empty((3, 10, 100, 200), order)
        assert x.shape == (3, 10, 100, 200) and x.is_contiguous(memory_format=order)
        del x
    assert not buffer_pool.free


def test_no_more_is_kept_than_the_limit_and_the_oldest_goes(monkeypatch):
    monkeypatch.setattr(buffer_pool, "LIMIT", 3 * buffer_pool.STEP)
    sizes = [(buffer_pool.STEP // 4 * count,) for count in (1, 2, 1, 3)]
    for kept, size in zip(([1], [1, 2], [2, 1], [3]), sizes):
        held = buffer_pool.empty(size)
        del held
        assert sorted(len(memory) // buffer_pool.STEP for memory in buffer_pool.free) == sorted(kept)


def test_tensors_may_go_in_a_cycle_or_in_another_thread():
    cycle = [buffer_pool.empty(LARGE)]
    cycle.append(cycle)
    del cycle
    gc.collect()
    assert len(buffer_pool.free) == 1

    def fill(value: float) -> None:
        kept.append(all((buffer_pool.empty(LARGE).fill_(value) == value).all() for _ in range(50)))

    kept: list[bool] = []

    threads = [threading.Thread(target=fill, args=(float(value),)) for value in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert kept == [True] * 3 and 1 <= len(buffer_pool.free) <= 4
