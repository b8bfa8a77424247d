"""The quantizers keep the contract that is offered to other packages."""

import pytest

from dmquant.quantizers.binary import Binary
from dmquant.quantizers.uniform import LearnedStep, Uniform
from dmquant.testing import QuantizerContract

CASES = {
    "weights of 4 bits": lambda: Uniform(4, num_channels=5),
    "inputs of 3 bits": lambda: Uniform(3, symmetric=False),
    "learned step of weights": lambda: LearnedStep(2, num_channels=5),
    "learned step and offset of inputs": lambda: LearnedStep(8, symmetric=False),
    "signs": lambda: Binary(num_channels=5),
}


class TestBuiltIn(QuantizerContract):
    @pytest.fixture(params=CASES)
    def quantizer(self, request):
        return CASES[request.param]()
