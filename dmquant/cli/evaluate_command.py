"""The commands `eval` and `reference`."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dmquant.cli import arguments, console
from dmquant.cli.options import HIDDEN, METRIC_NAMES, Batch, Device, Guidance, Labels, Model, Prompts, Sampler, Seed, Steps
from dmquant.errors import Interrupted
from dmquant.training import distributed

if TYPE_CHECKING:
    from dmquant.evaluation.reports.report import LayerProfile, Report

REPORT = "File NAME.json, or folder for report.json; default: the folder of a quantized MODEL, else runs/eval-NAME."
Extractor = Annotated[str, typer.Option(help="Network whose features are compared: resnet-cifar10 or inception.")]
Metrics = Annotated[
    str | None,
    typer.Option(
        help=f"Metrics to measure, as in fid,psnr. Known: {METRIC_NAMES}. The options below, one per metric, add to them.",
        show_default="fid, and psnr of a quantized model",
    ),
]
Weights = Annotated[
    Path | None,
    typer.Option("--inception-weights", help="File of Inception weights; default: those of `fetch inception`.", **HIDDEN),
]


def evaluate(
    context: typer.Context,
    model: Model = None,
    metrics: Metrics = None,
    fid: Annotated[bool, typer.Option("--fid", help="Frechet distance of features to the reference.")] = False,
    sfid: Annotated[bool, typer.Option("--sfid", help="Frechet distance of spatial features to the reference.")] = False,
    kid: Annotated[bool, typer.Option("--kid", help="Kernel distance of features; unbiased for few images.")] = False,
    score: Annotated[bool, typer.Option("--is", help="Inception score.")] = False,
    prdc: Annotated[bool, typer.Option("--prdc", help="Precision, recall, density, coverage; k = 3.")] = False,
    psnr: Annotated[bool, typer.Option("--psnr", help="PSNR to the float model at equal seeds.")] = False,
    ssim: Annotated[bool, typer.Option("--ssim", help="SSIM to the float model at equal seeds.")] = False,
    cosine: Annotated[bool, typer.Option("--cosine", help="Cosine to the float denoiser's outputs, by timestep.")] = False,
    layers: Annotated[
        bool, typer.Option("--layers", help="SQNR of each layer in dB, and range of its input by timestep.")
    ] = False,
    clip_score: Annotated[
        bool, typer.Option("--clip-score", help="Cosine of the CLIP features of image and prompt, times 100.")
    ] = False,
    num_images: Annotated[int, typer.Option(help="Number of images.", min=2)] = 1000,
    steps: Steps = 20,
    sampler: Sampler = None,
    seed: Seed = 0,
    batch: Batch = 50,
    prompts: Prompts = None,
    class_labels: Labels = None,
    guidance_scale: Guidance = None,
    reference: Annotated[str | None, typer.Option(help="Built-in name, npz or images.", show_default="the extractor's")] = None,
    extractor: Extractor = "resnet-cifar10",
    inception_weights: Weights = None,
    clip: Annotated[
        str | None, typer.Option(help="CLIP: folder or hub id.", show_default="openai/clip-vit-large-patch14")
    ] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help=REPORT, **HIDDEN)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON instead of a table.")] = False,
    keep: Annotated[bool, typer.Option("--cache/--no-cache", help="Store images on disk, and reuse stored ones.")] = True,
    num_processes: Annotated[int, typer.Option(help="Processes that share the seeds.", min=1)] = 1,
    device: Device = None,
) -> None:
    """Generate images with a float or quantized pipeline, measure them, and write a report."""
    if num_processes > 1 and not distributed.is_launched():
        raise typer.Exit(distributed.launch(context.obj, num_processes))
    from dmquant.diffusion import pipeline as denoiser
    from dmquant.evaluation import evaluator, image_cache
    from dmquant.evaluation.reports.report import name_file

    flags = {"fid": fid, "sfid": sfid, "kid": kid, "is": score, "prdc": prdc, "psnr": psnr, "ssim": ssim, "cosine": cosine,
              "layers": layers, "clip_score": clip_score}  # fmt: skip
    chosen = arguments.read_metrics(metrics, [name for name, is_given in flags.items() if is_given])
    conditioning = arguments.read_conditioning(prompts, class_labels, guidance_scale)
    denoiser.locate(model)
    file = name_file(output or arguments.default_report_folder(model))
    arguments.require_writable(file.parent)
    with _explaining_interrupts(keep):
        report = evaluator.evaluate(
            arguments.open_model(model, device, any_tool=True),
            metrics=chosen,
            num_images=num_images,
            seed=seed,
            steps=steps,
            sampler=sampler,
            batch=batch,
            conditioning=conditioning,
            extractor=extractor,
            inception_weights=inception_weights,
            reference=reference,
            clip=clip,
            cache=image_cache.default_folder() if keep else None,
            track=console.Tracker(),
        )
    if distributed.is_first():
        report.save(file)
    _show(report, as_json)
    console.print_message(f"wrote {file}")
    distributed.leave_together()


@contextmanager
def _explaining_interrupts(keep: bool) -> Iterator[None]:
    """Raises Interrupted for Ctrl-C inside the block; its message tells whether images are stored."""
    try:
        yield
    except KeyboardInterrupt:
        advice = "; the same command continues and reuses the stored images"
        raise Interrupted("interrupted" + (advice if keep else "")) from None


def _show(report: "Report", as_json: bool) -> None:
    if as_json:
        console.print_result(report.to_json())
        return
    from dmquant.evaluation.reports import comparison

    console.print_comparison(comparison.compare([report]))
    for line in describe_worst(report.layers):
        console.print_result(line)


def describe_worst(layers: Sequence["LayerProfile"]) -> list[str]:
    """Returns lines on the layers with the lowest SQNR on the float input and on the own model's; [] for a float model."""
    titles = {"local_db": "worst layer on the float model's input", "total_db": "worst layer on its own model's input"}
    lines = []
    for name, title in titles.items():
        known = [layer for layer in layers if getattr(layer, name) is not None]
        if known:
            worst = min(known, key=lambda layer: getattr(layer, name))
            bits = f"{worst.weight_bits}/{worst.act_bits}"
            lines.append(f"{title}: {worst.name} ({worst.role}, {bits}), SQNR {getattr(worst, name):.1f} dB")
    return lines


def reference(
    images: Annotated[list[Path], typer.Argument(metavar="IMAGES...", help="Folders or zips of images.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="File NAME.npz to write.")],
    extractor: Extractor = "resnet-cifar10",
    inception_weights: Weights = None,
    size: Annotated[
        int | None, typer.Option(help="Resize images to this side in pixels: bicubic, centre crop.", min=1, **HIDDEN)
    ] = None,
    device: Device = None,
) -> None:
    """Compute the file for `eval --reference`: statistics of the features of images, and features of some of them."""
    arguments.require_new(output, ".npz")
    import torch

    from dmquant.diffusion.image_files import list_images
    from dmquant.diffusion.pipeline import choose_device
    from dmquant.evaluation.metrics.feature_extractor import load_extractor
    from dmquant.evaluation.metrics.reference_stats import compute_reference, save_reference

    files = list_images(*images)
    network = load_extractor(extractor, inception_weights).to(torch.device(device or choose_device()))
    found = compute_reference(files, network, name=output.stem, size=size, track=console.Tracker())
    output.parent.mkdir(parents=True, exist_ok=True)
    save_reference(found, network, output, size=size)
    num_features = 0 if found.features is None else len(found.features)
    console.print_message(f"wrote {output}: {found.num_images} images, features of {num_features}")
