"""A gain and an offset are a group norm."""

import pytest
import torch
from torch import nn

from dmquant.kernels.triton.norm import moments


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_they_are_those_of_torch(affine, dtype):
    norm = nn.GroupNorm(4, 12, affine=affine).to(dtype)
    if affine:
        nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    x = (torch.randn(2, 12, 5, 3) * 2 + 7).to(dtype)
    gain, offset = moments(x.permute(0, 2, 3, 1), norm.weight, norm.bias, 4, norm.eps)
    found = x.double() * gain.view(2, 12, 1, 1) + offset.view(2, 12, 1, 1)
    wanted = norm.double()(x.double())
    assert gain.dtype == torch.float32 and (found - wanted).abs().max() < 2e-6 * wanted.abs().max()
