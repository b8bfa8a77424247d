"""What can go wrong for a user, and the exit code of each. Every message says what to do next."""


class DmquantError(Exception):
    """An expected failure: a damaged file, a run that diverged, a threshold missed."""

    exit_code = 1


class InputError(DmquantError, ValueError):
    """The command, a setting or a file given is not usable as it is."""

    exit_code = 2


class MissingResource(DmquantError):
    """Something to be fetched or installed first is not there: weights, a hub, a package."""

    exit_code = 3


class OutOfMemory(DmquantError):
    """The work does not fit; the message names what shrinks it."""

    exit_code = 4


class Interrupted(DmquantError):
    """Stopped by the user after the state was saved."""

    exit_code = 130


class DamagedFile(DmquantError):
    """A file that is not what it says it is: truncated, altered, wrong shapes or types."""
