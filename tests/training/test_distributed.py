"""Several processes make one result; the first of them writes and speaks."""

import os
import subprocess
import sys

from dmquant.cli import app, console
from dmquant.training import distributed

SMALL = ("trajectories=1", "sampling_steps=2", "calibration_samples=2", "batch=2", "init=minmax")
QUICK = ["--device=cpu", "--max-steps=2", *(f"--set={pair}" for pair in SMALL)]


def test_two_ranks_write_one_pipeline_and_leave_together(tiny_folder, tmp_path, capsys):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "dmquant"]
    command = [*launch, "quantize", str(tiny_folder), "-o", str(tmp_path / "out"), *QUICK]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("wrote ") == 1 and "destroy_process_group" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert app.run_command(["verify", str(tmp_path / "out")]) == 0


def test_the_other_ranks_are_silent_except_when_they_fail(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    console.print_result("result")
    console.print_table(["a"], [["b"]], align="l")
    console.print_message("talk")
    assert list(console.Tracker(period_s=0.0)(range(2), "work")) == [0, 1]
    console.print_error("no memory")
    assert capsys.readouterr() == ("", "error: rank 1: no memory\n")


def test_a_process_alone_is_the_first_and_leaves_at_once(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    assert distributed.is_first()
    distributed.leave_together()


def test_a_process_alone_shares_with_itself(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    distributed.join(on_cpu=True)
    assert (distributed.count(), distributed.is_launched()) == (1, False)
    assert distributed.gather("page") == ["page"] and distributed.share("result") == "result"
