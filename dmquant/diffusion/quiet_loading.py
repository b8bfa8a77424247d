"""Silences the progress bars and warnings that diffusers and transformers print while they load."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec

PACKAGES = ("diffusers", "transformers")  # the second is optional


@contextmanager
def loading_quietly() -> Iterator[None]:
    """Disables progress bars and messages below errors of both packages inside the context."""
    speakers = [import_module(f"{name}.utils.logging") for name in PACKAGES if find_spec(name)]
    before = [(speaker, speaker.get_verbosity(), speaker.is_progress_bar_enabled()) for speaker in speakers]
    for speaker in speakers:
        speaker.set_verbosity_error()
        speaker.disable_progress_bar()
    try:
        yield
    finally:
        for speaker, verbosity, had_bars in before:
            speaker.set_verbosity(verbosity)
            if had_bars:
                speaker.enable_progress_bar()
