"""What finished blocks answered, kept on the disk so that they do not run again for the blocks after them."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

from torch import Tensor, nn

from dmquant.diffusion.blocks import Block
from dmquant.methods.dilatequant.block_runner import Link
from dmquant.methods.dilatequant.disk_tensor import Stack, read_index, write_index


class Entry(NamedTuple):
    """Answers (N, ...) of a block of the student and of the teacher's, to the same samples."""

    block: Block
    link: Link
    ours: Sequence[Stack]
    theirs: Sequence[Stack]


class Shelf:
    """Blocks in order of execution, as many as there is room for; any others run."""

    def __init__(self, folder: Path, room_bytes: int):
        self.folder = folder
        self._entries: list[Entry] = []
        self._room_bytes = room_bytes

    def has_room(self, answers: Sequence[Stack]) -> bool:
        """Whether answers of this size fit, those of the student and those of the teacher."""
        return 2 * sum(answer.nbytes for answer in answers) <= self._room_bytes

    def add(self, entry: Entry) -> None:
        write_index(self._index(entry.block), {"ours": entry.ours, "theirs": entry.theirs})
        self._put(entry)

    def recall(self, block: Block, link: Link) -> bool:
        """Whether an earlier process has put this block on the shelf; then it stands there again."""
        if not self._index(block).exists():
            return False
        self._put(Entry(block, link, **read_index(self._index(block))))
        return True

    def forget(self, block: Block) -> None:
        """What an earlier process kept of a block that is trained once more counts no longer."""
        self._index(block).unlink(missing_ok=True)

    @contextmanager
    def standing_in(self, network: nn.Module, index: Tensor, *, is_teacher: bool) -> Iterator[None]:
        """While inside, blocks on the shelf answer from it, for the samples of this index, instead of running."""
        device = next(network.parameters()).device
        with ExitStack() as stack:
            for entry in self._entries:
                # indexing copies: the network may write into what it is given
                answers = [answer[index].to(device) for answer in (entry.theirs if is_teacher else entry.ours)]
                stack.enter_context(entry.link.answering(network, entry.block, answers))
            yield

    def _put(self, entry: Entry) -> None:
        self._room_bytes -= 2 * sum(answer.nbytes for answer in entry.theirs)
        self._entries.append(entry)

    def _index(self, block: Block) -> Path:
        return self.folder / f"{block.name}.json"
