"""A module imports lower floors only, nobody imports the forbidden, and only the console prints."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "dmquant"
FLOORS = (
    {"errors"},
    {"report", "packing", "clock", "storage", "progress", "images", "ranks", "columns", "labels", "plot", "panels", "effort",
     "meter", "prompts", "silence", "inputs", "folder"},
    {"quantizers", "kernels", "comparison"},
    {"layers", "attention", "formats", "weights", "packed"},
    {"denoiser", "foreign", "blocks", "generation", "clipping", "samples", "calibration", "distill", "denoising", "runs",
     "config"},
    {"methods"},
    {"quantization", "checkpoint", "hf", "metrics", "cost", "gallery"},
    {"evaluation", "coverage", "environment", "page", "sheet", "cards"},
    {"experiments"},
    {"console", "failures", "arguments", "interruption", "options"},
    {"measuring", "comparing"},
    {"cli"},
    {"__init__", "__main__"},
)
FLOOR_OF = {module: floor for floor, modules in enumerate(FLOORS) for module in modules}
# Same floor, one way: the first may import the second.
NEIGHBOURS = {
    ("blocks", "denoiser"), ("foreign", "denoiser"),
    ("generation", "denoiser"), ("clipping", "denoiser"), ("clipping", "generation"),
    ("samples", "denoiser"), ("samples", "generation"),
    ("calibration", "samples"), ("calibration", "denoiser"),
    ("distill", "samples"), ("distill", "runs"), ("runs", "samples"), ("denoising", "denoiser"), ("denoising", "generation"),
    ("packed", "layers"), ("packed", "attention"), ("packed", "formats"), ("packed", "weights"), ("weights", "formats"),
    ("quantization", "hf"), ("checkpoint", "hf"), ("failures", "console"),
    ("interruption", "console"), ("sheet", "page"),
    ("kernels", "quantizers"), ("panels", "plot"), ("plot", "labels"), ("panels", "labels"), ("meter", "effort"),
}  # fmt: skip
FORBIDDEN = {"torchvision", "torch_fidelity", "click"}
FILES = sorted(ROOT.rglob("*.py"))


def imports(file: Path) -> Iterator[str]:
    """Dotted names of everything that a file imports, at the top and inside functions."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file.name}:{node.lineno} imports relatively"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def unit(dotted: str) -> str:
    """The first name below dmquant: the module or the package that a floor lists."""
    name = dotted.split(".")[1]
    return name if (ROOT / name).exists() or (ROOT / f"{name}.py").exists() else "__init__"


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.relative_to(ROOT).as_posix())
def test_a_module_imports_lower_floors_only(file):
    here = file.relative_to(ROOT).parts[0].removesuffix(".py")
    assert here in FLOOR_OF, f"{here} stands on no floor: list it above"
    for name in imports(file):
        assert name.split(".")[0] not in FORBIDDEN, f"{here} imports {name}"
        there = unit(name) if name.startswith("dmquant.") else here
        # `from dmquant import __version__` reads a literal and imports nothing
        is_allowed = there in (here, "__init__") or FLOOR_OF[there] < FLOOR_OF[here] or (here, there) in NEIGHBOURS
        assert is_allowed, f"{here} (floor {FLOOR_OF[here]}) imports {there} (floor {FLOOR_OF[there]})"


def test_methods_do_not_import_each_other():
    for file in (ROOT / "methods").glob("*/*.py"):
        others = [name for name in imports(file) if name.startswith("dmquant.methods.") and ".base" not in name]
        assert all(name.split(".")[2] == file.parent.name for name in others), f"{file} imports {others}"


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.relative_to(ROOT).as_posix())
def test_only_the_console_prints(file):
    names = {node.id for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))) if isinstance(node, ast.Name)}
    assert "print" not in names
    assert file.name == "console.py" or not any(name.split(".")[0] == "rich" for name in imports(file))
