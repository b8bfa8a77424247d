"""A module imports lower floors only, nobody imports the forbidden, and only the console prints."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "dmquant"
FLOORS = (
    {"errors", "progress", "assets"},
    {"kernels"},
    {"quantizers"},
    {"nn", "diffusion"},
    {"checkpoint"},
    {"training"},
    {"methods"},
    {"quantization", "hf"},
    {"evaluation"},
    {"cli", "testing"},
    {"__init__", "__main__"},
)
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
# The exceptions, as importing and imported module, each with its reason.
EXCEPTIONS: set[tuple[str, str]] = set()
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


def room(dotted: str) -> str:
    """The first name below dmquant: the room that a floor lists."""
    name = dotted.split(".")[1]
    return name if (ROOT / name).exists() or (ROOT / f"{name}.py").exists() else "__init__"


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.relative_to(ROOT).as_posix())
def test_a_room_imports_lower_floors_only(file):
    here, module = file.relative_to(ROOT).parts[0].removesuffix(".py"), file.relative_to(ROOT).as_posix()
    assert here in FLOOR_OF, f"{here} stands on no floor: list it above"
    for name in imports(file):
        assert name.split(".")[0] not in FORBIDDEN, f"{module} imports {name}"
        there = room(name) if name.startswith("dmquant.") else here
        # `from dmquant import __version__` reads a literal and imports nothing
        is_allowed = there in (here, "__init__") or FLOOR_OF[there] < FLOOR_OF[here] or (module, name) in EXCEPTIONS
        assert is_allowed, f"{module} (floor {FLOOR_OF[here]}) imports {name} (floor {FLOOR_OF[there]})"


def test_methods_do_not_import_each_other():
    for file in (ROOT / "methods").glob("*/*.py"):
        others = [name for name in imports(file) if name.startswith("dmquant.methods.") and ".base" not in name]
        assert all(name.split(".")[2] == file.parent.name for name in others), f"{file} imports {others}"


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.relative_to(ROOT).as_posix())
def test_only_the_console_prints(file):
    names = {node.id for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))) if isinstance(node, ast.Name)}
    assert "print" not in names
    assert file.name == "console.py" or not any(name.split(".")[0] == "rich" for name in imports(file))
