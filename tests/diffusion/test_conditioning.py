"""Pipelines that are told what to draw are measured by one protocol, which says what they were told."""

from dataclasses import replace

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel

from dmquant.diffusion.conditioning import Conditioning, complete
from dmquant.diffusion.pipeline import open_pipeline
from dmquant.diffusion.sampling import SamplingPlan, generate
from dmquant.errors import InputError, MissingResource
from dmquant.evaluation import image_cache
from dmquant.evaluation.evaluator import add_layers, evaluate
from dmquant.evaluation.metrics.clip_score import load_clip
from dmquant.evaluation.metrics.psnr_ssim import psnr
from dmquant.evaluation.reports.comparison import compare
from dmquant.evaluation.reports.report import Report
from tests.text import make_text_pipeline, save_clip

QUICK = {"steps": 2, "batch": 4, "num_images": 6}
ASKED = Conditioning(("a red cat", "x", "two dogs"))


@pytest.fixture
def pipeline(tiny_folder):
    return open_pipeline(tiny_folder)


@pytest.fixture(scope="module")
def text_pipeline():
    return make_text_pipeline()


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    return save_clip(tmp_path_factory.mktemp("models") / "clip")


@pytest.mark.filterwarnings("ignore")  # from inside transformers
def test_images_of_prompts_are_measured_in_one_pass_by_a_protocol_that_names_them(text_pipeline, clip_folder, tmp_path):
    how = {"conditioning": ASKED, "clip": clip_folder, "float_pipeline": make_text_pipeline(seed=1), **QUICK}
    report = evaluate(text_pipeline, metrics=["clip_score", "psnr", "cosine"], **how)
    seeds = range(QUICK["num_images"])
    images, others = (
        torch.cat(list(generate(model, seeds, SamplingPlan(QUICK["steps"], QUICK["batch"], ASKED))))
        for model in (text_pipeline, how["float_pipeline"])
    )
    match = load_clip(clip_folder).match(images, [ASKED.prompts[seed % 3] for seed in seeds])
    assert report.metrics["clip_score"] == pytest.approx(max(match.mean().item(), 0), abs=1e-3)
    assert report.metrics["psnr"] == pytest.approx(psnr(images, others).mean().item())
    protocol = report.protocol
    assert (protocol.condition, protocol.num_conditions, protocol.conditions_sha256) == ("prompts", 3, ASKED.sha256)
    assert (protocol.guidance_scale, protocol.clip) == (7.5, "clip"), "the pipeline's own scale"
    assert Report.load(report.save(tmp_path)) == report


@pytest.mark.filterwarnings("ignore")  # from inside transformers
def test_rows_of_other_prompts_or_another_guidance_are_not_put_side_by_side(text_pipeline):
    how = {"metrics": ["psnr"], "float_pipeline": text_pipeline, **QUICK}
    asked = (ASKED, replace(ASKED, prompts=ASKED.prompts[::-1]), replace(ASKED, guidance=2.0))
    first, reordered, guided = (evaluate(text_pipeline, conditioning=wanted, **how) for wanted in asked)
    with pytest.raises(InputError, match="conditions_sha256 is"):
        compare([first, reordered])
    with pytest.raises(InputError, match="guidance_scale is 7.5 and 2.0"):
        compare([first, guided])
    assert "3 prompts in turn, guidance 7.5" in compare([first, first]).to_markdown()


def test_class_conditional_pipelines_draw_every_class_in_turn():
    network = DiTTransformer2DModel(
        num_layers=1, num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, sample_size=4, patch_size=2,
        num_embeds_ada_norm=1000,
    )  # fmt: skip
    vae = AutoencoderKL(latent_channels=4, block_out_channels=(4,), norm_num_groups=2)
    pipeline, labels = DiTPipeline(network, vae, DDIMScheduler()), []
    network.register_forward_pre_hook(lambda module, args, kwargs: labels.append(kwargs["class_labels"]), with_kwargs=True)
    how = {"metrics": ["cosine"], "float_pipeline": pipeline, **QUICK}
    report = evaluate(pipeline, **how)
    protocol = report.protocol
    assert (protocol.condition, protocol.num_conditions, protocol.guidance_scale) == ("class labels", 1000, 4.0)
    first = complete(pipeline, Conditioning()).class_labels
    assert labels[0].tolist() == [*first[:4], *[1000] * 4], "a batch of four, doubled for guidance"
    assert evaluate(pipeline, conditioning=Conditioning(class_labels=first), **how).protocol == protocol
    assert evaluate(pipeline, conditioning=Conditioning(class_labels=(3, 5)), **how).protocol != protocol


def test_what_does_not_fit_the_pipeline_is_refused_before_an_image_is_drawn(pipeline, text_pipeline, clip_folder, monkeypatch):
    monkeypatch.setattr(image_cache, "generate", lambda *_, **__: pytest.fail("an image was drawn"))
    for model, arguments, message in (
        (pipeline, {"conditioning": ASKED}, "DDIMPipeline takes no prompts"),
        (text_pipeline, {}, "StableDiffusionPipeline draws from text; give it prompts"),
        (pipeline, {"metrics": "clip_score", "clip": clip_folder}, "this pipeline takes none"),
        (text_pipeline, {"metrics": "is", "clip": clip_folder, "conditioning": ASKED}, "^clip: without effect on is"),
    ):
        with pytest.raises(InputError, match=message):
            evaluate(model, **arguments, **QUICK)
    with pytest.raises(MissingResource, match="dmquant fetch clip"):
        evaluate(text_pipeline, metrics="clip_score", conditioning=ASKED, **QUICK)


@pytest.mark.filterwarnings("ignore")  # from inside transformers
def test_layers_are_looked_at_under_the_same_prompts(text_pipeline):
    how = {"metrics": ["layers"], "float_pipeline": make_text_pipeline(seed=1), **QUICK}
    one, other = (evaluate(text_pipeline, conditioning=asked, **how) for asked in (ASKED, Conditioning(("zz",))))
    assert one.layers and one.layers != other.layers
    with pytest.raises(InputError, match="drawn by prompts of which a report has the hash only"):
        add_layers(one, text_pipeline, how["float_pipeline"])
