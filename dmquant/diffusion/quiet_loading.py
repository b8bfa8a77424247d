"""While diffusers and transformers load, they draw bars and tell of packages on stderr; the library prints nothing."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec

PACKAGES = ("diffusers", "transformers")  # the second is optional


@contextmanager
def loading_quietly() -> Iterator[None]:
    """No bars and nothing below an error from either while inside."""
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
