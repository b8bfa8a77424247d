"""Fixtures of the DilateQuant tests: a pipeline with one resolution, and a coarse grid search."""

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel

from dmquant.diffusion.trajectories import record
from dmquant.quantizers import uniform


@pytest.fixture(scope="module", autouse=True)
def coarse_search():
    """Reduces the steps of the grid search during one test file; no test here depends on them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(uniform, "SEARCH_STEPS", 6)
        yield


@pytest.fixture(scope="session")
def pipeline():
    """A UNet with two up blocks that read skip connections, and attention in the down and middle blocks."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = UNet2DModel(
            sample_size=8, block_out_channels=(8,), layers_per_block=1, norm_num_groups=4, attention_head_dim=4,
            down_block_types=("AttnDownBlock2D",), up_block_types=("UpBlock2D",),
        )  # fmt: skip
    return DDIMPipeline(unet.eval(), DDIMScheduler())


@pytest.fixture(scope="session")
def samples(pipeline):
    return record(pipeline, 4, steps=3, seed=0)
