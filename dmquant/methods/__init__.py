"""Registry of the methods. Classes are imported when they are requested, so that listing the names imports no torch.

To add a method, add a folder here and a line below, or register it in another package under the entry-point group
`dmquant.methods`.
"""

import difflib
from importlib import import_module
from importlib.metadata import entry_points
from importlib.resources import files
from typing import TYPE_CHECKING

from dmquant.errors import DmquantError, InputError

if TYPE_CHECKING:
    from dmquant.methods.base import Method

BUILT_IN = {
    "lsq": "dmquant.methods.lsq.method:LSQ",
    "binarydm": "dmquant.methods.binarydm.method:BinaryDM",
    "efficientdm": "dmquant.methods.efficientdm.method:EfficientDM",
    "dilatequant": "dmquant.methods.dilatequant.method:DilateQuant",
}


def names() -> list[str]:
    """Returns the names of all methods, the built-in ones first."""
    return list(BUILT_IN) + sorted(set(_plug_ins()) - set(BUILT_IN))


def get(name: str) -> "type[Method]":
    """Returns the class of a method. Raises InputError for an unknown name, with the most similar one as a hint."""
    table = {**_plug_ins(), **BUILT_IN}
    if name not in table:
        near = difflib.get_close_matches(name, table, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(table)}"
        raise InputError(f"there is no method {name!r}; {hint}")
    module, _, attribute = table[name].partition(":")
    try:
        return getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise DmquantError(f"method {name!r} cannot be loaded from {table[name]}: {error}") from error


def summary(name: str) -> str:
    """Returns one line about the method: the first of its card, or the import path of a plug-in."""
    if name not in BUILT_IN:
        return f"plug-in {_plug_ins()[name]}"
    card = files("dmquant.methods").joinpath(name, "README.md").read_text(encoding="utf-8")
    return card.splitlines()[0].lstrip("# ")


def _plug_ins() -> dict[str, str]:
    return {point.name: point.value for point in entry_points(group="dmquant.methods")}
