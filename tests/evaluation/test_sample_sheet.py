"""Tests of strips: an image of each seed of the reports, and its difference from the float model's image."""

import io
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from dmquant.diffusion.pipeline import open_pipeline
from dmquant.diffusion.sampling import SamplingPlan, generate
from dmquant.evaluation import image_cache
from dmquant.evaluation.evaluator import evaluate
from dmquant.evaluation.sample_sheet import FULL, colour, draw_strips, measure_difference

HOW = {"num_images": 6, "steps": 2, "batch": 4, "seed": 3}


def pictures(data: Sequence[bytes]) -> Tensor:
    """Returns the images uint8 (N, 3, H, W) of PNG files."""
    arrays = [np.asarray(Image.open(io.BytesIO(content))) for content in data]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)


@pytest.fixture
def reports(tiny_folder, tmp_path):
    """Returns the reports of a pipeline with changed weights and of the float one."""
    base, other = open_pipeline(tiny_folder), open_pipeline(tiny_folder)
    with torch.no_grad():
        other.unet.conv_out.weight.add_(0.2)
    other.save_pretrained(tmp_path / "other")
    other = open_pipeline(tmp_path / "other")
    float_report = evaluate(base, metrics="psnr", float_pipeline=base, **HOW)
    return [replace(evaluate(other, metrics="psnr", float_pipeline=base, **HOW), method="lsq"), float_report]


def test_the_float_model_comes_first_and_others_show_their_differences(reports, tiny_folder):
    first, second = draw_strips(reports, 3, device="cpu")
    assert first.model == str(tiny_folder) and first.differences == () and not first.note
    images = torch.cat(list(generate(open_pipeline(tiny_folder), range(3, 6), SamplingPlan(2, 3))))
    assert torch.equal(pictures(first.images), images)
    others = torch.cat(list(generate(open_pipeline(second.model), range(3, 6), SamplingPlan(2, 3))))
    assert torch.equal(pictures(second.images), others)
    assert torch.equal(pictures(second.differences), colour(measure_difference(others, images)))
    assert (first.size, first.first_seed) == (second.size, second.first_seed) == ((8, 8), 3)


def test_images_of_an_evaluation_are_not_generated_again(reports, tmp_path, monkeypatch):
    cache = tmp_path / "images"
    for report in reports:
        evaluate(open_pipeline(report.model), metrics="psnr", float_pipeline=open_pipeline(reports[1].model), cache=cache, **HOW)
    monkeypatch.setattr(image_cache, "generate", lambda *_, **__: pytest.fail("an image was drawn"))
    assert all(strip.images for strip in draw_strips(reports, 3, device="cpu", cache=cache))


def test_the_strip_of_a_missing_pipeline_has_a_note(reports, tmp_path):
    (tmp_path / "other" / "model_index.json").unlink()
    kept, gone = draw_strips(reports, 2, device="cpu")
    assert kept.images and gone.images == () and "model_index.json" in gone.note


def test_no_difference_is_black_and_a_large_one_white():
    assert colour(torch.zeros(1, 2, 2)).sum() == 0 and (colour(torch.full((1, 2, 2), float(FULL))) == 255).all()
    reds = colour(torch.tensor([[[0.0, FULL / 3, FULL]]]))[0]
    assert reds[:, 0, 1].tolist() == [255, 0, 0]


def test_the_difference_is_the_mean_over_the_colours():
    x = torch.tensor([10, 20, 30], dtype=torch.uint8).view(1, 3, 1, 1)
    assert measure_difference(x, torch.zeros_like(x)).item() == 20
