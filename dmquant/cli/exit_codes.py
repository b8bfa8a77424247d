"""Turns an exception into one line on stderr and an exit code.

DMQUANT_DEBUG=1 also shows the traceback. The traceback of an unexpected exception is written to a temporary file.
"""

import os
import tempfile
import traceback
from typing import Protocol, TypeGuard

from dmquant.cli import console
from dmquant.errors import DmquantError, Interrupted, OutOfMemory

INTERRUPTED = 130
INTERNAL_ERROR = 70
# parts of messages: torch raises a plain RuntimeError if the CPU has no memory left
CPU_OUT_OF_MEMORY = ("DefaultCPUAllocator", "can't allocate memory", "not enough memory")
MEMORY_ADVICE = "out of memory; try a smaller --batch (or --set batch=N), fewer images at once, or --device cpu"


def report_error(error: BaseException) -> int:
    """Prints one line about the error on stderr and returns its exit code."""
    if os.environ.get("DMQUANT_DEBUG", "0") not in ("", "0"):
        console.print_message("".join(traceback.format_exception(error)))
    # closes the generators in the frames of the error, so that their progress bars end before the line is printed
    for link in (error, error.__cause__):
        traceback.clear_frames(getattr(link, "__traceback__", None))
    if isinstance(error, KeyboardInterrupt | Interrupted):
        console.print_message(str(error) or "interrupted")
        return INTERRUPTED
    if isinstance(error, DmquantError):
        console.print_error(str(error))
        return error.exit_code
    if _is_usage_error(error):
        console.print_error(_describe_usage(error))
        return error.exit_code
    if _is_out_of_memory(error):
        console.print_error(MEMORY_ADVICE)
        return OutOfMemory.exit_code
    if isinstance(error, OSError) and error.errno is not None:
        console.print_error(f"{error.filename}: {error.strerror}" if error.filename is not None else str(error))
        return DmquantError.exit_code
    file = _write_traceback(error)
    console.print_error(f"{type(error).__name__}: {error}; this is a bug in dmquant: please report it with {file}")
    return INTERNAL_ERROR


class _UsageError(Protocol):
    """Interface of typer's usage errors."""

    exit_code: int

    def format_message(self) -> str:
        """Returns the error's message."""


def _is_usage_error(error: BaseException) -> TypeGuard[_UsageError]:
    # typer's copy of click is private, so its errors are recognized by their attributes
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
