"""The command `compare`: a table of reports, or of experiments that it runs first. Without experiments it imports no torch."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from dmquant.cli import arguments, console
from dmquant.cli.options import HIDDEN, METRIC_NAMES, Device, Guidance, Labels, Prompts
from dmquant.errors import DmquantError, InputError, Interrupted, MissingResource

if TYPE_CHECKING:
    from dmquant.evaluation.reports.comparison import Comparison
    from dmquant.evaluation.reports.report import Report
    from dmquant.evaluation.sweep_plan import Plan
    from dmquant.training.resume import SavedRun

RUN = "METHOD:W/A[,KEY=VALUE...]: quantize and evaluate first, as in lsq:4/8; may be repeated."
PLAN = "JSON file with a list of experiments to run first and their protocol."
Format = Literal["table", "md", "csv", "json", "latex"]
MEASURED = f"For --run: metrics to measure, as in fid,psnr. Known: {METRIC_NAMES}."
Metrics = Annotated[str | None, typer.Option(help=MEASURED, show_default="fid,psnr")]


@dataclass(frozen=True)
class SweepOptions:
    """Options of the command line about experiments."""

    runs: tuple[str, ...]
    plan: Path | None
    output: Path | None
    model: str | None
    device: str | None
    metrics: str | None
    protocol: dict[str, int | None]
    conditions: tuple[Path | None, str | None, float | None]  # prompts, class labels, guidance scale

    @property
    def has_protocol(self) -> bool:
        """Whether an option of the protocol is given."""
        return any(value is not None for value in (self.metrics, *self.protocol.values(), *self.conditions))


def compare(
    paths: Annotated[list[Path] | None, typer.Argument(metavar="PATH...", help="Report files, or folders with reports.")] = None,
    form: Annotated[Format, typer.Option("--format", help="Format of the table.")] = "table",
    mixed: Annotated[bool, typer.Option("--mixed", help="Allow different protocols; fields that differ become columns.")] = False,
    html: Annotated[
        Path | None, typer.Option(help="Also write an HTML file with samples, table, plots, settings.", **HIDDEN)
    ] = None,
    samples: Annotated[
        int, typer.Option(help="Images of each model in the HTML file; with 0 no pipeline is opened.", min=0, max=64)
    ] = 8,
    effort: Annotated[bool, typer.Option("--effort", help="Also show seconds and memory of quantizing.")] = False,
    cards: Annotated[bool, typer.Option("--cards", help="Also write a model card into each quantized folder.")] = False,
    runs: Annotated[list[str] | None, typer.Option("--run", help=RUN)] = None,
    plan: Annotated[Path | None, typer.Option("--experiments", help=PLAN, **HIDDEN)] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Folder of the experiments.", **HIDDEN)] = None,
    model: Annotated[str | None, typer.Option(help="Float pipeline of the experiments.", show_default="embedded")] = None,
    metrics: Metrics = None,
    num_images: Annotated[int | None, typer.Option(help="For --run: images per model.", min=2, show_default="1000")] = None,
    steps: Annotated[int | None, typer.Option(help="For --run: denoising steps per image.", min=1, show_default="20")] = None,
    batch: Annotated[int | None, typer.Option(help="For --run: images per batch.", min=1, show_default="50")] = None,
    prompts: Prompts = None,
    class_labels: Labels = None,
    guidance_scale: Guidance = None,
    device: Device = None,
) -> None:
    """Show reports as one table, the float model first. --run and --experiments quantize and evaluate first."""
    if html is not None:
        arguments.require_page(html)
    protocol = {"num_images": num_images, "steps": steps, "batch": batch}
    failures: dict[str, str] = {}
    conditions = (prompts, class_labels, guidance_scale)
    options = SweepOptions(tuple(runs or ()), plan, output, model, device, metrics, protocol, conditions)
    if runs or plan:
        paths, failures = _run_experiments(options, paths or [], has_page=html is not None)
    elif output or model or options.has_protocol:
        raise InputError("-o, --model and options of the protocol (--metrics, --steps, ...) need --run or --experiments")
    paths = arguments.find_reports(paths or [])
    table, reports = _tabulate(paths, mixed=mixed, effort=effort)
    _show(table, form)
    if html is not None:
        _write_page(html, table, reports, samples, device)
    if cards:
        _write_cards(paths, reports, mixed)
    if failures:
        raise DmquantError("; ".join(f"{name} failed: {reason}" for name, reason in failures.items()))


def _run_experiments(options: SweepOptions, paths: list[Path], *, has_page: bool) -> tuple[list[Path], dict[str, str]]:
    """Runs the experiments; for an HTML file they also measure layers.

    Returns:
        The folders of the reports, the float model's first, followed by `paths`; and experiment -> reason of those that failed.
    """
    if options.output is None:
        raise InputError("give the folder of the experiments with -o")
    if options.plan is not None and options.has_protocol:
        raise InputError("the file of --experiments contains its protocol; leave out --metrics, --steps, --prompts and the like")
    from dmquant.diffusion import pipeline
    from dmquant.evaluation import image_cache, sweep

    chosen = _make_plan(options)
    chosen = chosen.with_layers() if has_page else chosen
    pipeline.locate(options.model)
    arguments.require_writable(options.output)
    try:
        results = sweep.run_plan(
            chosen,
            options.output,
            model=options.model,
            device=options.device or pipeline.choose_device(),
            cache=image_cache.default_folder(),
            begin=_resumable_run,
            tell=console.print_message,
            track=console.Tracker(),
        )
    except (KeyboardInterrupt, Interrupted):
        raise Interrupted("interrupted; the same command continues") from None
    return [*(options.output / name for name in results.reports), *paths], results.failures


def _make_plan(options: SweepOptions) -> "Plan":
    """Returns the experiments of the file and those of the command line, with their protocol."""
    from dmquant.evaluation.sweep_plan import DEFAULT_METRICS, Plan, parse_run, read_plan

    own = tuple(parse_run(run) for run in options.runs)
    if options.plan is not None:
        read = read_plan(options.plan)
        return replace(read, experiments=(*read.experiments, *own))
    protocol = {name: value for name, value in options.protocol.items() if value is not None}
    metrics = arguments.read_metrics(options.metrics) or DEFAULT_METRICS
    return Plan(own, protocol, metrics, arguments.read_conditioning(*options.conditions))


@contextmanager
def _resumable_run(folder: Path) -> Iterator["SavedRun"]:
    """Yields the saved run FOLDER.run of an experiment, which continues if it exists, and deletes it at the end of the block.

    The first Ctrl-C stops after the current step, whose state is saved.
    """
    from dmquant.cli.signals import StopRequest
    from dmquant.training.resume import SavedRun

    with StopRequest() as stop:
        run = SavedRun(folder.absolute().with_name(f"{folder.name}.run"), should_stop=stop)
        yield run
        run.remove()


def _tabulate(paths: list[Path], *, mixed: bool, effort: bool) -> tuple["Comparison", list["Report"]]:
    """Returns the table of the reports, with the cost of quantizing if `effort`, and the reports in the order of `paths`."""
    from dmquant.evaluation.reports import comparison
    from dmquant.evaluation.reports.report import Report
    from dmquant.training.run_cost import Effort

    reports = [Report.load(path) for path in paths]
    table = comparison.compare(reports, mixed=mixed)
    if not effort:
        return table, reports
    ordered = sorted(zip(paths, reports), key=lambda pair: not pair[1].is_float)  # the order of the rows
    folders = [path if path.is_dir() else path.parent for path, _ in ordered]
    return comparison.add_efforts(table, [Effort.load(folder) for folder in folders]), reports


def _show(table: "Comparison", form: Format) -> None:
    if form == "table":
        console.print_comparison(table)
    else:
        write = {"md": table.to_markdown, "csv": table.to_csv, "json": table.to_json, "latex": table.to_latex}
        console.print_result(write[form]())


def _write_page(file: Path, table: "Comparison", reports: list["Report"], samples: int, device: str | None) -> None:
    from dmquant.evaluation.reports import html_page

    try:
        figures = html_page.draw_figures(table, reports)
    except MissingResource as error:
        figures = html_page.Figures(note=str(error))
        console.print_message(f"warning: {file} is written without plots: {error}")
    strips = []
    if samples:
        from dmquant.evaluation import image_cache, sample_sheet

        cache, track = image_cache.default_folder(), console.Tracker()
        strips = sample_sheet.draw_strips(reports, samples, device=device, cache=cache, track=track)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(html_page.render(table, reports, figures=figures, strips=strips), encoding="utf-8")
    console.print_message(f"wrote {file}")


def _write_cards(paths: list[Path], reports: list["Report"], mixed: bool) -> None:
    from dmquant.evaluation.model_card import write_card

    for path, report in zip(paths, reports, strict=True):
        if (path / "model_index.json").is_file() and not report.is_float:
            console.print_message(f"wrote {write_card(path, report, reports, mixed=mixed)}")
