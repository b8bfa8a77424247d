import pytest
import torch

from dmquant.methods.binarydm.evolvable_basis import EvolvableBasis


def make(dtype=torch.float32):
    x = torch.randn(5, 4, 3, 3, generator=torch.Generator().manual_seed(0), dtype=dtype)
    quantizer = EvolvableBasis(num_channels=5).to(dtype)
    quantizer.observe(x)
    return quantizer, x


def test_two_bases_make_four_values_per_channel_and_one_makes_two():
    quantizer, x = make()
    assert all(len(channel.unique()) == 4 for channel in quantizer(x))
    quantizer.bits = 1
    assert all(len(channel.unique()) == 2 for channel in quantizer(x))


def test_scales_start_at_the_mean_magnitudes_of_the_weight_and_of_the_residual():
    quantizer, x = make()
    scale = x.abs().mean((1, 2, 3), keepdim=True)
    rest = x - torch.where(x >= 0, scale, -scale)
    assert torch.allclose(quantizer.scale, scale)
    assert torch.allclose(quantizer.second_scale, rest.abs().mean((1, 2, 3), keepdim=True))


@pytest.mark.parametrize("num_bases", [1, 2])
def test_decoded_codes_equal_the_output_in_both_stages_and_sign_of_zero_is_plus_one(num_bases):
    quantizer, x = make()
    quantizer.bits = num_bases
    x[0, 0] = 0
    x[1, 0] = quantizer.scale[1]  # the residual is zero
    with torch.no_grad():
        quantizer.second_scale[2] = -1  # a scale trained below zero is clamped
    codes = quantizer.encode(x)
    assert codes.bits == quantizer.bits == num_bases
    assert torch.equal(quantizer(x), codes.decode())
    expected = (quantizer.scale - (quantizer.second_scale if num_bases == 2 else 0))[0]
    assert torch.equal(quantizer(x)[0, 0], expected.squeeze(0).expand(3, 3))
    assert (quantizer(x)[1, 0] > 0).all()


def test_gradients_equal_the_closed_form():
    quantizer, x = make(torch.float64)
    with torch.no_grad():
        quantizer.scale.mul_(1.7)  # some residuals and some weights are beyond 1
    x = x.requires_grad_()
    gradient = torch.randn(5, 4, 3, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    quantizer(x).backward(gradient)
    first, second, latent = quantizer.scale.detach(), quantizer.second_scale.detach(), x.detach()
    sign = torch.where(latent >= 0, 1.0, -1.0).double()
    rest = latent - first * sign
    passes, rest_passes = (latent.abs() <= 1).double(), (rest.abs() <= 1).double()
    assert 0 < passes.mean() < 1 and 0 < rest_passes.mean() < 1
    by_first = (gradient * sign * (1 - second * rest_passes)).sum((1, 2, 3))
    by_second = (gradient * torch.where(rest >= 0, 1.0, -1.0)).sum((1, 2, 3))
    by_latent = gradient * (first * passes + second * rest_passes * (1 - first * passes))
    assert torch.allclose(quantizer.scale.grad.flatten(), by_first)
    assert torch.allclose(quantizer.second_scale.grad.flatten(), by_second)
    assert torch.allclose(x.grad, by_latent)


def test_two_bases_have_a_smaller_error_than_one():
    quantizer, x = make()
    errors = []
    for num_bases in (1, 2):
        quantizer.bits = num_bases
        errors.append((quantizer(x) - x).square().mean((1, 2, 3)))
    assert (errors[1] < errors[0]).all()
