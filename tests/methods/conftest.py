"""What the tests of all methods start from: a tiny pipeline and calls recorded along its trajectories."""

import pytest

from dmquant.denoiser import open_pipeline
from dmquant.samples import record


@pytest.fixture(scope="module")
def pipeline(tiny_folder):
    return open_pipeline(tiny_folder)


@pytest.fixture(scope="module")
def samples(pipeline):
    return record(pipeline, 4, steps=3, seed=0)
