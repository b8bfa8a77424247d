"""Names of metrics: what they ask for, and what is refused before anything is drawn."""

import pytest

from dmquant.errors import InputError
from dmquant.evaluation.metrics.registry import NAMES, STREAMED, choose_metrics, refuse_small, refuse_unused


def test_a_choice_knows_what_its_metrics_need():
    chosen = choose_metrics(["fid", "kid", "psnr", "fid"], 100)
    assert chosen.names == ("fid", "kid", "psnr") and [kind.__name__ for kind in chosen.kinds] == ["Frechet", "Kid", "Psnr"]
    assert chosen.needs_features and chosen.needs_float_model and not chosen.needs_agreement
    assert chosen.reference_parts == ["features", "mu"]
    score, cosine = choose_metrics(["is"], 100), choose_metrics(["cosine"], 1)
    assert score.needs_features and score.reference_parts == [] and not score.needs_float_model
    assert cosine.kinds == [] and cosine.needs_agreement and cosine.needs_float_model and not cosine.needs_float_images


def test_every_metric_can_be_chosen_alone():
    for name in NAMES:
        assert choose_metrics([name], 100).names == (name,)


@pytest.mark.parametrize(
    "names, count, message",
    [(["sidf"], 9, "did you mean 'sfid'"), (["beauty"], 9, "known: fid, sfid"), ([], 9, "no metric asked for"),
     (["psnr", "prdc"], 3, "at least 4 for psnr, prdc, got 3"), (["psnr"], 0, "at least 1")],
)  # fmt: skip
def test_what_cannot_be_measured_is_refused(names, count, message):
    with pytest.raises(InputError, match=message):
        choose_metrics(names, count)


@pytest.mark.parametrize(
    "name, unused",
    [("psnr", ["extractor", "reference"]), ("is", ["reference", "float_pipeline"]), ("fid", ["float_pipeline"]),
     ("cosine", ["inception_weights"])],
)  # fmt: skip
def test_a_setting_that_no_metric_looks_at_is_refused(name, unused):
    with pytest.raises(InputError, match=f"^{', '.join(unused)}: without effect on {name}"):
        refuse_unused(choose_metrics([name], 100), unused)
    refuse_unused(choose_metrics(["fid", "psnr"], 100), ["extractor", "inception_weights", "reference", "float_pipeline"])


def test_small_images_are_refused_by_the_metric_that_cannot_see_them():
    everything = choose_metrics(list(STREAMED), 100)
    refuse_small(everything, None)
    refuse_small(everything, 11)
    with pytest.raises(InputError, match="ssim needs images of at least 11x11 pixels, got 10x10"):
        refuse_small(everything, 10)
