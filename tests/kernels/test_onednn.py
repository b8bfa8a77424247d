"""oneDNN's bytes give what the reference gives, on whatever it takes."""

import pytest
import torch

from dmquant.kernels import onednn, status
from dmquant.nn import dispatch
from tests.kernels.test_ops import CONVOLUTIONS, convolution, error, expected, make_layer


@pytest.fixture(autouse=True)
def chosen(monkeypatch):
    monkeypatch.setenv("DMQUANT_KERNELS", "onednn")


@pytest.mark.parametrize("weight_bits, act_bits", [(1, 4), (2, 5), (4, 8), (8, 8)])
def test_symmetric_weights_run_on_bytes_and_others_on_the_reference(weight_bits, act_bits):
    torch.manual_seed(0)
    for case in CONVOLUTIONS:
        for symmetric in (True, False):
            layer, x = convolution(case, weight_bits, act_bits, symmetric=symmetric)
            assert error(layer(x), expected(layer, x)) < 1e-5
            assert symmetric or layer.weight.blocked is None


def test_what_it_cannot_do_is_left_to_the_reference():
    layer, x = make_layer((9, 33), 0, 4, bases=2), torch.randn(4, 33)
    assert dispatch.run_kernel(layer, x) is None
    assert set(status.kernel_status().values()) == {"DMQUANT_KERNELS=onednn", onednn.find_missing()}


def test_it_says_which_operator_a_torch_has_not(monkeypatch):
    monkeypatch.setattr(onednn.torch.ops, "onednn", object())
    assert "qconv_prepack" in onednn.find_missing()
