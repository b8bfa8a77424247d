import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dmquant.quantizers.uniform import LearnedStep, Uniform

CASES = [
    (kind, bits, symmetric, channels)
    for kind in (Uniform, LearnedStep)
    for bits in (1, 2, 3, 4, 8)
    for symmetric in (True, False)
    for channels in (None, 5)
]


def make(kind, bits, symmetric, channels, init="mse", seed=0):
    x = torch.randn(5, 4, 3, 3, generator=torch.Generator().manual_seed(seed)) * 3 + 0.4
    quantizer = kind(bits, symmetric=symmetric, num_channels=channels, init=init)
    quantizer.observe(x)
    return quantizer, x


@pytest.mark.parametrize("kind,bits,symmetric,channels", CASES)
@pytest.mark.parametrize("init", ["mse", "minmax", "lsq"])
def test_the_law_quantizing_equals_encoding_and_decoding(kind, bits, symmetric, channels, init):
    quantizer, x = make(kind, bits, symmetric, channels, init)
    codes = quantizer.encode(x)
    assert codes.codes.dtype == torch.uint8 and int(codes.codes.max()) < 1 << bits
    assert torch.equal(quantizer(x), codes.decode())


@given(seed=st.integers(0, 999), bits=st.integers(1, 8), exponent=st.integers(-6, 6), symmetric=st.booleans())
@settings(max_examples=60, deadline=None)
def test_the_law_holds_at_every_magnitude(seed, bits, exponent, symmetric):
    x = torch.randn(3, 17, generator=torch.Generator().manual_seed(seed)) * 10.0**exponent
    quantizer = LearnedStep(bits, symmetric=symmetric)
    quantizer.observe(x)
    assert torch.equal(quantizer(x), quantizer.encode(x).decode())
    assert torch.equal(quantizer.freeze()(x), quantizer(x))


@pytest.mark.parametrize("symmetric", [True, False])
def test_zero_is_always_on_the_grid(symmetric):
    quantizer = LearnedStep(4, symmetric=symmetric)
    quantizer.observe(torch.rand(64) + 0.1)
    assert quantizer(torch.zeros(3)).abs().max() == 0


def reference_gradients(x, scale, zero, max_code, gradient, symmetric):
    """The gradients in float64, term by term: LSQ, eq. 3, and with an offset LSQ+, eq. 5 and 6."""
    level = x / scale
    inside = (level > -zero) & (level < max_code - zero)
    low, high = (-zero, max_code - zero) if symmetric else (torch.zeros_like(zero), torch.full_like(zero, max_code))
    by_scale = torch.where(inside, torch.round(level) - level, torch.where(level <= -zero, low, high))
    by_offset = torch.where(inside, 0.0, 1.0)
    return gradient * inside, (gradient * by_scale).sum(), (gradient * by_offset).sum()


@pytest.mark.parametrize("symmetric", [True, False])
def test_gradients_equal_the_papers_formulas_inside_and_outside_the_range(symmetric):
    torch.manual_seed(0)
    x = (torch.randn(6, 40, dtype=torch.float64) * 2 + 0.5).requires_grad_()
    quantizer = LearnedStep(3, symmetric=symmetric).double()
    quantizer.observe(x)
    gradient = torch.randn_like(x)
    quantizer(x).backward(gradient)
    scale, zero = (t.detach() for t in quantizer.grid())
    by_x, by_scale, by_offset = reference_gradients(x.detach(), scale, zero, 7, gradient, symmetric)
    factor = (40 * (3 if symmetric else 7)) ** -0.5
    assert torch.allclose(x.grad, by_x)
    assert torch.allclose(quantizer.scale.grad, by_scale * factor)
    if not symmetric:
        assert torch.allclose(quantizer.offset.grad, by_offset * factor)


def test_gradients_of_clipped_values_equal_finite_differences():
    # where every value is clipped, the output depends on scale and offset smoothly: no straight-through estimate is involved
    x = torch.tensor([[9.0, 10.0], [-9.0, -11.0]], dtype=torch.float64)
    quantizer = LearnedStep(4).double()
    with torch.no_grad():
        quantizer.scale.fill_(0.3)
    weight = torch.tensor([[1.0, -2.0], [0.5, 3.0]], dtype=torch.float64)
    (quantizer(x) * weight).sum().backward()
    step, values = 1e-6, []
    for delta in (step, -step):
        with torch.no_grad():
            quantizer.scale.fill_(0.3 + delta)
            values.append((quantizer(x) * weight).sum())
    numeric = (values[0] - values[1]) / (2 * step)
    assert torch.allclose(quantizer.scale.grad, numeric * (2 * 7) ** -0.5, rtol=1e-6)


def test_with_an_offset_the_step_gradient_is_the_mean_slope_over_many_zero_points():
    # the rounded zero point makes the output jump: its secant over several jumps is what a gradient must follow
    quantizer = LearnedStep(4, symmetric=False).double()
    for value, expected in ((-9.0, 0.0), (9.0, 15.0)):
        x, outputs = torch.full((1, 1), value, dtype=torch.float64), []
        for scale in (0.2, 0.4):
            with torch.no_grad():
                quantizer.scale.fill_(scale)
                quantizer.offset.fill_(-2.1)
                outputs.append(quantizer(x))
        secant = ((outputs[1] - outputs[0]) / 0.2).item()
        with torch.no_grad():
            quantizer.scale.fill_(0.3)
        quantizer.scale.grad = None
        quantizer(x).sum().backward()
        slope = quantizer.scale.grad.item() * 15**0.5
        assert slope == pytest.approx(expected, abs=1e-5) and abs(secant - slope) < 2


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_quantizer_cast_to_half_precision_still_keeps_the_law(symmetric):
    quantizer, x = make(LearnedStep, 4, symmetric, 5)
    quantizer, x = quantizer.bfloat16(), x.bfloat16()
    assert torch.equal(quantizer(x), quantizer.encode(x).decode().bfloat16())


def test_per_channel_gradients_equal_channels_one_by_one():
    torch.manual_seed(1)
    x, gradient = torch.randn(5, 4, 3, 3), torch.randn(5, 4, 3, 3)
    together = LearnedStep(3, num_channels=5)
    together.observe(x)
    together(x).backward(gradient)
    for channel in range(5):
        alone = LearnedStep(3, num_channels=1)
        alone.observe(x[channel : channel + 1])
        alone(x[channel : channel + 1]).backward(gradient[channel : channel + 1])
        assert torch.allclose(alone.scale.grad.flatten(), together.scale.grad[channel].flatten(), rtol=1e-4, atol=1e-7)


def test_channels_last_and_contiguous_inputs_give_the_same_gradients():
    torch.manual_seed(2)
    x, gradient = torch.randn(2, 8, 5, 5), torch.randn(2, 8, 5, 5)
    results = []
    for layout in (torch.contiguous_format, torch.channels_last):
        quantizer = LearnedStep(4, symmetric=False)
        quantizer.observe(x)
        leaf = x.clone(memory_format=layout).requires_grad_()
        quantizer(leaf).backward(gradient)
        results.append((leaf.grad, quantizer.scale.grad, quantizer.offset.grad))
    for one, other in zip(*results):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-6)


def test_the_lsq_start_is_twice_the_mean_magnitude_over_the_root_of_the_top_level():
    x = torch.randn(3, 50)
    quantizer = LearnedStep(4, num_channels=3, init="lsq", ndim=2)
    quantizer.observe(x)
    assert torch.allclose(quantizer.scale.flatten(), 2 * x.abs().mean(1) / 7**0.5)


def test_a_scale_that_was_trained_below_zero_stands_still_and_the_law_holds():
    quantizer, x = make(LearnedStep, 4, True, 5)
    with torch.no_grad():
        quantizer.scale[0] = -1
    assert torch.equal(quantizer(x), quantizer.encode(x).decode()) and (quantizer.grid()[0] > 0).all()


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_mse_start_beats_minmax_and_neighbouring_ranges(bits, symmetric):
    torch.manual_seed(3)
    x = torch.nn.functional.silu(torch.randn(4000) * 2)
    searched, full = (LearnedStep(bits, symmetric=symmetric, init=init) for init in ("mse", "minmax"))
    for quantizer in (searched, full):
        quantizer.observe(x)
    error = (searched(x) - x).square().mean()
    assert error <= (full(x) - x).square().mean()
    for factor in (0.8, 1.25):
        with torch.no_grad():
            searched.scale.mul_(factor)
            assert error <= (searched(x) - x).square().mean() * 1.02
            searched.scale.div_(factor)


def test_post_silu_values_use_an_offset_and_lose_less_than_with_a_signed_grid():
    x = torch.nn.functional.silu(torch.randn(4000, generator=torch.Generator().manual_seed(4)) * 2)
    affine, signed = LearnedStep(4, symmetric=False), LearnedStep(4)
    for quantizer in (affine, signed):
        quantizer.observe(x)
    assert (affine(x) - x).square().mean() < 0.5 * (signed(x) - x).square().mean()


def test_half_precision_inputs_keep_their_dtype_and_are_rounded_in_float32():
    quantizer, x = make(LearnedStep, 8, False, None)
    assert quantizer(x.bfloat16()).dtype == torch.bfloat16
    assert torch.equal(quantizer(x.bfloat16()), quantizer(x.bfloat16().float()).bfloat16())
