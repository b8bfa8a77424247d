"""The commands of the `dmquant` program. They import torch when they run, so that --help, methods and compare need none.

Results go to stdout, messages to stderr. Exit codes: 0 done; 1 expected failure; 2 wrong input; 3 missing download or package;
4 out of memory; 70 bug in dmquant; 130 interrupted. DMQUANT_DEBUG=1 shows tracebacks.
"""

import json
import math
import sys
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NoReturn

import typer

from dmquant import __version__
from dmquant.cli import arguments, compare_command, console, evaluate_command
from dmquant.cli.exit_codes import INTERRUPTED, report_error
from dmquant.cli.options import HIDDEN, Batch, Device, GivenModel, Guidance, Labels, Model, Prompts, Sampler, Seed, Steps
from dmquant.training import distributed

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, ModelMixin

    from dmquant.methods.base import Method
    from dmquant.nn.scheme import Scheme
    from dmquant.quantization import Quantized

app = typer.Typer(
    name="dmquant",
    help="Extremely low-bit quantization of diffusion models: quantize, evaluate, compare.",
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> NoReturn:
    """Runs the command line of the process and exits with its code."""
    sys.exit(run_command())


def run_command(line: list[str] | None = None) -> int:
    """Runs a command line and returns its exit code; an error is printed as one line on stderr.

    Args:
        line: Arguments without "dmquant"; default: those of the process.
    """
    console.show_warnings()
    line = sys.argv[1:] if line is None else line
    try:
        arguments.refuse_empty(line)
        code = app(args=line, prog_name="dmquant", standalone_mode=False, obj=line) or 0
    except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001  every error becomes one line and an exit code
        return report_error(error)
    if code == INTERRUPTED:
        console.print_message("interrupted")
    return code


@app.callback(invoke_without_command=True)
def _start(
    context: typer.Context, version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False
) -> None:
    if version:
        console.print_result(__version__)
        raise typer.Exit
    if context.invoked_subcommand is None:
        console.print_message(context.get_help())
        raise typer.Exit(2)


@app.command()
def quantize(
    context: typer.Context,
    model: Model = None,
    method: Annotated[str, typer.Option(help="Name of a method; `dmquant methods` lists them.")] = "lsq",
    wbits: Annotated[
        int | None, typer.Option(help="Bits per weight, 32 = float; default: the method's.", min=1, max=32, **HIDDEN)
    ] = None,
    abits: Annotated[
        int | None, typer.Option(help="Bits per activation, 32 = float; default: the method's.", min=1, max=32, **HIDDEN)
    ] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Folder to write.", show_default="runs/NAME")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Setting of the method; may be repeated.")
    ] = None,
    seed: Seed = 0,
    device: Device = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the bits that each layer would get, and exit.")] = False,
    max_steps: Annotated[
        int | None, typer.Option(help="Largest number of optimiser steps; default: the method's.", min=0, **HIDDEN)
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="Folder or zip of images to fine-tune on; default: the float model's trajectories.", **HIDDEN),
    ] = None,
    prompts: Prompts = None,
    class_labels: Labels = None,
    guidance_scale: Guidance = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted run.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a result or an interrupted run.")] = False,
) -> None:
    """Quantize a pipeline and write it as a folder of packed safetensors."""
    from dmquant.methods import get

    given = {"weight_bits": wbits, "act_bits": abits, "max_steps": max_steps}
    chosen = get(method).parse(arguments.merge_settings(given, settings or []))
    if dry_run:
        _show_plan(arguments.open_model(model, "cpu"), chosen)
        return
    from dmquant.checkpoint import atomic_folder
    from dmquant.cli import signals
    from dmquant.diffusion.pipeline import locate
    from dmquant.quantization import quantize_measured

    folder = output or arguments.default_result_folder(model, method, chosen.weight_bits, chosen.act_bits)
    conditioning = arguments.read_conditioning(prompts, class_labels, guidance_scale)
    locate(model)
    if distributed.is_first():
        atomic_folder.check_target(folder, force=force)
    with (
        atomic_folder.lock(folder) if distributed.is_first() else nullcontext(),
        signals.resumable(folder, context.obj, resume=resume, force=force) as run,
    ):
        pipeline, track = arguments.open_model(model, device), console.Tracker()
        quantized = quantize_measured(pipeline, chosen, seed=seed, data=data, conditioning=conditioning, run=run, track=track)
        if distributed.is_first():
            _save(quantized, folder, force=force)
            console.print_message(f"wrote {folder}; next: dmquant eval {folder} --fid")


app.command("eval")(evaluate_command.evaluate)
app.command()(compare_command.compare)
app.command()(evaluate_command.reference)


@app.command()
def methods(name: Annotated[str | None, typer.Argument(help="Method whose settings are listed.", **HIDDEN)] = None) -> None:
    """List the methods, or the settings of one method with their defaults."""
    from dmquant import methods as registry

    if name is None:
        rows = [[known, registry.summary(known)] for known in registry.names()]
        console.print_table(["method", "what it is"], rows, align="ll")
        return
    rows = [[item.name, item.type, _write_value(item.default), item.help] for item in registry.get(name).describe()]
    console.print_table(["setting", "type", "default", "what it does"], rows, align="llll")


@app.command()
def inspect(model: GivenModel) -> None:
    """Show the components, layers, bits, size and operations of a pipeline."""
    from dmquant.diffusion.pipeline import find_target
    from dmquant.training.run_cost import Effort

    target = find_target(arguments.open_model(model, "cpu"))
    denoiser = target.denoiser
    record, effort = getattr(denoiser, "dmquant_record", {}), Effort.load(Path(model))
    facts = {"pipeline": type(target.pipeline).__name__, "denoiser": f"{target.name} ({type(denoiser).__name__})", **record}
    facts |= facts.pop("settings", {}) | ({} if effort is None else {"effort": effort.describe()})
    console.print_table(["fact", "value"], [[key, _write_value(value)] for key, value in facts.items()], align="ll", notes=[""])
    _print_layers(denoiser, record.get("weight_bits", 32), record.get("act_bits", 32))


@app.command()
def sample(
    model: GivenModel,
    count: Annotated[int, typer.Option("-n", "--num-images", help="Number of images.", min=1)] = 16,
    seed: Seed = 0,
    steps: Steps = 20,
    sampler: Sampler = None,
    batch: Batch = 50,
    prompts: Prompts = None,
    class_labels: Labels = None,
    guidance_scale: Guidance = None,
    output: Annotated[Path, typer.Option("-o", "--output", help="Image file to write.")] = Path("samples.png"),
    beside: Annotated[
        list[str] | None, typer.Option(help="Another pipeline, in a row below with equal seeds; may be repeated.", **HIDDEN)
    ] = None,
    device: Device = None,
) -> None:
    """Generate images and write them as one picture."""
    arguments.require_picture(output)
    conditioning = arguments.read_conditioning(prompts, class_labels, guidance_scale)
    import torch

    from dmquant.diffusion import sampling
    from dmquant.evaluation import image_grid

    rows, plan = {}, sampling.SamplingPlan(steps, batch, conditioning)
    for name in dict.fromkeys([model, *(beside or ())]):
        pipeline = arguments.open_model(name, device, any_tool=True)
        sampling.set_sampler(pipeline, sampler)
        rows[name] = torch.cat(list(sampling.generate(pipeline, range(seed, seed + count), plan, track=console.Tracker())))
    picture = image_grid.stack_rows(rows) if beside else image_grid.make_grid(rows[model], math.ceil(count**0.5))
    output.parent.mkdir(parents=True, exist_ok=True)
    picture.save(output)
    console.print_message(f"wrote {output}")


@app.command()
def verify(folder: Annotated[Path, typer.Argument(help="Folder of a quantized pipeline.")]) -> None:
    """Check the hashes, the format and the values of a quantized pipeline."""
    from dmquant.checkpoint import serialization

    for name in serialization.verify(folder):
        console.print_result(f"ok  {name}")


@app.command()
def doctor(as_json: Annotated[bool, typer.Option("--json", help="Write JSON, as for bug reports.")] = False) -> None:
    """Show versions, devices, kernels and files; exit with 1 if there is a problem."""
    from dmquant.cli.doctor import collect_findings

    findings = collect_findings()
    if as_json:
        console.print_result(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        rows = [[f.name, f.value, "" if f.is_ok else f"problem: {f.advice}"] for f in findings]
        console.print_table(["what", "found", ""], rows, align="lll")
    if not all(finding.is_ok for finding in findings):
        raise typer.Exit(1)


@app.command()
def fetch(
    resource: Annotated[Literal["inception", "clip"], typer.Argument(help="Weights to download; their hash is checked.")],
) -> None:
    """Download weights that metrics need."""
    from dmquant.evaluation.metrics import clip_score, inception_weights

    file = inception_weights.fetch_inception() if resource == "inception" else clip_score.fetch_clip()
    console.print_result(str(file))


def _show_plan(pipeline: "DiffusionPipeline", method: "Method") -> None:
    """Prints the bits that the method would give each layer."""
    from dmquant.diffusion.pipeline import find_target
    from dmquant.quantization import plan_scheme

    denoiser = find_target(pipeline).denoiser
    notes = method.notes(denoiser)
    _print_layers(denoiser, method.weight_bits, method.act_bits, scheme=plan_scheme(pipeline, method), notes=notes)


def _print_layers(
    denoiser: "ModelMixin", weight_bits: int, act_bits: int, *, scheme: "Scheme | None" = None, notes: dict | None = None
) -> None:
    """Prints a table of the layers, with reasons where their bits differ from those given, and a summary."""
    from dmquant.cli import layer_table
    from dmquant.evaluation.cost import measure_cost

    cost = measure_cost(denoiser, scheme=scheme, notes=notes)
    rows = layer_table.tabulate(cost, weight_bits=weight_bits, act_bits=act_bits)
    console.print_table(layer_table.HEADINGS, rows, align="lllrrrl", notes=["", *layer_table.summarize(cost)])


def _save(quantized: "Quantized", folder: Path, *, force: bool) -> None:
    """Saves the pipeline and the cost of quantizing in the folder, and prints the cost with the size of the result."""
    from dmquant.checkpoint import serialization
    from dmquant.diffusion.pipeline import find_target
    from dmquant.evaluation.cost import measure_cost

    serialization.save(quantized.pipeline, folder, force=force)
    target = find_target(quantized.pipeline)
    size_bytes = sum(file.stat().st_size for file in (folder / target.name).glob("*.safetensors"))
    ratio = measure_cost(target.denoiser).float_size_bytes / size_bytes
    quantized.effort.save(folder)
    console.print_message(quantized.effort.describe())
    console.print_message(f"{target.name}: {size_bytes / 1e6:.2f} MB on disk, 1/{ratio:.2f} of float32")


def _write_value(value: object) -> str:
    if isinstance(value, tuple | list):
        return ",".join(map(str, value))
    return str(value)
