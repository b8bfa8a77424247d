"""DilateQuant is many small trainings: a pipeline of one resolution, and grids that are searched coarsely."""

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel

from dmquant.diffusion.trajectories import record
from dmquant.quantizers import uniform


@pytest.fixture(scope="module", autouse=True)
def coarse_search():
    """No law here depends on how well grids are searched; those of other folders do, so that it ends with each file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(uniform, "SEARCH_STEPS", 6)
        yield


@pytest.fixture(scope="session")
def pipeline():
    """Two residual blocks that read concatenations, attention on the way down and in the middle."""
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
