"""Every command and every Python snippet of the README is one that this version understands."""

import ast
import inspect
import re
import shlex
from pathlib import Path

import pytest
import typer

import dmquant
from dmquant.cli.app import app, run

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
COMMANDS = [line for kind, text in BLOCKS if not kind for line in text.splitlines() if line.startswith("dmquant ")]
SNIPPETS = [text for kind, text in BLOCKS if kind == "python"]
TARGETS = re.findall(r"^make (\w+)", README, re.MULTILINE)


def parse(line: str) -> dict:
    """The values that a command line gives to its command; a usage error fails."""
    _, name, *arguments = shlex.split(line, comments=True)
    command = typer.main.get_command(app).commands[name]
    return command.make_context(name, arguments).params


def test_the_readme_shows_commands_and_snippets():
    assert len(COMMANDS) > 8 and len(SNIPPETS) >= 2 and set(TARGETS) == {"demo", "test"}


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_line_parses(line):
    assert parse(line) is not None


@pytest.mark.parametrize("line", [line for line in COMMANDS if " --method " in line or " methods " in line])
def test_a_named_method_exists(line):
    name = parse(line).get("method") or parse(line)["name"]
    assert name in dmquant.methods.names()


@pytest.mark.parametrize("line", [line for line in COMMANDS if "--set" in line])
def test_settings_on_a_command_line_are_settings_of_its_method(line):
    given = parse(line)
    dmquant.methods.get(given["method"]).parse(dict(pair.split("=") for pair in given["settings"]))


@pytest.mark.parametrize("target", TARGETS)
def test_a_make_target_exists(target):
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)


@pytest.mark.parametrize("code", SNIPPETS, ids=["dmquant", "diffusers"])
def test_a_snippet_compiles_and_calls_public_names_with_arguments_that_they_take(code):
    compile(code, "README.md", "exec")
    for call in (node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)):
        match call.func:
            case ast.Attribute(value=ast.Name(id="dmquant"), attr=name):
                keywords = {keyword.arg: None for keyword in call.keywords}
                inspect.signature(getattr(dmquant, name)).bind(*(None for _ in call.args), **keywords)


def test_help_names_every_command_of_the_readme(capsys):
    assert run(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(line.split()[1] in shown for line in COMMANDS)
