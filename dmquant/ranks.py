"""The processes of one piece of work, as torchrun and accelerate launch them: all compute, the first writes and speaks."""

import os
import sys


def number() -> int:
    """The number of this process; 0 where it is the only one."""
    return int(os.environ.get("RANK", "0"))


def is_first() -> bool:
    return number() == 0


def leave_together() -> None:
    """Waits for all processes and ends their group: none exits, and takes the others with it, while one still saves."""
    torch = sys.modules.get("torch")  # whoever joined a group has imported it
    if torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
