import torch

from dmquant.quantizers.binary import Binary


def make():
    quantizer, x = Binary(num_channels=5), torch.randn(5, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    quantizer.observe(x)
    return quantizer, x


def test_the_law_holds_for_one_bit_weights_and_sign_of_zero_is_plus_one():
    quantizer, x = make()
    x[0, 0] = 0
    quantizer.observe(x)
    assert torch.equal(quantizer(x), quantizer.encode(x).decode())
    assert (quantizer(x)[0, 0] > 0).all()
    assert torch.allclose(quantizer.scale.flatten(), x.abs().mean((1, 2, 3)))
    assert all(len(channel.unique()) == 2 for channel in quantizer(x))


def test_gradients_equal_the_closed_form():
    quantizer, x = make()
    x.requires_grad_()
    gradient = torch.randn(5, 4, 3, 3, generator=torch.Generator().manual_seed(1))
    quantizer(x).backward(gradient)
    sign = torch.where(x >= 0, 1.0, -1.0).detach()
    assert torch.allclose(quantizer.scale.grad.flatten(), (gradient * sign).sum((1, 2, 3)), atol=1e-5)
    assert torch.allclose(x.grad, gradient * quantizer.scale.detach() * (x.detach().abs() <= 1), atol=1e-6)


def test_a_scale_that_was_trained_below_zero_stands_still_and_the_law_holds():
    quantizer, x = make()
    with torch.no_grad():
        quantizer.scale[0] = -1
    assert torch.equal(quantizer(x), quantizer.encode(x).decode()) and (quantizer.grid()[0] > 0).all()
