"""Triton's interpreter stands in for a GPU. What has no wheel of Triton has nothing to test here."""

import os
from importlib.util import find_spec

os.environ.setdefault("TRITON_INTERPRET", "1")  # read where a kernel is defined
collect_ignore_glob = [] if find_spec("triton") else ["test_*.py"]
