"""Saves and continues interrupted runs. The state lies in a folder of its own until the result is published.

    FOLDER/start/   settings and hashes of the run (facts.json) and its recorded samples; written once
    FOLDER/state/   the state_dicts of one step, as safetensors and JSON, never pickle
    FOLDER/store/   data of a method that is too large for memory; a folder per rank

The first two are published atomically: if the process is killed, the state is the old one or the new one. Random numbers are a
function of seed, step and rank, so no generator is saved, and a continued run gives the bytes of one that was not interrupted.
A run is not continued on another device, with another number of ranks or by another version: the result would differ.
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dmquant import __version__
from dmquant.checkpoint import atomic_folder
from dmquant.diffusion.trajectories import Samples
from dmquant.errors import DamagedFile, DmquantError, InputError, Interrupted
from dmquant.training import distributed

PERIOD_S = 120.0  # least time between two saves
SHARE = 0.01  # largest share of the time that goes into saving: a large state is saved less often
START, STATE, STORE = "start", "state", "store"


class Part(Protocol):
    """A part of the state of a run, with the methods of torch's modules and optimizers."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> Any: ...


class Turn(Protocol):
    """One step of a loop: its number, and its loss once it is done."""

    number: int
    loss: float


Step = TypeVar("Step", bound=Turn)


class Run:
    """A run that is not saved."""

    is_continued = False  # whether an earlier process computed some of its steps

    def open(self, facts: Mapping[str, Any], tensors: Mapping[str, Iterable[Tensor]]) -> None:
        """Begins the run. `facts` are its settings, `tensors` are those that it starts from."""

    def load_or_record(self, record: Callable[[], Samples]) -> Samples:
        """Returns the samples of this run: the saved ones, or those that `record` makes."""
        return record()

    def restore(self, parts: Mapping[str, Part], device: torch.device) -> int:
        """Loads the saved state into the parts; returns the number of the next step."""
        return 0

    def keep(self, steps: Iterable[Step], parts: Mapping[str, Part]) -> Iterator[Step]:
        """Yields the steps. Between two steps it saves the parts when due, and raises Interrupted when asked to stop."""
        yield from steps

    @contextmanager
    def storeroom(self) -> Iterator[Path]:
        """Yields a folder for data too large for memory. It is removed at the end, unless the run can be continued."""
        with TemporaryDirectory(prefix="dmquant-") as folder:
            yield Path(folder)


class SavedRun(Run):
    """A run that is saved periodically, and that continues the run in its folder.

    `should_stop` is called before each step: once it returns True on any rank, the state is saved and Interrupted is raised.
    Only rank 0 writes.
    """

    def __init__(self, folder: str | Path, *, should_stop: Callable[[], bool] = lambda: False, period_s: float = PERIOD_S):
        self.folder = Path(os.path.abspath(folder))
        self._start, self._state = self.folder / START, self.folder / STATE
        self._should_stop, self._period_s = should_stop, period_s
        self._samples: Samples | None = None
        self._is_writer, self._is_removed, self._has_begun = distributed.is_first(), False, False

    def is_there(self) -> bool:
        """Returns whether the folder holds a state to continue from."""
        if self._is_writer and self.folder.is_dir():
            with atomic_folder.lock(self._state):
                atomic_folder.repair(self._state)
        return self._state.exists() and not self._is_removed

    def remove(self) -> None:
        """Removes the saved run. Files that dmquant did not write stay."""
        # another rank may call is_there before rank 0 has removed the state
        self._is_removed = not self._is_writer
        if self._is_writer and self.folder.is_dir():
            atomic_folder.discard(self._state)
            atomic_folder.discard(self._start)
            for folder in (self.folder / STORE).glob("*"):
                _remove_store(folder)
            if self.folder.is_dir() and not any(self.folder.iterdir()):
                self.folder.rmdir()

    def open(self, facts: Mapping[str, Any], tensors: Mapping[str, Iterable[Tensor]]) -> None:
        """Raises InputError if the folder holds a run with other facts, DamagedFile if a saved file was changed."""
        here = {"dmquant": __version__, "ranks": int(os.environ.get("WORLD_SIZE", "1"))}
        hashes = {name: _hash(values) for name, values in tensors.items()}
        # through JSON, which turns tuples into lists, as in the saved facts
        self._facts = json.loads(json.dumps({**facts, **hashes, **here}))
        self._has_begun = self.is_continued = self.is_there()
        if self._has_begun:
            self._verify()
            self._refuse_others()
        else:
            atomic_folder.check_target(self._state, force=True)

    def load_or_record(self, record: Callable[[], Samples]) -> Samples:
        self._samples = Samples(**_read(self._start, "samples", torch.device("cpu"))) if self._has_begun else record()
        return self._samples

    def restore(self, parts: Mapping[str, Part], device: torch.device) -> int:
        if not self._has_begun:
            return 0
        for name, part in parts.items():
            part.load_state_dict(_read(self._state, name, device))
        return json.loads((self._state / "step.json").read_text(encoding="utf-8"))

    def keep(self, steps: Iterable[Step], parts: Mapping[str, Part]) -> Iterator[Step]:
        due = time.monotonic() + self._period_s
        for step in steps:
            if any(gather_object([self._should_stop()])):
                self._save(step.number, parts)
                # a rank that exits ends the others: wait until the state is on the disk
                PartialState().wait_for_everyone()
                raise Interrupted(f"stopped before step {step.number}; the run is saved in {self.folder}")
            if time.monotonic() >= due:
                begin = time.monotonic()
                self._save(step.number, parts)
                end = time.monotonic()
                due = end + max(self._period_s, (end - begin) / SHARE)
            yield step

    @contextmanager
    def storeroom(self) -> Iterator[Path]:
        folder = self.folder / STORE / str(distributed.number())
        if not self._has_begun:
            _remove_store(folder)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            yield folder
        except BaseException:
            if not self._has_begun:
                _remove_store(folder)
            raise
        _remove_store(folder)

    def _save(self, next_step: int, parts: Mapping[str, Part]) -> None:
        if not self._is_writer:
            self._has_begun = True
            return
        if not self._has_begun:
            with atomic_folder.publish(self._start, force=True) as temporary:
                _write_json(temporary / "facts.json", self._facts)
                if self._samples is not None:
                    _write(temporary, "samples", vars(self._samples))
        with atomic_folder.publish(self._state, force=True) as temporary:
            _write_json(temporary / "step.json", next_step)
            for name, part in parts.items():
                _write(temporary, name, part.state_dict())
        self._has_begun = True

    def _verify(self) -> None:
        try:
            atomic_folder.verify_manifest(self._start)
            atomic_folder.verify_manifest(self._state)
        except DamagedFile as error:
            raise DamagedFile(f"{error}. This run cannot be continued: start over with --force") from error

    def _refuse_others(self) -> None:
        saved, facts = json.loads((self._start / "facts.json").read_text(encoding="utf-8")), self._facts
        # a setting of a newer version that is off changes nothing
        names = [name for name in sorted(saved.keys() | facts.keys()) if (saved.get(name) or 0) != (facts.get(name) or 0)]
        if names:
            changes = "; ".join(f"{name} was {saved.get(name)}, now {facts.get(name)}" for name in names)
            raise InputError(f"{self.folder} holds another run: {changes}. Ask for the same, or start over with --force")


def _remove_store(folder: Path) -> None:
    """Removes the store of a rank, and its parent folders if they are empty."""
    shutil.rmtree(folder, ignore_errors=True)
    with suppress(OSError):  # not empty: the store of another rank, or a state
        folder.parent.rmdir()
        folder.parent.parent.rmdir()


def _hash(tensors: Iterable[Tensor]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def _write(folder: Path, name: str, tree: dict[str, Any]) -> None:
    """Writes a state_dict as two files: its tensors, and its structure with all other values."""
    tensors: dict[str, Tensor] = {}
    _write_json(folder / f"{name}.json", _split(tree, tensors))
    try:
        save_file(_apart(tensors), folder / f"{name}.safetensors")
    except SafetensorError as error:
        raise DmquantError(f"{folder} was not written: {error}") from error


def _read(folder: Path, name: str, device: torch.device) -> dict[str, Any]:
    tensors = load_file(folder / f"{name}.safetensors", device=str(device))
    return _join(json.loads((folder / f"{name}.json").read_text(encoding="utf-8")), tensors)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def _split(value: Any, tensors: dict[str, Tensor]) -> Any:
    """Returns the value as JSON. Tensors are moved into `tensors` and replaced by their names. Keys of dicts may be numbers."""
    if isinstance(value, Tensor):
        name = str(len(tensors))
        tensors[name] = value.detach().cpu().contiguous()
        return {"tensor": name}
    if isinstance(value, dict):
        return {"dict": [[key, _split(item, tensors)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        return [_split(item, tensors) for item in value]
    return value


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tensors without shared memory, which safetensors refuses (tied weights). Only shared tensors are copied."""
    apart, places = {}, set()
    for name, tensor in tensors.items():
        place = tensor.untyped_storage().data_ptr()
        apart[name] = tensor.clone() if place in places else tensor
        places.add(place)
    return apart


def _join(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_join(item, tensors) for item in value]
    if isinstance(value, dict):
        return tensors[value["tensor"]] if "tensor" in value else {key: _join(item, tensors) for key, item in value["dict"]}
    return value
