"""Arguments and options that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

HIDDEN = {"show_default": False}
METRIC_NAMES = "fid, sfid, kid, is, prdc, psnr, ssim, clip_score, cosine, layers"

Model = Annotated[str | None, typer.Argument(help="Pipeline folder or hub id; default: the embedded one.", **HIDDEN)]
GivenModel = Annotated[
    str, typer.Argument(metavar="MODEL", help="Folder of a float or quantized pipeline, hub id, or the word embedded.")
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 or mps; default: cuda if there is one.", **HIDDEN)]
Seed = Annotated[int, typer.Option(help="Seed of the run; image i is generated with seed + i.", min=0, max=2**63 - 1)]
Steps = Annotated[int, typer.Option(help="Denoising steps per image.", min=1)]
Batch = Annotated[int, typer.Option(help="Images per batch.", min=1)]
Prompts = Annotated[
    Path | None,
    typer.Option(help="For text pipelines: file of prompts, one per line, or CSV or JSON file of captions.", **HIDDEN),
]
Labels = Annotated[
    str | None,
    typer.Option("--class-labels", help="Class numbers, as in 0,7,8; successive seeds use them in turn.", show_default="all"),
]
Guidance = Annotated[
    float | None, typer.Option("--guidance-scale", help="Strength of guidance; default: the pipeline's.", **HIDDEN)
]
Sampler = Annotated[str | None, typer.Option(help="ddim, ddpm, dpm++, euler, ...; default: the pipeline's.", **HIDDEN)]
