"""Compiles C sources to shared libraries with the system's compiler, when they are first needed, into the user's cache.

The name of a library has a hash of all sources, its flags, the compiler's version and the machine, so an edit, an upgrade or
another machine with the same home folder gets a library of its own. No flag depends on this machine's processor
(-march=native), so a cached library runs wherever its name is found.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from filelock import FileLock

SOURCES = Path(__file__).parent / "csrc"
OPTIONS = ("-O3", "-std=c11", "-fPIC", "-shared", "-ffp-contract=off")
TIMEOUT_S = 300


class CannotCompile(Exception):
    """Says why a library cannot be compiled or loaded. Kernels that need it are not used."""


@cache
def load(name: str, flags: tuple[str, ...] = ()) -> ctypes.CDLL:
    """Returns the library of csrc/<name>.c, such as conv/amx, and compiles it if it is missing. Raises CannotCompile."""
    try:
        return ctypes.CDLL(str(compile_source(name, flags)))
    except OSError as error:
        raise CannotCompile(f"{name}.c: {error}") from error


def compile_source(name: str, flags: tuple[str, ...]) -> Path:
    """Returns the library's file. One process compiles it, the others wait; a file with this name is complete."""
    compiler = find_compiler()
    library = cache_folder() / f"{name.replace('/', '-')}-{_fingerprint(compiler, flags)}.so"
    if library.exists():
        return library
    library.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with FileLock(library.with_suffix(".lock")):
        if not library.exists():
            _compile(compiler, name, flags, library)
    return library


def find_compiler() -> str:
    """Returns the path of $CC, or else of the first of cc, gcc and clang on the PATH. Raises CannotCompile."""
    wanted = (os.environ["CC"],) if os.environ.get("CC") else ("cc", "gcc", "clang")
    found = next(filter(None, map(shutil.which, wanted)), None)
    if found is None:
        raise CannotCompile(f"no C compiler ({', '.join(wanted)}) on the PATH")
    return found


def cache_folder() -> Path:
    """Returns $XDG_CACHE_HOME/dmquant/kernels, or ~/.cache/dmquant/kernels."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dmquant" / "kernels"


def _compile(compiler: str, name: str, flags: tuple[str, ...], library: Path) -> None:
    handle, draft = tempfile.mkstemp(dir=library.parent, suffix=".so")
    os.close(handle)
    try:
        # without OpenMP the library is compiled for one thread
        for parallel in (["-fopenmp"], []):
            command = [compiler, *OPTIONS, *flags, *parallel, "-I", str(SOURCES), "-o", draft, str(SOURCES / f"{name}.c"), "-lm"]
            done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
            if done.returncode == 0:
                os.replace(draft, library)
                return
        raise CannotCompile(f"{compiler} cannot compile {name}.c: {(done.stderr.strip() or 'no message').splitlines()[0]}")
    except subprocess.TimeoutExpired as error:
        raise CannotCompile(f"{compiler} took more than {TIMEOUT_S} s over {name}.c") from error
    finally:
        Path(draft).unlink(missing_ok=True)


def _fingerprint(compiler: str, flags: tuple[str, ...]) -> str:
    known = hashlib.sha256()
    for file in sorted(file for file in SOURCES.rglob("*") if file.is_file()):
        known.update(file.relative_to(SOURCES).as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
    known.update("\0".join((*OPTIONS, *flags, _version(compiler), platform.machine(), platform.system())).encode())
    return known.hexdigest()[:20]


@cache
def _version(compiler: str) -> str:
    try:
        return subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=TIMEOUT_S).stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CannotCompile(f"{compiler}: {error}") from error
