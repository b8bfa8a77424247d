"""Errors that a user can cause or solve, each with its exit code. Every message names a way out."""


class DmquantError(Exception):
    """Base class of expected failures, such as a model that diverged."""

    exit_code = 1


class InputError(DmquantError, ValueError):
    """The user gave a command, setting or file that cannot be used."""

    exit_code = 2


class MissingResource(DmquantError):
    """Weights, a model or a package must be downloaded or installed first."""

    exit_code = 3


class OutOfMemory(DmquantError):
    """There is not enough memory; the message names the options that reduce it."""

    exit_code = 4


class Interrupted(DmquantError):
    """The user stopped the work."""

    exit_code = 130


class DamagedFile(DmquantError):
    """A file is truncated or altered, or its content has wrong shapes or types."""
