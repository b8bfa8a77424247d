"""Processes of one command, launched by torchrun or accelerate: all compute, the first one writes and reports."""

import os
import subprocess
import sys
from datetime import timedelta
from typing import Any

LONGEST_WAIT = timedelta(hours=6)  # for the first process, which reads references and computes metrics alone


def number() -> int:
    """Returns the rank of this process; 0 if it is the only one."""
    return int(os.environ.get("RANK", "0"))


def count() -> int:
    """Returns the number of processes."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    return number() == 0


def is_launched() -> bool:
    """Returns whether torchrun or accelerate started this process."""
    return "RANK" in os.environ


def launch(line: list[str], processes: int) -> int:
    """Runs a dmquant command line in several processes and returns its exit code; torchrun returns 1 for every failure."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", "-m", "dmquant"]
    threads = str(max(1, (os.cpu_count() or 1) // processes))
    return subprocess.run([*command, *line], env={"OMP_NUM_THREADS": threads, **os.environ}).returncode


def join(*, on_cpu: bool) -> None:
    """Joins the process group if there are several processes and no group yet."""
    if count() > 1:
        from accelerate import PartialState

        PartialState(cpu=on_cpu, timeout=LONGEST_WAIT)


def gather(item: Any) -> list[Any]:
    """Returns the items of all processes in order of rank on the first process, and an empty list on the others."""
    if count() == 1:
        return [item]
    from torch import distributed

    items = [None] * count() if is_first() else None
    distributed.gather_object(item, items)
    return items or []


def share(item: Any) -> Any:
    """Returns the first process's item on all processes."""
    if count() == 1:
        return item
    from torch import distributed

    items = [item]
    distributed.broadcast_object_list(items)
    return items[0]


def leave_together() -> None:
    """Waits for all processes and ends their group; a process that exits earlier would end the others while they save."""
    torch = sys.modules.get("torch")  # whoever joined a group has imported it
    if torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
