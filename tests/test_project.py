"""The files around the code agree with each other and with the package."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml

import dmquant

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
CONSTRAINTS = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE))
HIDDEN = (".github/**/*.yml", ".pre-commit-config.yaml")


def test_the_newest_release_in_the_changelog_is_this_version():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    versions = re.findall(r"^## \[(\d+\.\d+\.\d+)\] - \d{4}-\d\d-\d\d$", text, re.MULTILINE)
    assert versions[0] == dmquant.__version__
    assert all(f"\n[{version}]: https://" in text for version in versions)


def test_the_licence_is_the_one_that_the_metadata_name():
    assert PROJECT["license"] == "Apache-2.0"
    assert "Apache License\n" in (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert all((ROOT / name).is_file() for name in PROJECT["license-files"])


def test_linters_have_one_version_everywhere():
    pinned = dict(entry.split("==") for entry in PROJECT["optional-dependencies"]["dev"] if "==" in entry)
    assert {name: CONSTRAINTS[name] for name in pinned} == pinned
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"]
    assert [repo["rev"] for repo in hooks if "ruff" in repo["repo"]] == [f"v{pinned['ruff']}"]


def test_every_dependency_is_pinned():
    extras = PROJECT["optional-dependencies"].values()
    entries = [*PROJECT["dependencies"], *(entry for extra in extras for entry in extra)]
    names = {re.match(r"[\w-]+", entry)[0].lower() for entry in entries} - {"dmquant"}
    assert names <= {name.lower() for name in CONSTRAINTS}


def test_ci_runs_every_python_that_the_classifiers_name():
    jobs = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))["jobs"]
    named = [line.rpartition(" ")[2] for line in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", line)]
    assert jobs["test"]["strategy"]["matrix"]["python"] == named


@pytest.mark.parametrize("file", [file for pattern in HIDDEN for file in sorted(ROOT.glob(pattern))], ids=lambda file: file.name)
def test_a_yaml_file_is_valid(file):
    assert isinstance(yaml.safe_load(file.read_text(encoding="utf-8")), dict)
