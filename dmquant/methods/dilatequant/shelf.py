"""What finished blocks answered, kept so that they do not run again for the blocks after them."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

from torch import Tensor, nn

from dmquant.blocks import Block
from dmquant.methods.dilatequant.chain import Link


class Entry(NamedTuple):
    """Answers (N, ...) of a block of the student and of the teacher's, to the same samples."""

    block: Block
    link: Link
    ours: Sequence[Tensor]
    theirs: Sequence[Tensor]


class Shelf:
    """Blocks in order of execution, as many as there is room for; any others run."""

    def __init__(self, room_bytes: int):
        self._entries: list[Entry] = []
        self._room_bytes = room_bytes

    def has_room(self, answers: Sequence[Tensor]) -> bool:
        """Whether answers of this size fit, those of the student and those of the teacher."""
        return 2 * sum(answer.nbytes for answer in answers) <= self._room_bytes

    def add(self, entry: Entry) -> None:
        self._room_bytes -= 2 * sum(answer.nbytes for answer in entry.theirs)
        self._entries.append(entry)

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
