"""A result folder is complete or absent, whatever fails and whenever."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dmquant.checkpoint import atomic_folder
from dmquant.checkpoint.atomic_folder import MANIFEST, check_space, check_target, lock, publish, repair, verify_manifest
from dmquant.errors import DamagedFile, DmquantError, InputError


def write(folder: Path, content: str, **options: bool) -> None:
    with publish(folder, **options) as temporary:
        (temporary / "unet").mkdir()
        (temporary / "unet" / "weights").write_text(content)
        (temporary / "index.json").write_text(content)


def read(folder: Path) -> str:
    """What the folder holds, all of it, after repair and verification."""
    with lock(folder):
        repair(folder)
    assert verify_manifest(folder) == ["index.json", "unet/weights"]
    (content,) = {(folder / name).read_text() for name in ("index.json", "unet/weights")}
    return content


def test_a_published_folder_holds_the_files_and_a_manifest_and_leaves_nothing_beside_it(tmp_path):
    write(tmp_path / "out", "one")
    assert read(tmp_path / "out") == "one"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert json.loads((tmp_path / "out" / MANIFEST).read_text())["files"]["index.json"]["size"] == 3


def test_missing_parents_are_made(tmp_path):
    write(tmp_path / "runs" / "today" / "out", "one")
    assert read(tmp_path / "runs" / "today" / "out") == "one"


def test_the_same_content_gives_the_same_manifest(tmp_path):
    write(tmp_path / "a", "one")
    write(tmp_path / "b", "one")
    assert (tmp_path / "a" / MANIFEST).read_bytes() == (tmp_path / "b" / MANIFEST).read_bytes()


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_the_umask_decides_who_may_read(tmp_path, umask):
    old = os.umask(umask)
    try:
        with publish(tmp_path / "out") as temporary:
            (temporary / "private").touch(mode=0o600)
    finally:
        os.umask(old)
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()}
    assert modes == {0o666 & ~umask}


def test_an_exception_inside_leaves_no_trace_and_keeps_the_old_result(tmp_path):
    write(tmp_path / "out", "old")
    with pytest.raises(KeyError), publish(tmp_path / "out", force=True) as temporary:
        (temporary / "index.json").write_text("half")
        raise KeyError
    assert read(tmp_path / "out") == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


class Faulty:
    """The os module and open, failing at the n-th use of a function that changes the disk."""

    CHANGING = frozenset({"open", "write", "ftruncate", "fsync", "chmod", "rename"})

    def __init__(self, fail_at: int):
        self.left, self.path = fail_at, os.path

    def __getattr__(self, name: str):
        function = open if name == "builtin_open" else getattr(os, name)
        return self._wrap(function) if name in self.CHANGING | {"builtin_open"} else function

    def _wrap(self, function):
        def call(*args, **kwargs):
            self.left -= 1
            if self.left == 0:
                raise OSError(5, "Input/output error", str(args[0]))
            return function(*args, **kwargs)

        return call


def test_the_old_or_the_new_result_is_there_whichever_operation_fails(tmp_path, monkeypatch):
    outcomes = []
    for fail_at in range(1, 200):
        folder = tmp_path / str(fail_at) / "out"
        write(folder, "old")
        faulty = Faulty(fail_at)
        with monkeypatch.context() as patch:
            patch.setattr(atomic_folder, "os", faulty)
            patch.setattr(atomic_folder, "open", faulty.builtin_open, raising=False)
            try:
                write(folder, "new", force=True)
            except (DmquantError, OSError) as error:
                assert "Input/output error" in str(error) and str(folder.parent) in str(error)  # noqa: PT017  it need not fail
        outcomes.append(read(folder))
        if faulty.left > 0:
            break
    assert faulty.left > 0 and len(outcomes) > 15
    assert outcomes[0] == "old" and outcomes[-1] == "new"


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_second_rename_that_fails_or_is_interrupted_brings_the_old_result_back(tmp_path, monkeypatch, error):
    write(tmp_path / "out", "old")

    def rename(source: Path, target: Path) -> None:
        if str(source).endswith(".tmp"):
            raise error
        os.replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(atomic_folder.os, "rename", rename)
        with pytest.raises(DmquantError if isinstance(error, OSError) else KeyboardInterrupt):
            write(tmp_path / "out", "new", force=True)
    assert verify_manifest(tmp_path / "out") and (tmp_path / "out" / "index.json").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


WRITER = """
import sys
from dmquant.checkpoint.atomic_folder import publish
for generation in range(10**6):
    with publish(sys.argv[1], force=True) as folder:
        (folder / "unet").mkdir()
        (folder / "unet" / "weights").write_text(str(generation) * 1000)
        (folder / "index.json").write_text(str(generation) * 1000)
    print(generation, flush=True)
"""


@pytest.mark.parametrize("seed", range(4))
def test_a_killed_writer_leaves_a_complete_result_and_the_next_one_tidies_up(tmp_path, seed):
    command = [sys.executable, "-c", WRITER, str(tmp_path / "out")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    process.stdout.readline()
    time.sleep(random.Random(seed).uniform(0, 0.02))
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert read(tmp_path / "out").strip("0123456789") == ""
    write(tmp_path / "out", "next", force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_process_that_died_between_the_two_renames_is_repaired(tmp_path):
    write(tmp_path / "out", "old")
    os.rename(tmp_path / "out", tmp_path / ".out.4194305.00000000.old")
    (tmp_path / ".out.4194305.00000000.tmp").mkdir()
    (tmp_path / ".out.4194305.00000000.tmp" / "index.json").write_text("new, perhaps incomplete")
    assert read(tmp_path / "out") == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_temporary_folders_of_living_processes_and_of_other_results_are_left_alone(tmp_path):
    others = [f".out.{os.getppid()}.00000000.tmp", ".out.b.4194305.00000000.tmp", ".out.4194305.tmp", ".other.4194305.0.tmp"]
    for name in others:
        (tmp_path / name).mkdir()
    write(tmp_path / "out", "one")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*others, "out"])


def test_a_folder_that_is_not_empty_is_replaced_by_force_only(tmp_path):
    write(tmp_path / "out", "old")
    with pytest.raises(InputError, match="--force"):
        write(tmp_path / "out", "new")
    (tmp_path / "out" / "report.json").write_text("{}")
    write(tmp_path / "out", "new", force=True)
    assert read(tmp_path / "out") == "new"


def test_force_deletes_only_what_dmquant_published(tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match="not a result of dmquant"):
        check_target(home, force=True)
    write(tmp_path / "out", "old")
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match="thesis.tex is not from dmquant"):
        check_target(tmp_path / "out", force=True)


def test_an_unusable_target_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    for name, reason in {"file": "is a file", "link": "is a link", "file/out": "cannot be written", "x" * 250: "longer"}.items():
        with pytest.raises(InputError, match=reason):
            check_target(tmp_path / name, force=True)
    monkeypatch.chdir(tmp_path / "real")
    with pytest.raises(InputError, match="working folder"):
        check_target("..", force=True)
    monkeypatch.setattr(atomic_folder.os, "access", lambda path, mode: False)
    with pytest.raises(InputError, match="no permission"):
        check_target("out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link", "real"]


def test_too_little_space_is_said_before_the_work(tmp_path):
    check_space(tmp_path / "not" / "yet", 1)
    with pytest.raises(InputError, match="MB are free"):
        check_space(tmp_path / "out", 10**18)


def test_an_altered_missing_or_added_file_is_named(tmp_path):
    folder = tmp_path / "out"
    write(folder, "one")
    weights = folder / "unet" / "weights"
    weights.write_text("two")
    with pytest.raises(DamagedFile, match="unet/weights is damaged: its SHA-256"):
        verify_manifest(folder)
    weights.write_text("longer")
    with pytest.raises(DamagedFile, match="6 bytes instead of 3"):
        verify_manifest(folder)
    weights.unlink()
    with pytest.raises(DamagedFile, match="unet/weights is missing"):
        verify_manifest(folder)
    weights.write_text("one")
    (folder / "unet" / "report.json").write_text("not the place for it")
    with pytest.raises(DamagedFile, match="unet/report.json is not in"):
        verify_manifest(folder)


def test_reports_cards_and_pictures_may_be_added(tmp_path):
    write(tmp_path / "out", "one")
    for name in ("report.json", "README.md", "grid.png", ".gitattributes"):
        (tmp_path / "out" / name).write_text("added")
    assert read(tmp_path / "out") == "one"


@pytest.mark.parametrize(
    "manifest",
    [
        "", "null", "[]", "{", "[" * 10**5, '{"files": {}}', '{"files": [], "format_version": 1}',
        '{"files": {}, "format_version": 2}', '{"files": {"../x": {"size": 1, "sha256": ""}}, "format_version": 1}',
        '{"files": {"/x": {"size": 1, "sha256": ""}}, "format_version": 1}', '{"files": {"x": 1}, "format_version": 1}',
        '{"files": {"x": {"size": true, "sha256": ""}}, "format_version": 1}', "\udcff",
    ],
)  # fmt: skip
def test_a_hostile_manifest_is_refused_by_name(tmp_path, manifest):
    (tmp_path / MANIFEST).write_bytes(manifest.encode(errors="surrogateescape"))
    with pytest.raises(DamagedFile, match=MANIFEST):
        verify_manifest(tmp_path)


def test_a_folder_without_a_manifest_is_no_result(tmp_path):
    with pytest.raises(DamagedFile, match="no MANIFEST.json"):
        verify_manifest(tmp_path)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40, deadline=None)
@given(st.data())
def test_any_changed_byte_is_refused_or_changes_no_file(tmp_path, data):
    folder = tmp_path / "out"
    if not folder.exists():
        write(folder, "some content")
    path = folder / data.draw(st.sampled_from([MANIFEST, "index.json", "unet/weights"]))
    intact = path.read_bytes()
    place = data.draw(st.integers(0, len(intact) - 1))
    changed = bytearray(intact)
    changed[place] ^= data.draw(st.integers(1, 255))
    path.write_bytes(changed)
    try:
        verify_manifest(folder)
        assert path.name == MANIFEST
    except DamagedFile:
        pass
    finally:
        path.write_bytes(intact)


def publish_elsewhere(folder: Path) -> str:
    """What another process says on stderr that publishes the folder."""
    code = "import sys\nfrom dmquant.checkpoint.atomic_folder import publish\nwith publish(sys.argv[1], force=True): pass"
    return subprocess.run([sys.executable, "-c", code, str(folder)], check=False, capture_output=True, text=True).stderr


def test_a_second_process_is_told_who_holds_the_folder_until_the_outermost_block_ends(tmp_path):
    in_use = f"InputError: {tmp_path / 'out'} is in use by process {os.getpid()} on {socket.gethostname()}"
    with lock(tmp_path / "out"):
        assert in_use in publish_elsewhere(tmp_path / "out")
        with lock(tmp_path / "out"):
            pass
        assert in_use in publish_elsewhere(tmp_path / "out")
    assert publish_elsewhere(tmp_path / "out") == ""


@pytest.mark.parametrize("target", ["thesis.tex", "nowhere"])
def test_a_lock_that_is_a_link_is_refused_and_what_it_leads_to_is_left_alone(tmp_path, target):
    (tmp_path / "thesis.tex").write_text("years of work")
    (tmp_path / ".out.lock").symlink_to(tmp_path / target)
    with pytest.raises(DmquantError, match="out was not written"):
        write(tmp_path / "out", "one")
    assert (tmp_path / "thesis.tex").read_text() == "years of work"
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.lock", "thesis.tex"]


def test_the_lock_of_a_dead_process_is_taken_over(tmp_path):
    (tmp_path / ".out.lock").write_text(f"process 4194305 on {socket.gethostname()}")
    write(tmp_path / "out", "one")
    assert read(tmp_path / "out") == "one"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_one_process_may_publish_while_it_holds_the_lock(tmp_path):
    with lock(tmp_path / "out"):
        write(tmp_path / "out", "one")
        assert (tmp_path / ".out.lock").exists()
    assert read(tmp_path / "out") == "one"


def test_a_discarded_result_is_gone_and_nothing_else_is(tmp_path):
    with atomic_folder.publish(tmp_path / "out") as folder:
        (folder / "a.txt").write_text("a")
    atomic_folder.discard(tmp_path / "out")
    atomic_folder.discard(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "diary.txt").write_text("mine")
    with pytest.raises(InputError, match="does not delete"):
        atomic_folder.discard(tmp_path / "home")
