"""Contract tests for packages that add a method or a quantizer. They need pytest.

from dmquant.testing import MethodContract
from my_package import Mine

class TestMine(MethodContract):
    method = Mine
"""

import pytest

# before the first import of these modules: their failed assertions then show values, as those of test files do
pytest.register_assert_rewrite("dmquant.testing.method_contract", "dmquant.testing.quantizer_contract")

from dmquant.testing.method_contract import TINY_UNET, MethodContract, make_tiny_pipeline  # noqa: E402
from dmquant.testing.quantizer_contract import QuantizerContract  # noqa: E402

__all__ = ["TINY_UNET", "MethodContract", "QuantizerContract", "make_tiny_pipeline"]
