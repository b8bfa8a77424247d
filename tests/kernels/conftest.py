"""Most tests of kernels run those of C, where there is a compiler, on numbers that repeat."""

import pytest
import torch


@pytest.fixture
def by_kernels(monkeypatch):
    monkeypatch.setenv("DMQUANT_KERNELS", "c")
    with torch.no_grad():
        torch.manual_seed(0)
        yield
