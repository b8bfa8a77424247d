"""The project's Markdown pages, as tests read them: blocks of code, command lines, tables, links."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import typer

from dmquant.cli.app import app

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
DOCS = sorted((ROOT / "docs").glob("*.md"))
CARDS = sorted((ROOT / "dmquant" / "methods").glob("*/README.md"))
PAGES = [README, *DOCS, *CARDS, ROOT / "dmquant" / "methods" / "README.md", ROOT / "benchmarks" / "README.md"]
RUN = "<!-- run -->"
BLOCK = re.compile(r"^(?P<mark><!-- run -->\n)?```(?P<kind>\w*)\n(?P<text>.*?)^```", re.MULTILINE | re.DOTALL)


def read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def snippets(page: Path) -> list[str]:
    """The Python blocks of a page, in order."""
    return [block["text"] for block in BLOCK.finditer(read(page)) if block["kind"] == "python"]


def commands(page: Path) -> list[str]:
    """The `dmquant` lines of a page, in fenced and in indented blocks."""
    text = re.sub(r"\\\n\s*", "", read(page))  # a backslash continues a line
    fenced = [line for block in BLOCK.finditer(text) for line in block["text"].splitlines()]
    indented = re.findall(r"^    (dmquant .+)$", text, re.MULTILINE)
    parts = [part.strip() for line in (*fenced, *indented) for part in line.split("&&")]
    return [part for part in parts if part.startswith("dmquant ")]


def cheap_commands(page: Path) -> list[str]:
    """The command lines of the blocks that are marked to be run."""
    blocks = [block["text"] for block in BLOCK.finditer(read(page)) if block["mark"]]
    return [line for text in blocks for line in text.splitlines()]


def parse(line: str) -> dict:
    """The values that a command line gives to its command; a usage error raises."""
    _, command, *arguments = shlex.split(line, comments=True)
    return typer.main.get_command(app).commands[command].make_context(command, arguments).params


def tables(page: Path) -> Iterator[list[dict[str, str]]]:
    """The tables of a page, each as rows: heading -> cell."""
    for found in re.findall(r"(?:^\|.*\n)+", read(page), re.MULTILINE):
        cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip().strip("|"))] for line in found.splitlines()]
        yield [dict(zip(cells[0], row, strict=True)) for row in cells[2:]]


def links(page: Path) -> list[str]:
    """Targets of the links and pictures of a page that are no web addresses."""
    return [target for target in re.findall(r"\]\(([^)\s]+)\)", read(page)) if not target.startswith("http")]


def anchors(page: Path) -> set[str]:
    """What a link to a heading of the page may say behind its #, as GitHub makes it."""
    headings = re.findall(r"^#+ (.+)$", read(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
