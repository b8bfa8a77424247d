"""Shows that a change of the code changes no result: makes golden artefacts through the command line and compares two sets.

    python benchmarks/golden.py make runs/before      # about four minutes on two cores
    python benchmarks/golden.py make runs/after       # after the change
    python benchmarks/golden.py compare runs/before runs/after

Each case quantizes the embedded pipeline, evaluates it, draws samples and inspects it, with a fixed seed, under each choice of
kernels. FOLDER/golden.json holds the SHA-256 of each safetensors file and of each picture's pixels, and the content of each
config, report and printed table. `compare` prints one line per difference and exits with 1 if there is any. Both sets have to
come from one machine with the same packages, because float sums are rounded differently elsewhere. The script imports nothing
of dmquant and runs its commands only, so that it works before and after modules move.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
KERNELS = ("exact", "auto")
CASES = {
    "lsq": "--method lsq --wbits 4 --abits 4",
    "efficientdm": "--method efficientdm --wbits 4 --abits 4 --set attention_bits=8",
    "binarydm": "--method binarydm --wbits 1 --abits 4",
    "binarydm-multi": "--method binarydm --wbits 1 --abits 4 --set basis=multi",
    "dilatequant": "--method dilatequant --wbits 4 --abits 4 --set attention_bits=8 --set head_grids=true --set block_samples=8",
}
TRAINING = "--max-steps 3 --set batch=2 --set calibration_samples=8"
RECORDING = "--seed 0 --set trajectories=4 --set sampling_steps=4 --set clip_images=2"
METRICS = "--fid --sfid --kid --is --prdc --psnr --ssim --cosine --layers"
SAMPLING = "--seed 0 --steps 4 --batch 4"
TABLES = ("methods", "methods lsq", "methods efficientdm", "methods binarydm", "methods dilatequant")

# What differs between two equal results. Nothing else is left out.
LEFT_OUT_FIELDS = {
    "seconds_per_image",  # report: a time
    "peak_memory_bytes",  # report: the accelerator's memory; null on a CPU
    "versions",  # report: of Python, dmquant and the packages
    "producer",  # config of the denoiser: the version of dmquant
    "_diffusers_version",  # every config of a pipeline
}
LEFT_OUT_FILES = {
    "effort.json",  # seconds and memory of the run; `inspect` prints it where it is there
    "MANIFEST.json",  # the hashes of the other files, which contain versions
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("make").add_argument("folder", type=Path)
    two = commands.add_parser("compare")
    two.add_argument("old", type=Path)
    two.add_argument("new", type=Path)
    args = parser.parse_args()
    if args.command == "make":
        return make(args.folder.resolve())
    lines = list(compare(*(json.loads((folder / "golden.json").read_text()) for folder in (args.old, args.new))))
    print("\n".join(lines) or "no difference")
    sys.exit(1 if lines else 0)


def make(folder: Path) -> None:
    """Writes the artefacts of every case under every choice of kernels into a new folder, and golden.json last."""
    folder.mkdir(parents=True)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs: dict[str, Future[Any]] = {line: pool.submit(run, folder, line) for line in TABLES}
        jobs |= {f"{k}/{case}": pool.submit(run_case, folder / k / case, case, k) for case, k in product(CASES, KERNELS)}
        golden = {name: job.result() for name, job in jobs.items()}
    (folder / "golden.json").write_text(json.dumps(golden, indent=1, sort_keys=True) + "\n")


def run_case(home: Path, case: str, kernels: str) -> dict[str, Any]:
    """Runs the commands of one case in a new folder; returns the output of `inspect` and the content of each file by name."""
    home.mkdir(parents=True)
    run(home, f"quantize {CASES[case]} {RECORDING} {TRAINING} -o model", kernels)
    (home / "model" / "effort.json").unlink()
    run(home, f"eval model {METRICS} {SAMPLING} --num-images 8 --no-cache -o report.json", kernels)
    run(home, f"sample model {SAMPLING} -n 4 -o samples.png", kernels)
    files = [file for file in sorted(home.rglob("*")) if file.is_file() and file.name not in LEFT_OUT_FILES]
    return {"inspect": run(home, "inspect model", kernels)} | {str(file.relative_to(home)): describe(file) for file in files}


def run(home: Path, line: str, kernels: str = "auto") -> list[str]:
    """Runs a command of the package beside this script on one thread, without a hub; returns the lines that it printed."""
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    own = {"PYTHONPATH": paths, "DMQUANT_KERNELS": kernels, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "dmquant", *line.split()]
    done = subprocess.run(command, cwd=home, env=os.environ | own, check=False, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"dmquant {line} ended with {done.returncode}:\n{done.stderr}")
    return done.stdout.splitlines()


def describe(file: Path) -> Any:
    """Returns the content of a JSON file without LEFT_OUT_FIELDS; else the SHA-256 of a picture's pixels or a file's bytes."""
    if file.suffix == ".json":
        return json.loads(file.read_text(), object_hook=leave_out)
    if file.suffix == ".png":
        with Image.open(file) as image:
            return f"{image.mode} {image.width}x{image.height} {hashlib.sha256(image.tobytes()).hexdigest()}"
    return hashlib.sha256(file.read_bytes()).hexdigest()


def leave_out(entry: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in entry.items() if name not in LEFT_OUT_FIELDS}


def compare(old: Any, new: Any, place: str = "") -> Iterator[str]:
    """Yields one line for each leaf of two JSON values that differs, is missing or was added."""
    if type(old) is type(new) and isinstance(old, dict | list):
        old, new = (dict(enumerate(value)) if isinstance(value, list) else value for value in (old, new))
        for key in dict.fromkeys([*old, *new]):
            yield from compare(old.get(key, "absent"), new.get(key, "absent"), f"{place}/{key}")
    elif (before := json.dumps(old)) != (after := json.dumps(new)):  # as text: to Python 1, 1.0 and true are equal
        yield f"{place.lstrip('/')}: {before} -> {after}"


if __name__ == "__main__":
    main()
