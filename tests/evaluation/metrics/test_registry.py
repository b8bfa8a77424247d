"""Selection of metrics: what they need, and what is refused before images are generated."""

import pytest

from dmquant.errors import InputError
from dmquant.evaluation.metrics.registry import NAMES, STREAMED, check_all_used, check_image_size, select_metrics


def test_a_selection_declares_what_its_metrics_need():
    chosen = select_metrics(["fid", "kid", "psnr", "fid"], 100)
    assert chosen.names == ("fid", "kid", "psnr") and [kind.__name__ for kind in chosen.streamed] == ["Frechet", "Kid", "Psnr"]
    assert chosen.needs_features and chosen.needs_float_model and not chosen.needs_output_cosine
    assert chosen.reference_parts == ["features", "mu"]
    score, cosine = select_metrics(["is"], 100), select_metrics(["cosine"], 1)
    assert score.needs_features and score.reference_parts == [] and not score.needs_float_model
    assert cosine.streamed == [] and cosine.needs_output_cosine and cosine.needs_float_model and not cosine.needs_float_images


def test_every_metric_can_be_selected_alone():
    for name in NAMES:
        assert select_metrics([name], 100).names == (name,)


@pytest.mark.parametrize(
    "names, count, message",
    [(["sidf"], 9, "did you mean 'sfid'"), (["beauty"], 9, "known: fid, sfid"), ([], 9, "no metric selected"),
     (["psnr", "prdc"], 3, "at least 4 for psnr, prdc, got 3"), (["psnr"], 0, "at least 1")],
)  # fmt: skip
def test_unknown_metrics_and_too_few_images_are_refused(names, count, message):
    with pytest.raises(InputError, match=message):
        select_metrics(names, count)


@pytest.mark.parametrize(
    "name, unused",
    [("psnr", ["extractor", "reference"]), ("is", ["reference", "float_pipeline"]), ("fid", ["float_pipeline"]),
     ("cosine", ["inception_weights"])],
)  # fmt: skip
def test_a_setting_that_no_metric_uses_is_refused(name, unused):
    with pytest.raises(InputError, match=f"^{', '.join(unused)}: without effect on {name}"):
        check_all_used(select_metrics([name], 100), unused)
    check_all_used(select_metrics(["fid", "psnr"], 100), ["extractor", "inception_weights", "reference", "float_pipeline"])


def test_images_below_the_smallest_size_of_a_metric_are_refused():
    everything = select_metrics(list(STREAMED), 100)
    check_image_size(everything, None)
    check_image_size(everything, 11)
    with pytest.raises(InputError, match="ssim needs images of at least 11x11 pixels, got 10x10"):
        check_image_size(everything, 10)
