"""Writes, locks, checks and replaces result folders, so that each is complete or absent.

A folder is written under a temporary name beside its final one, every file is flushed to the disk, MANIFEST.json with the
size and SHA-256 of each file comes last, and one rename publishes it. An older result is renamed aside for the moment
between two renames; a process that dies there leaves two names, which the next start repairs. Where a network file system
ignores locks, the unique temporary names still keep writers apart.
"""

import hashlib
import json
import os
import secrets
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any

import psutil
from filelock import FileLock, Timeout

from dmquant.errors import DamagedFile, DmquantError, InputError

MANIFEST = "MANIFEST.json"
FORMAT_VERSION = 1
LONGEST_NAME = 200  # bytes; file systems allow 255, temporary names need the rest
LOCK_WAIT_S = 0.5  # for a lock that its holder is about to release

# Files that may stand beside the published ones: reports, cards, images, and files of other tools (.gitattributes, .cache).
# Loading a pipeline reads none of them.
EXTRA_NAMES = {"report.json", "effort.json", "README.md", "LICENSE"}
EXTRA_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".gif"}


@contextmanager
def publish(folder: str | Path, *, force: bool = False) -> Iterator[Path]:
    """Yields a temporary folder to write into. It gets its manifest and final name when the block ends without an error."""
    folder = check_target(folder, force=force)
    with lock(folder):
        repair(folder)
        # again: without the lock, another process could have changed the folder
        check_target(folder, force=force)
        temporary = _sibling(folder, "tmp")
        temporary.mkdir()
        try:
            yield temporary
            with _named(folder):
                seal(temporary)
                _swing(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def check_target(folder: str | Path, *, force: bool = False) -> Path:
    """Returns the absolute folder. Raises InputError if no result can be published there. Writes nothing."""
    folder = Path(os.path.abspath(folder))
    if len(os.fsencode(folder.name)) > LONGEST_NAME:
        raise InputError(f"the folder name {folder.name[:40]}... is longer than {LONGEST_NAME} bytes")
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise InputError(f"{folder} is a {'link' if folder.is_symlink() else 'file'}; give the name of a folder to make")
    if Path.cwd().is_relative_to(folder):
        raise InputError(f"{folder} is the working folder or holds it; give the name of a folder to make")
    if folder.exists() and any(folder.iterdir()):
        _check_replaceable(folder, force)
    home = next(parent for parent in folder.parents if parent.exists())
    if not home.is_dir() or not os.access(home, os.W_OK | os.X_OK):
        raise InputError(f"{folder} cannot be written: no permission to make anything in {home}")
    return folder


def check_space(folder: str | Path, size_bytes: int) -> None:
    """Raises InputError if the file system of the folder has less space than the size given."""
    folder = Path(os.path.abspath(folder))
    free_bytes = shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free
    if free_bytes < size_bytes:
        raise InputError(f"{folder} needs {size_bytes / 1e6:.1f} MB and only {free_bytes / 1e6:.1f} MB are free on that disk")


def verify_manifest(folder: str | Path) -> list[str]:
    """Checks size and hash of each file against the manifest and returns their names. Raises DamagedFile for the first fault."""
    folder = Path(folder)
    files = read_manifest(folder)
    for name, entry in files.items():
        _check_file(folder / name, entry)
    extra = [name for name in _files(folder) if name not in files and not _may_lie_beside(name)]
    if extra:
        raise DamagedFile(f"{folder / extra[0]} is not in {MANIFEST}: remove it, or write the folder again")
    return list(files)


def read_manifest(folder: str | Path) -> dict[str, dict[str, Any]]:
    """Returns name -> {"size", "sha256"} for every published file, sorted by name."""
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise DamagedFile(f"{folder} has no {MANIFEST}: it is no finished result of dmquant")
    try:
        document = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise DamagedFile(f"{path} is damaged: {error}") from error
    if not isinstance(document, dict) or set(document) != {"files", "format_version"}:
        raise DamagedFile(f"{path} is damaged: it must hold files and format_version")
    if document["format_version"] != FORMAT_VERSION:
        raise DamagedFile(f"{path} has format_version {document['format_version']!r}: this dmquant reads {FORMAT_VERSION}")
    if not isinstance(document["files"], dict) or not all(_is_entry(*item) for item in document["files"].items()):
        raise DamagedFile(f"{path} is damaged: an entry is not a relative name with size and sha256")
    return document["files"]


@contextmanager
def lock(folder: str | Path) -> Iterator[None]:
    """Locks a result folder against other processes. One process may nest locks.

    The operating system drops the lock of a process that dies. A lock file that is a link is refused, not followed.

    Raises:
        InputError: another process holds the folder; it is named.
    """
    folder = Path(os.path.abspath(folder))
    path = folder.with_name(f".{folder.name}.lock")
    # one object per path and process, shared by its threads: it counts nested use
    held = FileLock(path, timeout=LOCK_WAIT_S, thread_local=False, is_singleton=True, on_acquired=_write_holder)
    with _named(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            held.acquire()
        except Timeout:
            raise InputError(f"{folder} is in use by {_read_holder(path)}; wait for it, or give another folder") from None
    try:
        yield
    finally:
        if held.lock_counter == 1:
            with suppress(PermissionError):  # Windows removes no open file; there filelock removes it after the release
                path.unlink(missing_ok=True)
        held.release()


def discard(folder: str | Path) -> None:
    """Removes a result if there is one, and nothing else. It is renamed first, so that no half-removed result is visible."""
    folder = check_target(folder, force=True)
    with lock(folder):
        repair(folder)
        if folder.exists():
            aside = _sibling(folder, "tmp")
            os.rename(folder, aside)
            shutil.rmtree(aside)


def repair(folder: str | Path) -> None:
    """Repairs the work of processes that died: restores a result that was renamed aside, removes temporary folders."""
    folder = Path(os.path.abspath(folder))
    for aside in _siblings(folder, "old"):
        if folder.exists():
            shutil.rmtree(aside)
            continue
        os.rename(aside, folder)
    for temporary in _siblings(folder, "tmp"):
        if not psutil.pid_exists(int(temporary.name.split(".")[-3])):
            shutil.rmtree(temporary)


def seal(folder: Path) -> None:
    """Gives every file the mode of the umask, flushes it to the disk, and writes the manifest last."""
    # the folder was made by mkdir, so its mode shows the umask without touching that of the process
    mode = folder.stat().st_mode & 0o666
    files = {name: _flush(folder / name, mode) for name in _files(folder)}
    document = {"files": files, "format_version": FORMAT_VERSION}
    with open(folder / MANIFEST, "w", encoding="utf-8") as file:
        file.write(json.dumps(document, indent=2, sort_keys=True) + "\n")
    _flush(folder / MANIFEST, mode)
    for path, _, _ in os.walk(folder, topdown=False):
        _flush_folder(path)


def _swing(temporary: Path, folder: Path) -> None:
    """Replaces the old result by two renames. If the second fails or is interrupted, the old result is restored."""
    aside = _sibling(folder, "old")
    had_old = folder.exists()
    if had_old:
        os.rename(folder, aside)
    try:
        os.rename(temporary, folder)
    except BaseException:
        if had_old and not folder.exists():
            os.rename(aside, folder)
        raise
    _flush_folder(folder.parent)
    shutil.rmtree(aside, ignore_errors=True)


def _check_replaceable(folder: Path, force: bool) -> None:
    """Raises InputError unless `force` is given and all files are from dmquant: --force must not delete other files."""
    if not force:
        raise InputError(f"{folder} is not empty; use --force to replace a result, or give another folder")
    try:
        published = read_manifest(folder)
    except DamagedFile as error:
        raise InputError(f"{folder} is not a result of dmquant, --force does not delete it: {error}") from error
    stranger = next((name for name in _files(folder) if name not in published and not _may_lie_beside(name)), None)
    if stranger is not None:
        raise InputError(f"{folder / stranger} is not from dmquant, --force does not delete it; move it away first")


def _may_lie_beside(name: str) -> bool:
    path = PurePosixPath(name)
    is_known = path.name in EXTRA_NAMES or path.suffix.lower() in EXTRA_SUFFIXES
    return name == MANIFEST or path.parts[0].startswith(".") or (len(path.parts) == 1 and is_known)


def _check_file(path: Path, entry: dict[str, Any]) -> None:
    if not path.is_file():
        raise DamagedFile(f"{path} is missing")
    size_bytes = path.stat().st_size
    if size_bytes != entry["size"]:
        raise DamagedFile(f"{path} is damaged: {size_bytes} bytes instead of {entry['size']}")
    if _hash(path) != entry["sha256"]:
        raise DamagedFile(f"{path} is damaged: its SHA-256 differs from the manifest")


def _is_entry(name: str, entry: object) -> bool:
    is_inside = name and not PurePosixPath(name).is_absolute() and ".." not in PurePosixPath(name).parts
    if not is_inside or not isinstance(entry, dict) or set(entry) != {"size", "sha256"}:
        return False
    return type(entry["size"]) is int and isinstance(entry["sha256"], str)


def _write_holder(handle: int) -> None:
    """Writes this process's number and machine into its lock file, behind the byte that Windows lets nobody else read."""
    os.ftruncate(handle, 0)
    os.write(handle, f" process {os.getpid()} on {socket.gethostname()}".encode())


def _read_holder(path: Path) -> str:
    try:
        with open(path, "rb", buffering=0) as file:
            file.seek(1)
            return file.read(300).decode(errors="replace") or "another process"
    except OSError:
        return "another process"


def _sibling(folder: Path, kind: str) -> Path:
    return folder.with_name(f".{folder.name}.{os.getpid()}.{secrets.token_hex(4)}.{kind}")


def _siblings(folder: Path, kind: str) -> list[Path]:
    """Returns temporary siblings of this folder and kind, of any process."""
    start, count = f".{folder.name}.", folder.name.count(".") + 4  # dots in what _sibling makes
    found = [path for path in folder.parent.iterdir() if path.name.startswith(start) and path.suffix == f".{kind}"]
    return sorted(path for path in found if path.name.count(".") == count and path.name.split(".")[-3].isdigit())


def _files(folder: Path) -> list[str]:
    """Returns names of all files relative to the folder, with forward slashes, sorted."""
    walk = os.walk(folder)
    return sorted((Path(path) / name).relative_to(folder).as_posix() for path, _, names in walk for name in names)


def _flush(path: Path, mode: int) -> dict[str, int | str]:
    os.chmod(path, mode)
    with open(path, "r+b") as file:  # Windows flushes only what is open for writing
        os.fsync(file.fileno())
    return {"size": path.stat().st_size, "sha256": _hash(path)}


def _flush_folder(path: str | Path) -> None:
    if os.name == "nt":  # Windows opens no folders
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _hash(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _named(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DmquantError(f"{folder} was not written, what was there before is untouched: {error}") from error
