"""Tests of dispatch on a GPU need Triton, which is not installed on every platform."""

from importlib.util import find_spec

collect_ignore = [] if find_spec("triton") else ["test_dispatch_on_gpu.py"]
