"""Cost of a run: seconds and peak memory of its stages, and the number of trained parameters.

These values differ from run to run, so they are stored beside the published files of a pipeline, which repeat byte for byte.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

from dmquant.errors import DamagedFile

FILE_NAME = "effort.json"


@dataclass(frozen=True)
class Stage:
    """One part of a run."""

    seconds: float
    cpu_seconds: float  # of all threads: on a busy machine these grow less than the seconds on the wall
    peak_bytes: int | None  # the most that was held at a time, beyond what was when the run began; None: not to be known here
    added_bytes: int | None = None  # the same beyond what was when the stage began: what it needs itself


@dataclass(frozen=True)
class Effort:
    """Cost of a run. `held_bytes` is the memory at its start: the float pipeline, and on a CPU also libraries."""

    stages: dict[str, Stage]
    held_bytes: int | None
    device: str
    trained_params: int
    trained_share: float  # of the float model's parameters; above 1 where quantizers' are trained beside all of them
    is_whole: bool  # False: the run was continued, and what came before is not counted

    @property
    def seconds(self) -> float:
        return sum(stage.seconds for stage in self.stages.values())

    @property
    def peak_bytes(self) -> int | None:
        known = [stage.peak_bytes for stage in self.stages.values() if stage.peak_bytes is not None]
        return max(known, default=None)

    def describe(self) -> str:
        """Returns the cost in one line of text."""
        parts = ", ".join(f"{name} {stage.seconds:.0f}" for name, stage in self.stages.items())
        memory = "" if self.peak_bytes is None else f"; {self.peak_bytes / 1e6:.0f} MB of memory at the peak"
        since = "" if self.is_whole else " since it was resumed"
        trained = f"trained {self.trained_params / 1e6:.2f} M parameters ({self.trained_share:.1%})"
        return f"{trained} in {self.seconds:.0f} s{since}: {parts}{memory}"

    def save(self, folder: Path) -> None:
        (folder / FILE_NAME).write_text(json.dumps(asdict(self), indent=2, sort_keys=True) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Self | None:
        """Returns the cost of the run that wrote a folder, or None if it was not stored."""
        path = folder / FILE_NAME
        if not path.is_file():
            return None
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            effort = cls(**{**values, "stages": {name: Stage(**stage) for name, stage in values["stages"].items()}})
            effort.describe()  # in words nothing of a wrong type goes unseen
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise DamagedFile(f"{path} does not say what a run took: {type(error).__name__}: {error}") from error
        return effort
