"""Tests that commands, snippets, links and lists of the documentation fit this version."""

import functools
import re
import shlex
import shutil
from itertools import pairwise

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel

import dmquant
from dmquant.cli.app import run_command
from dmquant.kernels.registry import BY_NAME, CHOICES
from dmquant.testing import TINY_UNET
from tests.pages import CARDS, DOCS, PAGES, README, ROOT, anchors, cheap_commands, commands, links, name, parse, read, snippets
from tests.test_floors import FLOOR_OF

CHEAP = {"max_steps": 0, "trajectories": 2, "sampling_steps": 2, "calibration_samples": 2, "batch": 2, "clip_images": 0}
COMMANDS = [(name(page), line) for page in PAGES for line in commands(page)]
DOCUMENTED = [README, ROOT / "docs" / "getting-started.md", ROOT / "docs" / "file-format.md"]  # pages whose snippets are run here


@pytest.fixture(scope="module")
def small_folder(tmp_path_factory):
    """Returns a float pipeline of about 20 thousand random parameters for 32x32 RGB images, the extractor's size."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipeline = DDIMPipeline(UNet2DModel(**TINY_UNET | {"sample_size": 32}), DDIMScheduler())
    folder = tmp_path_factory.mktemp("pipelines") / "small"
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def saved(small_folder, tmp_path_factory):
    """Returns the folder of the same pipeline, quantized."""
    quantized = dmquant.quantize(dmquant.load(small_folder), "lsq", **CHEAP)
    return dmquant.save(quantized, tmp_path_factory.mktemp("pipelines") / "out")


@pytest.fixture
def small_dmquant(small_folder, monkeypatch):
    """Makes the small pipeline the embedded one, and sets the smallest defaults for quantizing and evaluating."""
    load, quantize, evaluate = dmquant.load, dmquant.quantize, dmquant.evaluate
    monkeypatch.setattr(dmquant, "load", lambda model=small_folder, **options: load(model, **options))
    monkeypatch.setattr(dmquant, "quantize", functools.partial(quantize, **CHEAP))
    less = {"num_images": 4, "steps": 2}
    monkeypatch.setattr(dmquant, "evaluate", lambda pipeline, **options: evaluate(pipeline, **{**options, **less}))


def test_pages_contain_commands():
    shown = {page for page, _ in COMMANDS}
    assert {name(page) for page in (README, *CARDS)} <= shown and len(COMMANDS) > 30


@pytest.mark.parametrize("page, line", COMMANDS)
def test_a_command_line_parses(page, line):
    given = parse(line)
    method = given.get("method") or given.get("name")
    if method not in (None, "example"):  # the plug-in of how-to-add-a-method.md, which has its own tests
        settings = dict(pair.split("=") for pair in given.get("settings") or ())
        dmquant.methods.get(method).parse(settings)


def test_help_names_every_command_of_the_pages(capsys):
    assert run_command(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(line.split()[1] in shown for _, line in COMMANDS)


@pytest.mark.parametrize("page", [page for page in DOCS if cheap_commands(page)], ids=name)
def test_marked_commands_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for line in cheap_commands(page):
        assert run_command(shlex.split(line, comments=True)[1:]) == 0, line


@pytest.mark.parametrize("page", DOCUMENTED, ids=name)
def test_snippets_run_one_after_the_other(page, saved, small_dmquant, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(ROOT / "docs")
    if "dmquant.save(" not in read(page):
        shutil.copytree(saved, "out")
    assert snippets(page)
    for code in snippets(page):
        exec(compile(code, name(page), "exec"), {})  # the pages are ours


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.parent.name)
def test_settings_of_a_card_are_settings_of_its_method(card):
    method = dmquant.methods.get(card.parent.name)
    cells = [line.split("|")[1] for line in read(card).splitlines() if re.match(r"\| `\w+=", line)]
    given = [pair for cell in cells for pair in re.findall(r"`(\w+)=([^`]+)`", cell)]
    assert len(given) >= 6
    for key, value in given:
        method.parse({"attention_bits": "8", key: value})  # some settings ask for quantized attention


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.parent.name)
def test_all_cards_have_the_same_headings(card):
    asked = re.findall(r"^## (.+)$", read(card), re.MULTILINE)
    assert asked == ["What", "Why", "How to run it", "Settings", "Results", "Where we differ", "Limits"]


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_link_targets_exist(page):
    for target in links(page):
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), f"{name(page)} links to {target}"
        assert not anchor or anchor in anchors(there), f"{name(page)} links to {target}"


def test_the_index_lists_every_page():
    listed = set(links(ROOT / "docs" / "README.md"))
    assert {page.name for page in DOCS} - {"README.md"} <= listed


def test_every_method_has_a_card_and_a_row():
    rows = read(ROOT / "docs" / "methods.md")
    assert {card.parent.name for card in CARDS} == set(dmquant.methods.names())
    assert all(f"[`{card.parent.name}`](../dmquant/methods/{card.parent.name}/README.md)" in rows for card in CARDS)


def test_every_package_is_in_the_architecture():
    first = read(ROOT / "docs" / "architecture.md").partition("## Floors")[0]
    listed = {entry for cell in re.findall(r"^\| (`.+?) \|", first, re.MULTILINE) for entry in re.findall(r"`([\w./]+)`", cell)}
    there = {
        path.name + "/" * path.is_dir() for path in (ROOT / "dmquant").iterdir() if not path.name.startswith(("__", "py.typed"))
    }
    assert there <= listed


def test_the_drawing_of_the_floors_is_the_tested_one():
    drawing = read(ROOT / "docs" / "architecture.md").partition("```mermaid")[2].partition("```")[0]
    chains = [re.findall(r"\w+(?=\[| -->|$)", line) for line in drawing.splitlines() if "-->" in line]
    arrows = [(below, above) for chain in chains for below, above in pairwise(chain)]
    assert all(FLOOR_OF[{"base": "errors"}.get(below, below)] < FLOOR_OF[above] for below, above in arrows)
    drawn = {room for arrow in arrows for room in arrow} - {"base"} | {"errors", "progress"}
    assert drawn == set(FLOOR_OF) - {"__init__", "__main__", "assets", "hf", "testing"}


@pytest.mark.parametrize("page", DOCS, ids=name)
def test_files_that_a_page_names_exist(page):
    rooms = "|".join(path.name for path in (ROOT / "dmquant").iterdir() if path.is_dir() and not path.name.startswith("__"))
    for path in re.findall(rf"`((?:dmquant/)?(?:{rooms})/[\w/.]+)`", read(page)):
        assert (ROOT / "dmquant" / path.removeprefix("dmquant/")).exists(), f"{name(page)} names {path}"


def test_kernels_are_those_of_the_registry():
    page = ROOT / "docs" / "kernels.md"
    listed = set(re.findall(r"^\| `(\w+)` \|", read(page).partition("## When which is used")[0], re.MULTILINE))
    assert listed == {*BY_NAME, "onednn", "attention"}
    values = re.findall(r"^\| `(\w+)`", read(page).partition("## When which is used")[2], re.MULTILINE)
    assert set(values) == set(CHOICES)
