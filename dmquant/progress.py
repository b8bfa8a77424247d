"""The type of progress callbacks: (iterable, label) -> iterable of the same items. The library itself shows no progress."""

from collections.abc import Callable, Iterable

Track = Callable[[Iterable, str], Iterable]


def plain(work: Iterable, label: str) -> Iterable:
    """Returns the iterable unchanged: shows no progress."""
    return work
