"""Tests of the GPU benchmark: without a GPU nothing is measured, and measured rows are kept."""

import json
import sys

import pytest
import torch

from benchmarks import gpu_latency


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Runs the benchmark on a simulated GPU with rows that take no time; returns the rows that were measured."""
    measured = []

    def measure(rows, repeats, end):
        for row in rows[: 1 if end < float("inf") else None]:
            measured.append(gpu_latency.name_of(row))
            yield row, {"median_ms": 2.0 if row[1] == "bf16" else 1.0}

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "made up")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(gpu_latency.status, "kernel_status", lambda: {"triton": ""})
    monkeypatch.setattr(gpu_latency, "measure", measure)

    def call(*arguments):
        measured.clear()
        chosen = ["--models", "cifar", "--batches", "1", "8", "--variants", "bf16", "W1A4"]
        monkeypatch.setattr(sys, "argv", ["gpu_latency", "-o", str(tmp_path / "out.json"), *chosen, *arguments])
        gpu_latency.main()
        return list(measured)

    return call


def test_without_a_gpu_it_says_so_in_one_line_and_writes_nothing(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu_latency", "-o", str(tmp_path / "out.json")])
    with pytest.raises(SystemExit, match="there is no CUDA device .*; nothing was measured$"):
        gpu_latency.main()
    assert not any(tmp_path.iterdir())


def test_a_row_is_measured_once_and_the_same_command_continues(run, capsys, tmp_path):
    assert run("--seconds", "100") == ["cifar, bf16, 1"]
    assert "3 rows are left; the same command continues" in capsys.readouterr().out
    assert run() == ["cifar, bf16, 8", "cifar, W1A4, 1", "cifar, W1A4, 8"] and run() == []
    assert "| cifar, W1A4, 8 | 1.0 | 2.00 |  |" in capsys.readouterr().out
    assert json.loads((tmp_path / "out.json").read_text())["conditions"]["triton"] == "in use"


def test_rows_of_another_device_are_not_mixed_in(run, monkeypatch):
    run()
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "another")
    with pytest.raises(SystemExit, match="was measured on made up, this is another"):
        run()
