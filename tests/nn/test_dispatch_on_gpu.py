"""Triton takes a layer where it can be used and agrees with the reference; otherwise it says why, and the reference runs."""

import pytest
import torch
from triton.errors import TritonError

from dmquant.kernels import self_check, status, triton_support
from dmquant.kernels.operands import NO_OPS
from dmquant.kernels.triton import conv
from dmquant.nn import dispatch, kernel_choice
from dmquant.quantizers.dilated import Divide
from tests.kernels.test_ops import error, expected, make_layer

CPU = torch.device("cpu")
FORMAT = self_check.CodeFormat(1, 1, 4)


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    """Layers on the CPU choose as layers on a GPU do, and what is called a GPU is the interpreter."""
    monkeypatch.setenv("DMQUANT_KERNELS", "triton")
    monkeypatch.setattr(triton_support, "find_missing", lambda device=None: "")
    monkeypatch.setattr(kernel_choice, "choose", lambda layer, x, format, window: kernel_choice.choose_on_gpu(format, x.device))
    monkeypatch.setitem(dispatch.DTYPES, "cpu", dispatch.DTYPES["cuda"])
    with torch.no_grad():
        torch.manual_seed(0)
        yield


@pytest.fixture
def unchecked():
    self_check.check.cache_clear()
    yield
    self_check.check.cache_clear()


def test_a_packed_layer_runs_by_triton_and_its_weight_is_kept_once():
    layer, x = make_layer((40, 70, 3, 3), 1, 4, padding=1), torch.randn(2, 70, 3, 4)
    assert error(layer(x), expected(layer, x)) < 1e-6
    assert layer.weight.blocked.kernel == triton_support.NAME and layer.weight._buffers["codes"] is None
    assert layer.weight.blocked.weight.nbytes == 40 * 96 * 9 // 8, "one bit each, channels filled up to 96"


def test_half_precision_is_taken_and_given():
    layer, x = make_layer((20, 33), 1, 4), torch.randn(5, 33, dtype=torch.bfloat16)
    found = layer(x)
    assert layer.weight.blocked and found.dtype == torch.bfloat16 and error(found, expected(layer, x.float())) < 2**-6


def test_channels_are_divided_before_they_are_quantized(has_compiler):
    layer, x = make_layer((20, 33), 1, 4), torch.randn(5, 33)
    layer.divide = Divide(33, 0)
    layer.divide.reciprocal.uniform_(0.5, 2)
    assert error(layer(x), expected(layer, layer.divide(x))) < 1e-6 and layer.weight.blocked
    assert dispatch.can_fuse(layer, x) == has_compiler  # on the CPU a fused product is compared with an image that C makes
    assert torch.equal(dispatch.run_fused(layer, x, NO_OPS), layer(x))


def test_a_kernel_that_is_wrong_is_disabled_with_a_warning(monkeypatch, unchecked):
    right = conv.conv
    monkeypatch.setattr(conv, "conv", lambda *arguments: right(*arguments) * 1.001)
    layer, x = make_layer((20, 33), 1, 4), torch.randn(5, 33)
    with pytest.warns(RuntimeWarning, match="the kernel triton is not used: it is wrong by"):
        assert error(layer(x), expected(layer, x)) < 1e-6
    assert layer.weight.is_left_alone


@pytest.mark.parametrize("failure", [TritonError("no such layout\nat 3:4"), RuntimeError("Failed to find C compiler.")])
def test_a_kernel_that_does_not_compile_is_disabled_with_a_warning(monkeypatch, unchecked, failure):
    def fail(*arguments):
        raise failure

    monkeypatch.setattr(conv, "conv", fail)
    with pytest.warns(RuntimeWarning, match=f"not used: {type(failure).__name__}: {str(failure).splitlines()[0]}"):
        assert kernel_choice.choose_on_gpu(FORMAT, CPU) == self_check.REFERENCE


@pytest.mark.needs_compiler
def test_a_layer_whose_fused_product_fails_is_not_fused(monkeypatch):
    right = conv.conv

    def fail(*arguments):
        if arguments[3].residual is not None:
            raise TritonError("out of registers")
        return right(*arguments)

    self_check.check_fusion.cache_clear()
    layer, x = make_layer((20, 33), 1, 4), torch.randn(5, 33)
    layer(x)
    monkeypatch.setattr(conv, "conv", fail)
    with pytest.warns(RuntimeWarning, match="layers of 4 bits are not fused: TritonError: out of registers"):
        assert not dispatch.can_fuse(layer, x)
    self_check.check_fusion.cache_clear()


@pytest.mark.parametrize(
    "wanted, found", [("auto", triton_support.NAME), ("triton", triton_support.NAME), ("c", "torch"), ("onednn", "torch")]
)
def test_what_is_wanted_on_a_gpu(monkeypatch, wanted, found):
    monkeypatch.setenv("DMQUANT_KERNELS", wanted)
    monkeypatch.setattr(self_check, "check", lambda *_: "")
    assert kernel_choice.choose_on_gpu(FORMAT, CPU) == found


def test_the_status_says_why_triton_is_not_in_use(monkeypatch):
    monkeypatch.setattr(triton_support, "find_missing", lambda device=None: "there is no CUDA device")
    found = status.kernel_status()
    assert found["triton"] == "there is no CUDA device" and found["scalar"] == "DMQUANT_KERNELS=triton"
    monkeypatch.setenv("DMQUANT_KERNELS", "c")
    assert status.kernel_status()["triton"] == "DMQUANT_KERNELS=c"
