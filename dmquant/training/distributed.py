"""The processes of one piece of work, as torchrun and accelerate launch them: all compute, the first writes and speaks."""

import os
import subprocess
import sys
from datetime import timedelta
from typing import Any

LONGEST_WAIT = timedelta(hours=6)  # for the first process, which reads references and computes metrics alone


def number() -> int:
    """The number of this process; 0 where it is the only one."""
    return int(os.environ.get("RANK", "0"))


def count() -> int:
    """How many processes there are."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    return number() == 0


def is_launched() -> bool:
    """Whether torchrun or accelerate started this process."""
    return "RANK" in os.environ


def launch(line: list[str], processes: int) -> int:
    """Runs a command line of ours once more, in several processes; the exit code, which torchrun makes 1 for every failure."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", "-m", "dmquant"]
    threads = str(max(1, (os.cpu_count() or 1) // processes))
    return subprocess.run([*command, *line], env={"OMP_NUM_THREADS": threads, **os.environ}).returncode


def join(*, on_cpu: bool) -> None:
    """Makes the processes one group, where there are several and they are none yet."""
    if count() > 1:
        from accelerate import PartialState

        PartialState(cpu=on_cpu, timeout=LONGEST_WAIT)


def gather(item: Any) -> list[Any]:
    """What each process brings, in the order of their numbers; only the first gets it, the others an empty list."""
    if count() == 1:
        return [item]
    from torch import distributed

    items = [None] * count() if is_first() else None
    distributed.gather_object(item, items)
    return items or []


def share(item: Any) -> Any:
    """What the first process brings, for all."""
    if count() == 1:
        return item
    from torch import distributed

    items = [item]
    distributed.broadcast_object_list(items)
    return items[0]


def leave_together() -> None:
    """Waits for all processes and ends their group: none exits, and takes the others with it, while one still saves."""
    torch = sys.modules.get("torch")  # whoever joined a group has imported it
    if torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
