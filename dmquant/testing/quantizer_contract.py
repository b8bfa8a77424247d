"""Tests that every quantizer must pass, first of all the law q(x) == q.encode(x).decode()."""

import copy

import pytest
import torch
from torch import Tensor

from dmquant.quantizers.base import Quantizer


class QuantizerContract:
    """Tests of one quantizer. A subclass returns it from `make`; its own name begins with Test.

    class TestMine(QuantizerContract):
        def make(self) -> Mine:
            return Mine(4, num_channels=5)
    """

    def make(self) -> Quantizer:
        """Returns a new quantizer, before calibration."""
        raise NotImplementedError

    @pytest.fixture
    def x(self) -> Tensor:
        """Values (5, 4, 3, 3) to calibrate with and to quantize: a weight of five output channels, or a batch of five."""
        return torch.randn(5, 4, 3, 3, generator=torch.Generator().manual_seed(0)) * 3 + 0.4

    @pytest.fixture
    def quantizer(self) -> Quantizer:
        return self.make()

    @pytest.mark.parametrize("magnitude", [1e-6, 1e-3, 1.0, 1e3, 1e6])
    def test_quantizing_equals_encoding_and_decoding(self, quantizer: Quantizer, x: Tensor, magnitude: float) -> None:
        quantizer.observe(x * magnitude)
        y = quantizer(x * magnitude)
        assert y.shape == x.shape and y.dtype == x.dtype
        assert torch.equal(y, quantizer.encode(x * magnitude).decode())

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_the_same_holds_in_half_precision(self, quantizer: Quantizer, x: Tensor, dtype: torch.dtype) -> None:
        quantizer.observe(x)
        y = quantizer(x.to(dtype))
        assert y.dtype == dtype and torch.equal(y, quantizer.encode(x.to(dtype)).decode().to(dtype))

    def test_codes_are_bytes_that_fit_into_the_bits(self, quantizer: Quantizer, x: Tensor) -> None:
        quantizer.observe(x)
        codes = quantizer.encode(x)
        assert codes.bits == quantizer.bits and codes.codes.shape == x.shape
        assert codes.codes.dtype == torch.uint8 and int(codes.codes.max()) < 1 << quantizer.bits

    def test_a_finite_gradient_reaches_the_input_and_every_parameter(self, quantizer: Quantizer, x: Tensor) -> None:
        quantizer.observe(x)
        x.requires_grad_()
        quantizer(x).square().sum().backward()
        for name, value in (("the input", x), *quantizer.named_parameters()):
            assert value.grad is not None and value.grad.isfinite().all(), name

    def test_a_calibrated_grid_is_saved_and_loaded(self, quantizer: Quantizer, x: Tensor) -> None:
        fresh = copy.deepcopy(quantizer)
        quantizer.observe(x)
        fresh.load_state_dict(quantizer.state_dict())
        assert torch.equal(fresh(x), quantizer(x))
