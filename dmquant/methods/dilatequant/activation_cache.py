"""Outputs of trained blocks, cached on disk so that these blocks do not run again while later blocks are trained."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

from torch import Tensor, nn

from dmquant.diffusion.blocks import Block
from dmquant.methods.dilatequant.block_runner import BlockRunner
from dmquant.methods.dilatequant.disk_tensor import DiskTensor, read_index, write_index


class CachedBlock(NamedTuple):
    """Outputs (N, ...) of one block for all samples: the student's and the teacher's."""

    block: Block
    runner: BlockRunner
    ours: Sequence[DiskTensor]
    theirs: Sequence[DiskTensor]


class ActivationCache:
    """Outputs of blocks in order of execution, up to a size limit. Blocks that do not fit are run again."""

    def __init__(self, folder: Path, max_bytes: int):
        self.folder = folder
        self._blocks: list[CachedBlock] = []
        self._free_bytes = max_bytes

    def fits(self, outputs: Sequence[DiskTensor]) -> bool:
        """Returns whether outputs of this size fit twice: the student's and the teacher's."""
        return 2 * sum(output.nbytes for output in outputs) <= self._free_bytes

    def add(self, cached: CachedBlock) -> None:
        """Adds a block, and writes its index so that a resumed run can reload it."""
        write_index(self._index(cached.block), {"ours": cached.ours, "theirs": cached.theirs})
        self._register(cached)

    def reload(self, block: Block, runner: BlockRunner) -> bool:
        """Adds a block that an earlier process cached. Returns False if there is none."""
        if not self._index(block).exists():
            return False
        self._register(CachedBlock(block, runner, **read_index(self._index(block))))
        return True

    def discard(self, block: Block) -> None:
        """Deletes the index of a block that an earlier process cached, because the block is trained again."""
        self._index(block).unlink(missing_ok=True)

    @contextmanager
    def replaying(self, network: nn.Module, index: Tensor, *, is_teacher: bool) -> Iterator[None]:
        """Inside the context, cached blocks of the network return their outputs for the samples `index` (K,) and do not run."""
        device = next(network.parameters()).device
        with ExitStack() as stack:
            for cached in self._blocks:
                # indexing copies: the network may change the outputs in place
                outputs = [output[index].to(device) for output in (cached.theirs if is_teacher else cached.ours)]
                stack.enter_context(cached.runner.returning(network, cached.block, outputs))
            yield

    def _register(self, cached: CachedBlock) -> None:
        self._free_bytes -= 2 * sum(output.nbytes for output in cached.theirs)
        self._blocks.append(cached)

    def _index(self, block: Block) -> Path:
        return self.folder / f"{block.name}.json"
