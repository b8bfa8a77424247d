"""dmquant: extremely low-bit quantization of diffusion models.

Public names are imported at first use, so that `import dmquant` does not import torch.
"""

from importlib import import_module
from typing import Any

__version__ = "0.2.0"

PUBLIC = {
    "quantize": "dmquant.quantization:quantize",
    "load": "dmquant.checkpoint.serialization:open_any",
    "save": "dmquant.checkpoint.serialization:save",
    "evaluate": "dmquant.evaluation.evaluator:evaluate",
    "compare": "dmquant.evaluation.reports.comparison:compare",
    "methods": "dmquant.methods",
    "Conditioning": "dmquant.diffusion.conditioning:Conditioning",
}

__all__ = ["__version__", *PUBLIC]  # noqa: PLE0604  the keys are strings


def __getattr__(name: str) -> Any:
    if name not in PUBLIC:
        raise AttributeError(f"module 'dmquant' has no attribute {name!r}; it offers {', '.join(__all__)}")
    module, _, attribute = PUBLIC[name].partition(":")
    found = import_module(module)
    return getattr(found, attribute) if attribute else found


def __dir__() -> list[str]:
    return sorted(__all__)
