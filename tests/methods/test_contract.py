"""The built-in methods keep the contract: a new one is tested by being listed."""

import pytest

from dmquant import methods
from dmquant.errors import InputError
from dmquant.testing import MethodContract


class TestBuiltIn(MethodContract):
    @pytest.fixture(scope="class", params=methods.BUILT_IN)
    @classmethod
    def method_class(cls, request):
        return methods.get(request.param)


def test_an_unknown_method_is_refused_with_the_nearest_name():
    with pytest.raises(InputError, match="did you mean 'lsq'"):
        methods.get("lsqq")
