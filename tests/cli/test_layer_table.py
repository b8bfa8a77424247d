"""Tests of the table of layers: bits of each, and a reason if they differ from those asked for."""

from dataclasses import replace

from dmquant.cli.layer_table import HEADINGS, summarize, tabulate
from dmquant.diffusion.layer_roles import Role
from dmquant.evaluation.cost import Cost, LayerCost


def layer(name: str, role: Role, weight_bits: int, act_bits: int) -> LayerCost:
    return LayerCost(name, role, (8, 4, 3, 3), 288, 2_000_000, 10, 10, weight_bits, act_bits, 100)


COST = Cost((layer("in", Role.FIRST, 8, 8), layer("mid", Role.BODY, 4, 8), layer("out", Role.LAST, 32, 32)), 1000, 1000, 0, 5)


def test_layers_with_other_bits_have_a_reason():
    rows = tabulate(COST, weight_bits=4, act_bits=8)
    assert all(len(row) == len(HEADINGS) for row in rows)
    assert [row[-1] for row in rows] == ["first: kept at 8/8", "", "last: kept in float"]
    assert rows[0][2:6] == ["8x4x3x3", "8", "8", "2.00"]


def test_the_summary_counts_layers_and_compares_with_float():
    text = " ".join(summarize(COST))
    assert "2 of 3 quantized" in text and "1/4.00 of 0.00 MB" in text


def test_the_methods_note_follows_the_reason():
    noted = replace(COST, layers=tuple(replace(layer, note="3 of 4 channels dilated") for layer in COST.layers))
    rows = tabulate(noted, weight_bits=4, act_bits=8)
    assert [row[-1] for row in rows[:2]] == ["first: kept at 8/8; 3 of 4 channels dilated", "3 of 4 channels dilated"]
