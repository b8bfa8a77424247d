"""An exception -> one line on stderr and an exit code. Tracebacks are for DMQUANT_DEBUG=1 and for our own bugs."""

import os
import tempfile
import traceback
from typing import Protocol, TypeGuard

from dmquant.cli import console
from dmquant.errors import DmquantError, Interrupted, OutOfMemory

INTERRUPTED = 130
INTERNAL_ERROR = 70
# torch raises a plain RuntimeError where the CPU has no memory left
CPU_OUT_OF_MEMORY = ("DefaultCPUAllocator", "can't allocate memory", "not enough memory")
MEMORY_ADVICE = "out of memory; try a smaller --batch (or --set batch=N), fewer images at once, or --device cpu"


def explain(error: BaseException) -> int:
    """Say what went wrong and return the exit code that stands for it."""
    if os.environ.get("DMQUANT_DEBUG", "0") not in ("", "0"):
        console.say("".join(traceback.format_exception(error)))
    # lets go of the loops that the error came out of, so that their progress bars end before anything is said
    for link in (error, error.__cause__):
        traceback.clear_frames(getattr(link, "__traceback__", None))
    if isinstance(error, KeyboardInterrupt | Interrupted):
        console.say(str(error) or "interrupted")
        return INTERRUPTED
    if isinstance(error, DmquantError):
        console.fail(str(error))
        return error.exit_code
    if _is_usage_error(error):
        console.fail(_describe_usage(error))
        return error.exit_code
    if _is_out_of_memory(error):
        console.fail(MEMORY_ADVICE)
        return OutOfMemory.exit_code
    if isinstance(error, OSError) and error.errno is not None:
        console.fail(f"{error.filename}: {error.strerror}" if error.filename is not None else str(error))
        return DmquantError.exit_code
    console.fail(f"{type(error).__name__}: {error}; this is a bug of dmquant: please report it with {_write_traceback(error)}")
    return INTERNAL_ERROR


class _UsageError(Protocol):
    """What typer's errors of usage can do."""

    exit_code: int

    def format_message(self) -> str:
        """The error in words."""


def _is_usage_error(error: BaseException) -> TypeGuard[_UsageError]:
    # typer keeps its copy of click private: its errors are known by what they can do
    return hasattr(error, "format_message") and hasattr(error, "exit_code")


def _describe_usage(error: _UsageError) -> str:
    context = getattr(error, "ctx", None)
    hint = f" (see {context.command_path} --help)" if context is not None else ""
    return error.format_message().rstrip(".") + hint


def _is_out_of_memory(error: BaseException) -> bool:
    names = {cls.__name__ for cls in type(error).__mro__}
    return bool(names & {"OutOfMemoryError", "MemoryError"}) or any(sign in str(error) for sign in CPU_OUT_OF_MEMORY)


def _write_traceback(error: BaseException) -> str:
    text = "".join(traceback.format_exception(error))
    with tempfile.NamedTemporaryFile("w", prefix="dmquant-", suffix=".txt", delete=False, encoding="utf-8") as file:
        file.write(text)
    return file.name
