import pytest
import torch
from diffusers import UNet2DModel
from torch import nn

from dmquant.diffusion.example_inputs import example_inputs
from dmquant.errors import InputError
from dmquant.testing import TINY_UNET
from tests.diffusion.test_pipeline import TINY, every_denoiser, on_meta


@every_denoiser
def test_example_inputs_also_run_for_real(kind):
    denoiser = kind(**TINY[kind]).eval()
    with torch.no_grad():
        output = denoiser(**example_inputs(denoiser, batch=2, device="cpu"), return_dict=False)[0]
    assert len(output) == 2 and output.isfinite().all()


LABELS = [{"num_class_embeds": 10}, {"class_embed_type": "timestep"}, {"class_embed_type": "identity"}]


@pytest.mark.parametrize("settings", LABELS)
def test_class_conditional_unets_are_given_labels(settings):
    denoiser = on_meta(UNet2DModel, **TINY_UNET, **settings)
    inputs = example_inputs(denoiser)
    assert "class_labels" in inputs and denoiser(**inputs).sample.shape == inputs["sample"].shape


def test_an_unknown_denoiser_has_no_known_inputs():
    with pytest.raises(InputError, match="Linear are not known"):
        example_inputs(nn.Linear(1, 1))
