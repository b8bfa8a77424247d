"""Libraries are made once, by whoever comes first, and their absence is no error."""

import os
import shutil
import subprocess
import sys
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dmquant.kernels import build
from dmquant.kernels.build import CannotCompile, compile_source, find_compiler
from dmquant.kernels.registry import KERNELS

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def home(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def copied_sources(monkeypatch, tmp_path) -> Path:
    copied = shutil.copytree(build.SOURCES, tmp_path / "csrc")
    monkeypatch.setattr(build, "SOURCES", copied)
    return copied


def files() -> list[str]:
    return sorted(file.suffix for file in build.cache_folder().iterdir())


@pytest.mark.needs_compiler
def test_a_library_is_compiled_once_and_left_alone_after():
    library = compile_source("simd/isa", ())
    made = library.stat().st_mtime_ns
    assert compile_source("simd/isa", ()) == library and library.stat().st_mtime_ns == made
    assert files() == [".lock", ".so"] and build.cache_folder().stat().st_mode & 0o077 == 0


@pytest.mark.needs_compiler
def test_many_at_once_get_one_library():
    with ThreadPoolExecutor(4) as pool:
        assert len(set(pool.map(lambda _: compile_source("simd/isa", ()), range(8)))) == 1
    assert files() == [".lock", ".so"]


@pytest.mark.needs_compiler
def test_a_lock_that_is_a_link_is_refused_and_what_it_leads_to_is_left_alone(tmp_path):
    library, thesis = compile_source("simd/isa", ("-DUNUSED",)), tmp_path / "thesis.tex"
    thesis.write_text("years of work")
    lock = library.with_suffix(".lock")
    library.unlink()
    lock.unlink()
    lock.symlink_to(thesis)
    with pytest.raises(CannotCompile):
        build.load("simd/isa", ("-DUNUSED",))
    assert thesis.read_text() == "years of work" and not library.exists()


@pytest.mark.needs_compiler
def test_flags_sources_and_the_compiler_are_in_the_name(monkeypatch, tmp_path):
    names = {compile_source("simd/isa", flags).name for flags in ((), ("-O1",))}
    sources = copied_sources(monkeypatch, tmp_path)
    isa = sources / "simd" / "isa.c"
    isa.write_text(isa.read_text() + "/* edited */\n")
    assert len(names | {compile_source("simd/isa", ()).name}) == 3


@pytest.mark.needs_compiler
def test_a_header_in_any_subfolder_and_its_place_are_in_the_name(monkeypatch, tmp_path):
    names = [compile_source("simd/isa", ()).name]
    sources = copied_sources(monkeypatch, tmp_path)
    assert compile_source("simd/isa", ()).name == names[0]
    for header in sorted(sources.rglob("*.h")):
        header.write_text(header.read_text() + "/* edited */\n")
        names.append(compile_source("simd/isa", ()).name)
    (sources / "simd" / "scratch.h").rename(sources / "norm" / "scratch.h")
    names.append(compile_source("simd/isa", ()).name)
    assert len(names) > 10 and len(set(names)) == len(names)


def test_the_distribution_has_every_file_of_the_sources():
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["dmquant"]
    packed = {file for pattern in patterns for file in (ROOT / "dmquant").glob(pattern)}
    sources = {file for file in (ROOT / "dmquant" / "kernels" / "csrc").rglob("*") if file.is_file()}
    assert sources <= packed and {file.parent.name for file in sources} == {"attention", "conv", "norm", "simd"}


def test_no_flag_asks_for_this_machine():
    assert not any("native" in flag for kernel in KERNELS for flag in (*kernel.flags, *build.OPTIONS))


def test_a_compiler_that_is_not_there_or_fails_says_why(monkeypatch, tmp_path):
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(CannotCompile, match="no-such-compiler"):
        find_compiler()
    broken = tmp_path / "cc"
    broken.write_text("#!/bin/sh\necho it is broken >&2\nexit 1\n")
    broken.chmod(0o700)
    monkeypatch.setenv("CC", str(broken))
    with pytest.raises(CannotCompile, match="it is broken"):
        compile_source("simd/isa", ())
    assert files() == [".lock"]


@pytest.mark.needs_compiler
def test_a_cache_that_cannot_be_written_is_no_crash(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(CannotCompile):
        build.load("simd/isa", ("-DUNUSED",))


SCRIPT = """
import os, torch
from dmquant import kernels
from tests.kernels.test_ops import error, expected, make_layer
assert not os.path.exists(os.environ["XDG_CACHE_HOME"]), "importing has written to the cache"
torch.manual_seed(0)
for choice in ("auto", "c", "onednn", "torch"):
    os.environ["DMQUANT_KERNELS"] = choice
    for bits in ((1, 4), (4, 4), (8, 8)):
        layer, x = make_layer((40, 70, 3, 3), *bits, padding=1), torch.randn(2, 70, 6, 5)
        assert error(layer(x), expected(layer, x)) < 1e-5
        assert choice not in ("c", "torch") or layer.weight.blocked is None
"""


def test_without_a_compiler_packed_layers_still_run_and_importing_touches_no_cache(tmp_path):
    environment = {**os.environ, "PATH": str(tmp_path), "CC": ""}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
