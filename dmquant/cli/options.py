"""Arguments and options that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

HIDDEN = {"show_default": False}
METRIC_NAMES = "fid, sfid, kid, is, prdc, psnr, ssim, clip_score, cosine, layers"

Model = Annotated[str | None, typer.Argument(help="Pipeline folder or hub id; without it, the embedded pipeline.", **HIDDEN)]
GivenModel = Annotated[str, typer.Argument(metavar="MODEL", help="Pipeline folder, float or quantized; hub id; embedded.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps; default: cuda where there is one.", **HIDDEN)]
Seed = Annotated[int, typer.Option(help="Seed of the first image or of the run.", min=0, max=2**63 - 1)]
Steps = Annotated[int, typer.Option(help="Denoising steps.", min=1)]
Batch = Annotated[int, typer.Option(help="Images per batch.", min=1)]
Prompts = Annotated[
    Path | None, typer.Option(help="For text pipelines: file of prompts, one per line, or CSV or JSON of captions.", **HIDDEN)
]
Labels = Annotated[str | None, typer.Option("--class-labels", help="Classes to draw in turn: 0,7,8.", show_default="all")]
Guidance = Annotated[float | None, typer.Option("--guidance-scale", help="Default: the pipeline's own.", **HIDDEN)]
Sampler = Annotated[str | None, typer.Option(help="ddim, ddpm, dpm++, euler, ...; default: the pipeline's.", **HIDDEN)]
