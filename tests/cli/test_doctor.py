"""Tests of the doctor: it lists what a bug report needs; its required packages are those of the project."""

import re
import tomllib
from pathlib import Path

from dmquant.cli import doctor

PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_the_required_packages_are_those_of_the_project():
    assert {re.match(r"[\w-]+", line)[0] for line in PROJECT["dependencies"]} == set(doctor.REQUIRED)


def test_a_package_that_is_missing_is_a_problem_only_if_it_is_required(monkeypatch):
    monkeypatch.setattr(doctor, "REQUIRED", ("no-such-package",))
    monkeypatch.setattr(doctor, "OPTIONAL", ("no-such-extra",))
    found = {finding.name: finding for finding in doctor.collect_findings()}
    assert not found["no-such-package"].is_ok and "pip install" in found["no-such-package"].advice
    assert found["no-such-extra"].is_ok


def test_the_kernels_are_named_with_the_reason_of_each_that_is_not_in_use(monkeypatch):
    def found() -> dict[str, str]:
        return {finding.name: finding.value for finding in doctor.collect_findings() if finding.name.startswith("kernel")}

    monkeypatch.setenv("DMQUANT_KERNELS", "torch")
    assert found()["kernels"].startswith("torch") and found()["kernel vnni"] == "DMQUANT_KERNELS=torch"
    states = {"fast": "", "other": "this processor has no X", "third": ""}
    monkeypatch.setattr(doctor.status, "kernel_status", lambda: states)
    assert found()["kernels"] == "fast, third" and found()["kernel other"] == "this processor has no X"


def test_inception_weights_are_no_problem_if_absent_and_named_if_present(monkeypatch, tmp_path):
    def inception() -> str:
        return {finding.name: finding for finding in doctor.collect_findings()}["inception weights"].value

    monkeypatch.setenv("DMQUANT_INCEPTION_WEIGHTS", str(tmp_path / "nowhere"))
    assert "dmquant fetch inception" in inception()
    (tmp_path / "weights.pth").write_bytes(b"")
    monkeypatch.setenv("DMQUANT_INCEPTION_WEIGHTS", str(tmp_path / "weights.pth"))
    assert inception() == str(tmp_path / "weights.pth")
