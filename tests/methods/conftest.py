"""What the tests of all methods start from: a tiny pipeline, calls recorded along its trajectories, a coarse search."""

import pytest

from dmquant.denoiser import open_pipeline
from dmquant.quantizers import uniform
from dmquant.samples import record


@pytest.fixture(scope="module", autouse=True)
def coarse_search():
    """Grids are chosen among few candidates: how they are found is tested with the quantizers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(uniform, "SEARCH_STEPS", 8)
        yield


@pytest.fixture(scope="module")
def pipeline(tiny_folder):
    return open_pipeline(tiny_folder)


@pytest.fixture(scope="module")
def samples(pipeline):
    return record(pipeline, 4, steps=3, seed=0)
