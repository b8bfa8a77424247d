from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMPipeline, DDIMScheduler, DiTPipeline, DiTTransformer2DModel, UNet2DModel
from PIL import Image

from dmquant.checkpoint import serialization
from dmquant.diffusion.pipeline import find_target, open_pipeline
from dmquant.diffusion.sampling import SamplingPlan, generate
from dmquant.errors import DmquantError, InputError
from dmquant.evaluation import image_cache, measurements
from dmquant.evaluation.cost import measure_cost
from dmquant.evaluation.evaluator import add_layers, evaluate, find_image_size
from dmquant.evaluation.image_cache import ImageBatch
from dmquant.evaluation.measurements import SamplingTotals
from dmquant.evaluation.metrics.base import Batch
from dmquant.evaluation.metrics.feature_extractor import load_extractor
from dmquant.evaluation.metrics.fid import Frechet
from dmquant.evaluation.metrics.psnr_ssim import CAP, psnr, ssim
from dmquant.evaluation.metrics.reference_stats import open_reference
from dmquant.evaluation.reports.report import Report
from dmquant.quantization import quantize

QUICK = {"steps": 2, "batch": 4, "num_images": 6}
SMALL = {"max_steps": 0, "trajectories": 2, "sampling_steps": 2, "init": "minmax"}


def make_pipeline(seed: int = 0, size: int = 32) -> DDIMPipeline:
    torch.manual_seed(seed)
    unet = UNet2DModel(
        sample_size=size,
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    )
    return DDIMPipeline(unet.eval(), DDIMScheduler())


@pytest.fixture(scope="module")
def pipeline() -> DDIMPipeline:
    return make_pipeline()


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    folder, generator = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for i in range(5):
        Image.fromarray(generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return folder


def draw(pipeline: DDIMPipeline, seeds: range) -> torch.Tensor:
    return torch.cat(list(generate(pipeline, seeds, SamplingPlan(QUICK["steps"], QUICK["batch"]))))


def test_the_distance_is_that_of_all_images_of_the_seeds_to_the_reference(pipeline, images):
    report = evaluate(pipeline, reference=images, seed=7, **QUICK)
    extractor = load_extractor("resnet-cifar10")
    metric = Frechet(extractor.name, open_reference(images, extractor))
    everything = draw(pipeline, range(7, 13))
    metric.update(Batch(everything, features=extractor.features(everything)))
    assert report.metrics == pytest.approx(metric.compute())


def test_the_report_has_its_protocol_and_is_read_back_unchanged(pipeline, images, tmp_path):
    report = evaluate(pipeline, reference=images, seed=7, sampler="dpm++", **QUICK)
    protocol = report.protocol
    assert (protocol.num_images, protocol.seed, protocol.steps, protocol.batch, protocol.image_size) == (6, 7, 2, 4, 32)
    assert (protocol.sampler, protocol.extractor) == ("dpm++", "resnet-cifar10")
    assert (protocol.reference, protocol.reference_images) == (images.name, 5)
    assert (report.method, report.weight_bits, report.act_bits, report.bits_per_weight) == ("float", 32, 32, 32)
    assert report.size_bytes == report.float_size_bytes == 4 * sum(p.numel() for p in pipeline.unet.parameters())
    assert report.seconds_per_image > 0 and report.ops > 0 and {"torch", "diffusers", "dmquant"} <= report.versions.keys()
    assert Report.load(report.save(tmp_path)) == report


def test_a_repeated_evaluation_gives_the_same_numbers_and_does_not_change_the_pipeline(pipeline, images):
    scheduler, weights = pipeline.scheduler, {k: v.clone() for k, v in pipeline.unet.state_dict().items()}
    first, second = (evaluate(pipeline, reference=images, sampler="ddpm", **QUICK) for _ in range(2))
    assert first.metrics == second.metrics and first.protocol == second.protocol
    assert pipeline.scheduler is scheduler
    assert all(torch.equal(weights[k], v) for k, v in pipeline.unet.state_dict().items())


def test_the_built_in_reference_is_the_default(pipeline):
    report = evaluate(pipeline, **QUICK)
    assert (report.protocol.reference, report.protocol.reference_images) == ("cifar10-train", 50000)
    assert report.metrics["fd-resnet-cifar10"] > 0


def test_psnr_pairs_the_first_seeds_with_the_same_seeds_of_the_float_model(pipeline, monkeypatch):
    monkeypatch.setattr(measurements, "MAX_PAIRS", 5)
    other = make_pipeline(seed=1)
    report = evaluate(pipeline, metrics=["psnr"], float_pipeline=other, **QUICK)
    assert report.metrics == {"psnr": pytest.approx(psnr(draw(pipeline, range(5)), draw(other, range(5))).mean().item())}
    assert report.protocol.extractor is None and report.protocol.reference is None


def test_a_pipeline_does_not_differ_from_itself_under_any_sampler(pipeline):
    report = evaluate(pipeline, metrics=["psnr"], float_pipeline=make_pipeline(), sampler="dpm++", **QUICK)
    assert report.metrics == {"psnr": CAP}


def test_a_quantized_pipeline_is_compared_with_the_float_one_that_it_names(tmp_path, images):
    make_pipeline().save_pretrained(tmp_path)
    base = open_pipeline(tmp_path)
    quantized = quantize(base, "lsq", weight_bits=4, act_bits=8, **SMALL)

    report = evaluate(quantized, metrics=["fid", "psnr"], reference=images, **QUICK)

    assert (report.method, report.weight_bits, report.act_bits, report.base_model) == ("lsq", 4, 8, str(tmp_path))
    assert report.settings["trajectories"] == 2
    assert 5 < report.metrics["psnr"] < CAP
    assert report.size_bytes < report.float_size_bytes / 1.5  # names and shapes weigh much in so small a file
    assert report.bits_per_weight == pytest.approx(32 * report.size_bytes / report.float_size_bytes)
    assert report.ops < evaluate(base, metrics=["psnr"], float_pipeline=base, **QUICK).ops


def test_a_saved_pipeline_is_as_large_as_its_file(tmp_path, images):
    make_pipeline().save_pretrained(tmp_path / "float")
    base = open_pipeline(tmp_path / "float")
    quantized = quantize(base, "lsq", weight_bits=2, act_bits=8, **SMALL)
    serialization.save(quantized, tmp_path / "packed")

    report = evaluate(serialization.load(tmp_path / "packed"), metrics=["fid", "psnr"], reference=images, **QUICK)

    file = tmp_path / "packed" / "unet" / "diffusion_pytorch_model.safetensors"
    assert report.size_bytes == file.stat().st_size
    assert (report.model, report.base_model) == (str(tmp_path / "packed"), str(tmp_path / "float"))
    in_memory = evaluate(quantized, metrics=["fid", "psnr"], reference=images, **QUICK)
    assert report.metrics == pytest.approx(in_memory.metrics, rel=1e-3) and report.settings == in_memory.settings
    assert Report.from_json(report.to_json()) == report


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"metrics": ["fdi"]}, "did you mean 'fid'"),
        ({"metrics": ["beauty"]}, "known: fid, sfid, kid, is, prdc, psnr, ssim, clip_score, cosine, layers"),
        ({"metrics": []}, "no metric selected"),
        ({"metrics": ["fid"], "num_images": 1}, "at least 2 for fid, got 1"),
        ({"metrics": ["psnr"], "num_images": 0}, "at least 1"),
        ({"metrics": ["psnr"]}, "give float_pipeline"),
        ({"metrics": "fdi"}, "did you mean 'fid'"),
        ({"metrics": "psnr", "reference": "cifar10-train", "extractor": "inception"}, "^extractor, reference: without effect"),
        ({"metrics": "fid", "float_pipeline": make_pipeline()}, "float_pipeline: without effect"),
        ({"inception_weights": "x.pth"}, "inception weights are for the extractor 'inception'"),
        ({"reference": ""}, "an empty text names no reference"),
        ({"float_pipeline": "here"}, "give a diffusers pipeline, .* not str"),
        ({"metrics": ["is"], "reference": "cifar10-train"}, "reference: without effect on is"),
        ({"metrics": ["prdc"], "num_images": 3}, "at least 4 for prdc, got 3"),
        ({"batch": 0}, "steps and batch must be at least 1, got 20 and 0"),
        ({"extractor": "vgg"}, "known: resnet-cifar10, inception"),
        ({"reference": "birds"}, "built in: cifar10-train"),
        ({"sampler": "magic"}, "no sampler 'magic'"),
    ],
)
def test_metrics_that_cannot_be_measured_are_refused_before_sampling(pipeline, monkeypatch, arguments, message):
    monkeypatch.setattr(image_cache, "generate", lambda *_, **__: pytest.fail("an image was drawn"))
    with pytest.raises(InputError, match=message):
        evaluate(pipeline, **arguments)


def test_only_a_pipeline_is_measured(pipeline):
    with pytest.raises(InputError, match="give a diffusers pipeline, .* not UNet2DModel"):
        evaluate(pipeline.unet)


def test_a_missing_float_model_is_used_only_if_a_metric_needs_it(tmp_path, images):
    make_pipeline().save_pretrained(tmp_path / "float")
    base = open_pipeline(tmp_path / "float")
    quantized = quantize(base, "lsq", weight_bits=4, act_bits=8, **SMALL)
    (tmp_path / "float" / "model_index.json").unlink()
    assert set(evaluate(quantized, reference=images, **QUICK).metrics) == {"fd-resnet-cifar10"}
    with pytest.raises(InputError, match="the float model recorded in .*, '.*float', cannot be opened: .*model_index.json"):
        evaluate(quantized, metrics="psnr", **QUICK)


def test_images_of_another_size_than_the_extractors_are_refused_before_sampling(monkeypatch):
    monkeypatch.setattr(image_cache, "generate", lambda *_, **__: pytest.fail("an image was drawn"))
    with pytest.raises(InputError, match="takes 32x32 images, got 16x16"):
        evaluate(make_pipeline(size=16), reference="cifar10-train", **QUICK)


def test_images_too_small_for_a_metric_are_refused_before_sampling(monkeypatch):
    monkeypatch.setattr(image_cache, "generate", lambda *_, **__: pytest.fail("an image was drawn"))
    small = make_pipeline(size=8)
    with pytest.raises(InputError, match="ssim needs images of at least 11x11 pixels, got 8x8"):
        evaluate(small, metrics=["psnr", "ssim"], float_pipeline=small, **QUICK)


def test_images_of_one_colour_are_an_error_with_their_count():
    flat, good = torch.zeros(10, 3, 4, 4, dtype=torch.uint8), torch.arange(48, dtype=torch.uint8).view(1, 3, 4, 4)
    totals = SamplingTotals()
    totals.add(ImageBatch(flat, 0.5, 0))
    with pytest.raises(DmquantError, match="20 of the first 20 images have one colour"):
        totals.add(ImageBatch(flat, 0.5, 0))
    mixed = SamplingTotals()
    for images in (flat, good.expand(10, -1, -1, -1)):
        mixed.add(ImageBatch(images, 0.5, 7))
    assert (mixed.size, mixed.seconds, mixed.peak_bytes) == (4, 1.0, 7)


def test_the_time_counts_the_sampling_alone(pipeline, images, monkeypatch):
    clock, seen = iter(range(0, 1000, 3)), []
    monkeypatch.setattr(image_cache.time, "perf_counter", lambda: seen.append(None) or next(clock))
    report = evaluate(pipeline, reference=images, **QUICK)
    assert len(seen) == 4 and report.seconds_per_image == 2 * 3 / 6  # asked before and after each of two batches


def test_the_size_of_latent_models_counts_their_decoder():
    transformer = DiTTransformer2DModel(
        num_attention_heads=1,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        norm_num_groups=1,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=4,
        norm_type="ada_norm_zero",
        norm_elementwise_affine=False,
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )
    assert find_image_size(find_target(DiTPipeline(transformer, vae, DDIMScheduler()))) == 16
    assert find_image_size(find_target(make_pipeline())) == 32


def test_every_call_may_be_tracked(pipeline, images):
    labels = []

    def track(work, label):
        labels.append(label)
        return work

    evaluate(pipeline, metrics=["fid", "psnr"], reference=images, float_pipeline=pipeline, track=track, **QUICK)
    assert labels == [f"reference {images.name}", "sampling", "sampling"]
    assert find_target(pipeline).denoiser is pipeline.unet


def test_all_metrics_come_from_one_pass_and_equal_those_measured_alone(pipeline, images):
    other, how = make_pipeline(seed=1), {"reference": images, "float_pipeline": make_pipeline(seed=1), **QUICK}
    everything = ("fid", "sfid", "kid", "is", "prdc", "psnr", "ssim", "cosine")
    together = evaluate(pipeline, metrics=everything, **how)
    assert set(together.metrics) == {
        "fd-resnet-cifar10",
        "sfd-resnet-cifar10",
        "kd-resnet-cifar10",
        "cs-resnet-cifar10",
        "precision-resnet-cifar10",
        "recall-resnet-cifar10",
        "density-resnet-cifar10",
        "coverage-resnet-cifar10",
        "psnr",
        "ssim",
        "cosine",
    }
    looks_at = {"is": (), **dict.fromkeys(("psnr", "ssim", "cosine"), ("float_pipeline",))}
    alone = {}
    for name in everything:
        given = {key: how[key] for key in (*QUICK, *looks_at.get(name, ("reference",)))}
        alone |= evaluate(pipeline, metrics=name, **given).metrics
    assert together.metrics == alone
    seeds = range(QUICK["num_images"])
    assert together.metrics["ssim"] == pytest.approx(ssim(draw(pipeline, seeds), draw(other, seeds)).mean().item())


def test_the_mean_of_the_cosines_over_the_timesteps_is_the_metric(pipeline):
    report = evaluate(pipeline, metrics=["cosine"], float_pipeline=make_pipeline(seed=1), **QUICK)
    curve = report.curves["cosine"]
    assert len(curve) == QUICK["steps"] and report.metrics == {"cosine": pytest.approx(sum(curve.values()) / len(curve))}
    assert all(float(timestep) >= 0 for timestep in curve)
    assert evaluate(pipeline, metrics=["cosine"], float_pipeline=make_pipeline(), **QUICK).metrics["cosine"] == pytest.approx(1)


def test_the_built_in_reference_works_for_every_metric(pipeline):
    report = evaluate(pipeline, metrics=["fid", "sfid", "kid", "prdc"], **QUICK)
    assert report.metrics["sfd-resnet-cifar10"] > 0 and report.protocol.reference == "cifar10-train"


def test_statistics_without_features_are_refused_for_what_needs_them(pipeline, tmp_path, monkeypatch):
    monkeypatch.setattr(image_cache, "generate", lambda *_, **__: pytest.fail("an image was drawn"))
    np.savez(tmp_path / "stats.npz", mu=np.zeros(256), sigma=np.eye(256))
    with pytest.raises(InputError, match="stats.npz has no features"):
        evaluate(pipeline, metrics=["fid", "prdc"], reference=tmp_path / "stats.npz", **QUICK)


def test_the_report_has_operations_and_those_of_attention_separately(pipeline):
    report = evaluate(pipeline, metrics=["is"], **QUICK)
    cost = measure_cost(pipeline.unet)
    assert (report.bops, report.attention_macs, report.ops) == (cost.bops, cost.attention_macs, cost.ops)
    assert report.peak_memory_bytes is None  # a CPU has none of its own
    assert report.protocol.extractor == "resnet-cifar10" and report.protocol.reference is None


# The image cache


def count_draws(monkeypatch) -> list[list[int]]:
    """Returns the seeds of every call of the sampler."""
    calls, real = [], image_cache.generate
    noted = lambda model, seeds, *plan: calls.append(list(seeds)) or real(model, seeds, *plan)  # noqa: E731
    monkeypatch.setattr(image_cache, "generate", noted)
    return calls


def test_another_metric_generates_no_image_twice(pipeline, images, tmp_path, monkeypatch):
    calls = count_draws(monkeypatch)
    first = evaluate(pipeline, reference=images, cache=tmp_path, **QUICK)
    assert calls == [[0, 1, 2, 3], [4, 5]]
    second = evaluate(pipeline, metrics=["fid", "kid"], reference=images, cache=tmp_path, **QUICK)
    assert len(calls) == 2 and second.metrics["fd-resnet-cifar10"] == first.metrics["fd-resnet-cifar10"]
    assert second.seconds_per_image == first.seconds_per_image
    assert second.metrics == evaluate(pipeline, metrics=["fid", "kid"], reference=images, **QUICK).metrics and len(calls) == 4


def test_more_images_generate_only_the_new_ones(pipeline, images, tmp_path, monkeypatch):
    evaluate(pipeline, reference=images, cache=tmp_path, **{**QUICK, "num_images": 8})
    calls = count_draws(monkeypatch)
    evaluate(pipeline, reference=images, cache=tmp_path, **{**QUICK, "num_images": 14})
    assert calls == [[8, 9, 10, 11], [12, 13]]


def test_the_float_models_images_are_shared_by_all_that_are_compared_with_it(pipeline, tmp_path, monkeypatch):
    calls = count_draws(monkeypatch)
    for seed in (1, 2):
        evaluate(make_pipeline(seed), metrics=["psnr"], float_pipeline=pipeline, cache=tmp_path, **QUICK)
    assert len(calls) == 6  # two batches each of three models


def test_an_interrupted_evaluation_continues_to_equal_results(pipeline, images, tmp_path, monkeypatch):
    expected = evaluate(pipeline, metrics=["fid", "kid", "prdc"], reference=images, **QUICK)
    real = image_cache.generate

    def stop(pipeline, seeds, plan):
        if seeds[0] == 4:
            raise KeyboardInterrupt
        return real(pipeline, seeds, plan)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(image_cache, "generate", stop)
        evaluate(pipeline, reference=images, cache=tmp_path, **QUICK)
    calls = count_draws(monkeypatch)
    report = evaluate(pipeline, metrics=["fid", "kid", "prdc"], reference=images, cache=tmp_path, **QUICK)
    assert calls == [[4, 5]] and report.metrics == expected.metrics and report.protocol == expected.protocol


def test_layers_are_measured_with_the_rest_or_added_to_the_report_later(pipeline, tmp_path):
    base = make_pipeline()
    with torch.no_grad():
        base.unet.conv_in.weight.mul_(0.9)
    how = {**QUICK, "seed": 3, "sampler": "dpm++", "float_pipeline": base}
    whole, without = evaluate(pipeline, metrics=["psnr", "layers"], **how), evaluate(pipeline, metrics=["psnr"], **how)
    assert set(whole.metrics) == {"psnr"} and without.layers == ()
    assert whole.layers[0].ranges.keys() == whole.layers[-1].ranges.keys() and len(whole.layers[0].ranges) == 2
    scheduler = pipeline.scheduler
    assert add_layers(without, pipeline, base).layers == whole.layers and pipeline.scheduler is scheduler
    assert Report.load(whole.save(tmp_path)) == whole
