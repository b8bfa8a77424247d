"""Tests of the model card: its metadata hold the report, and its command makes the same model."""

import shlex
from dataclasses import replace

import pytest
from huggingface_hub import ModelCard

from dmquant import methods
from dmquant.cli.arguments import merge_settings
from dmquant.errors import InputError
from dmquant.evaluation.model_card import MARK, format_card, format_command, is_hub_id, write_card
from dmquant.evaluation.reports.report import Protocol, Report

PROTOCOL = Protocol(
    num_images=5000, seed=0, steps=20, sampler="ddim", batch=50, image_size=32, extractor="resnet-cifar10",
    reference="cifar10-train", reference_images=50_000,
)  # fmt: skip
FLOAT = Report(
    model="embedded", method="float", settings={}, weight_bits=32, act_bits=32, metrics={"fd-resnet-cifar10": 10.0},
    protocol=PROTOCOL, size_bytes=8_000_000, float_size_bytes=8_000_000, bits_per_weight=32.0, ops=96e9,
    seconds_per_image=0.1, versions={},
)  # fmt: skip
METHOD = methods.get("lsq").parse({"weight_bits": 3, "act_bits": 8, "learning_rate": 2e-4, "keep": "first,last"})
QUANTIZED = replace(
    FLOAT, model="/home/somebody/runs/w3a8", method="lsq", weight_bits=3, act_bits=8, settings=METHOD.settings(),
    metrics={"fd-resnet-cifar10": 11.0, "psnr": 30.0}, size_bytes=1_000_000, base_model="embedded",
)  # fmt: skip


def test_the_hub_reads_every_number_with_its_conditions():
    data = ModelCard(format_card(QUANTIZED, [FLOAT, QUANTIZED])).data
    assert {result.metric_type: result.metric_value for result in data.eval_results} == QUANTIZED.metrics
    assert all(result.dataset_args["num_images"] == 5000 for result in data.eval_results)
    assert data.library_name == "diffusers" and {"dmquant", "lsq", "w3a8"} <= set(data.tags) and data.base_model is None


def test_a_base_from_the_hub_is_linked():
    data = ModelCard(format_card(replace(QUANTIZED, base_model="google/ddpm-cifar10-32"), [QUANTIZED])).data
    assert (data.base_model, data.base_model_relation) == ("google/ddpm-cifar10-32", "quantized")
    assert not is_hub_id("embedded") and not is_hub_id("/a/b") and not is_hub_id(None) and not is_hub_id("./a")


def test_the_table_is_in_it_and_no_path_of_this_machine():
    text = format_card(QUANTIZED, [FLOAT, QUANTIZED])
    assert "| w3a8 | lsq | 3/8 |" in text and "+10.0" in text and "/home" not in text
    assert 'from_pretrained("w3a8")' in text


def test_its_command_has_the_settings_of_the_run():
    words = shlex.split(format_command(QUANTIZED, "w3a8"))
    options = dict(zip(words[2::2], words[3::2]))
    assert words[:2] == ["dmquant", "quantize"] and options["-o"] == "w3a8"
    given = {"weight_bits": int(options["--wbits"]), "act_bits": int(options["--abits"])}
    pairs = [words[at + 1] for at, word in enumerate(words) if word == "--set"]
    assert methods.get(options["--method"]).parse(merge_settings(given, pairs)) == METHOD
    assert len(pairs) == 2


def test_only_a_card_of_ours_is_replaced(tmp_path):
    file = write_card(tmp_path, QUANTIZED, [FLOAT, QUANTIZED])
    assert write_card(tmp_path, QUANTIZED, [QUANTIZED]) == file == tmp_path / "README.md" and MARK in file.read_text()
    file.write_text("my own words")
    with pytest.raises(InputError, match="was not written by dmquant"):
        write_card(tmp_path, QUANTIZED, [QUANTIZED])
    assert file.read_text() == "my own words"
