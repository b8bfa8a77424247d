"""Fixture of all tests of methods: a coarse grid search."""

import pytest

from dmquant.quantizers import uniform


@pytest.fixture(scope="module", autouse=True)
def coarse_search():
    """Reduces the candidates of the grid search, which is tested with the quantizers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(uniform, "SEARCH_STEPS", 8)
        yield
