"""What a time adds to the channels of residual blocks, kept: samplers come back to the same timesteps with every batch.

All blocks of a denoiser are given the same embedding of the time. What was kept for one is found once in a call, by its bytes,
and hangs on the tensor from then on. Whatever else a row is made of is looked at each time.
"""

from collections.abc import Callable
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from dmquant.kernels.blocked import BlockedCodes
from dmquant.quantizers.temporal import TemporalGrid

MOST = 256  # embeddings of a denoiser: schedules of more timesteps are seldom walked twice
ROWS = "_dmquant_rows"  # on an embedding: what was kept for it


class Kept:
    """A row (1, O) of a residual block, and what it was made of beside the embedding."""

    __slots__ = ("row", "biases", "holder", "weight", "grid", "place", "hooks")

    def __init__(self, block: nn.Module, row: Tensor):
        layer, conv, activation = (block._modules[name] for name in ("time_emb_proj", "conv1", "nonlinearity"))
        biases = [(part._parameters, part._parameters["bias"]) for part in (layer, conv)]
        self.biases = [(holder, bias, version_of(bias)) for holder, bias in biases]
        self.row, self.holder = row.clone(), vars(layer._modules["weight"])
        self.weight = self.holder.get("blocked")  # made anew when codes are loaded or moved
        grid = layer._modules["input"]
        self.grid = grid if isinstance(grid, TemporalGrid) else None
        self.place = None if self.grid is None else grid.clock.shared()
        self.hooks = [hooks for part in (layer, activation) for hooks in (part._forward_hooks, part._forward_pre_hooks)]

    def holds(self) -> bool:
        for holder, bias, version in self.biases:
            if holder["bias"] is not bias or version_of(bias) != version:
                return False
        is_there = self.grid is None or self.place is not None and self.place == self.grid.clock.shared()
        return is_there and self.weight is not None and self.weight is self.holder["blocked"] and not any(self.hooks)


Rows = WeakKeyDictionary[nn.Module, Kept]  # by block
KEPT: WeakKeyDictionary[nn.Module, dict[bytes, Rows]] = WeakKeyDictionary()  # by the first block that asks


def recall(block: nn.Module, embedding: Tensor, compute: Callable[[], Tensor]) -> Tensor:
    """What `compute` makes of an embedding (N, C) for a residual block: (N, O), or (1, O) where all samples have the same.

    It is computed anew once layers of the block were written to, moved, loaded or replaced, and while somebody watches them.
    """
    if torch.compiler.is_compiling():
        return compute()
    version, rows = vars(embedding).get(ROWS, (None, None))
    if version != version_of(embedding):
        rows = find(block, embedding)
        setattr(embedding, ROWS, (version_of(embedding), rows))
    kept = None if rows is None else rows.get(block)
    if kept is not None and kept.holds():
        return kept.row
    out = compute()
    if rows is None or not isinstance(block._modules["time_emb_proj"]._modules.get("weight"), BlockedCodes):
        return out
    rows[block] = kept = Kept(block, out[:1])
    return kept.row if kept.holds() else out


def find(block: nn.Module, embedding: Tensor) -> Rows | None:
    """What was kept for an embedding, by block; None if samples have embeddings of their own, or on other devices than a CPU."""
    if embedding.device.type != "cpu" or embedding.dim() != 2 or not bool((embedding == embedding[:1]).all()):
        return None
    name, moments = embedding[:1].detach().numpy().tobytes(), KEPT.setdefault(block, {})
    return moments.setdefault(name, Rows()) if name in moments or len(moments) < MOST else Rows()


def version_of(tensor: Tensor | None) -> int:
    """How often a tensor was written to, as far as torch counts: not for what was made in inference mode."""
    return 0 if tensor is None or tensor.is_inference() else tensor._version
