"""What the tests of all methods share: a coarse search."""

import pytest

from dmquant.quantizers import uniform


@pytest.fixture(scope="module", autouse=True)
def coarse_search():
    """Grids are chosen among few candidates: how they are found is tested with the quantizers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(uniform, "SEARCH_STEPS", 8)
        yield
