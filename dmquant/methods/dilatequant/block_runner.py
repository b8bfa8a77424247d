"""A denoiser as a chain of links, each of which can run alone: the blocks, and the layers between them, in order of execution.

What a link reads is taken from a call of the whole network, skips and embeddings included, so that no architecture is known here.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from dmquant.diffusion.blocks import Block, find_blocks
from dmquant.diffusion.trajectories import Samples
from dmquant.errors import DmquantError
from dmquant.nn.fake_quant_layers import quantized_layers


class Call(NamedTuple):
    """One call of a module: everything that it read and answered, as leaves of a tree."""

    inputs: list[Any]
    spec: TreeSpec
    outputs: list[Any]
    output_spec: TreeSpec


class Reached(Exception):
    """The end of the link: what comes after it need not run."""


def find_links(student: nn.Module, samples: Samples) -> list[Block]:
    """Blocks, and quantized layers outside them each by itself, in the order in which they are called; nothing without layers."""
    blocks = find_blocks(student)
    inside = tuple(f"{module}." for block in blocks for module in block.modules)
    loose = [Block(name, (name,)) for name in quantized_layers(student) if not f"{name}.".startswith(inside)]
    links = [link for link in (*blocks, *loose) if any(quantized_layers(student.get_submodule(name)) for name in link.modules)]
    by_head = {student.get_submodule(link.modules[0]): link for link in links}
    order: dict[nn.Module, None] = {}
    with ExitStack() as hooks, torch.no_grad():
        for head in by_head:
            hooks.callback(head.register_forward_pre_hook(lambda module, args: order.setdefault(module)).remove)
        samples[:1].on(next(student.parameters()).device).call(student)
    return [by_head[head] for head in order]


@torch.no_grad()
def trace(network: nn.Module, link: Block, part: Samples, *, with_answers: bool = True) -> list[Call]:
    """The calls of the link's modules when the network runs on samples that are on its device. What follows does not run.

    Without answers the last module does not run either, and has none.
    """
    calls: list[Call] = []
    with ExitStack() as hooks:
        for name in link.modules:
            module, is_last = network.get_submodule(name), name == link.modules[-1]
            if is_last and not with_answers:
                hook = module.register_forward_pre_hook(partial(_halt, calls), with_kwargs=True)
            else:
                hook = module.register_forward_hook(partial(_note, calls, is_last), with_kwargs=True)
            hooks.callback(hook.remove)
        with suppress(Reached):
            part.call(network)
    return calls


def _note(
    calls: list[Call], is_last: bool, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> None:
    calls.append(Call(*tree_flatten((args, kwargs)), *tree_flatten(output)))
    if is_last:
        raise Reached


def _halt(calls: list[Call], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    calls.append(Call(*tree_flatten((args, kwargs)), *tree_flatten(())))
    raise Reached


@dataclass(frozen=True)
class Row:
    """Place of an input of which every sample has its own."""


@dataclass(frozen=True)
class Live:
    """Place of an input that the module before has just answered."""

    index: int  # among the leaves of its answer


class Link(nn.Module):
    """The modules of a link, run one after the other on rows of what they read in the whole network.

    Two calls of different batches tell which inputs have a row per sample; the others are the same in all calls.
    """

    def __init__(self, network: nn.Module, link: Block, samples: Samples):
        super().__init__()
        self.parts = nn.ModuleList(network.get_submodule(name) for name in link.modules)
        device = next(network.parameters()).device
        twice, thrice = (trace(network, link, samples[torch.zeros(n, dtype=torch.long)].on(device)) for n in (2, 3))
        self._calls = twice
        self._places: list[list[Any]] = []
        before: list[Any] = []
        for one, other in zip(twice, thrice):
            self._places.append([_place(*pair, before, link.name) for pair in zip(one.inputs, other.inputs)])
            before = one.outputs
        if not all(any(isinstance(place, Live) for place in places) for places in self._places[1:]):
            raise DmquantError(f"the parts of {link.name} do not follow each other; set scope=model")
        self._answers = [
            index for index, pair in enumerate(zip(before, thrice[-1].outputs)) if isinstance(_place(*pair, [], link.name), Row)
        ]

    def forward(self, *rows: Tensor) -> tuple[Tensor, ...]:
        """What the last module answers, tensors with a row per sample, to rows in the order of `rows_of`."""
        rest = iter(rows)
        outputs: list[Any] = []
        for part, call, places in zip(self.parts, self._calls, self._places):
            args, kwargs = tree_unflatten(list(_fill(places, rest, outputs)), call.spec)
            outputs = tree_flatten(part(*args, **kwargs))[0]
        return tuple(outputs[index] for index in self._answers)

    def rows_of(self, calls: Sequence[Call]) -> list[Tensor]:
        """The inputs of traced calls that have a row per sample."""
        pairs = (pair for call, places in zip(calls, self._places) for pair in zip(call.inputs, places))
        return [leaf for leaf, place in pairs if isinstance(place, Row)]

    def answers_of(self, calls: Sequence[Call]) -> list[Tensor]:
        """What the last of traced calls answered."""
        return [calls[-1].outputs[index] for index in self._answers]

    @contextmanager
    def answering(self, network: nn.Module, link: Block, answers: Sequence[Tensor]) -> Iterator[None]:
        """While inside, the modules of this link in a network do not run: the last one gives these answers.

        What those before it give is of the right form, and nobody reads it.
        """
        last = list(self._calls[-1].outputs)
        for index, answer in zip(self._answers, answers):
            last[index] = answer
        outputs = [*(call.outputs for call in self._calls[:-1]), last]
        modules = [network.get_submodule(name) for name in link.modules]
        try:
            for module, call, leaves in zip(modules, self._calls, outputs):
                module.forward = partial(_give, tree_unflatten(leaves, call.output_spec))
            yield
        finally:
            for module in modules:
                vars(module).pop("forward", None)


def _give(answer: Any, *args: Any, **kwargs: Any) -> Any:
    return answer


def _fill(places: Sequence[Any], rows: Iterator[Tensor], before: Sequence[Any]) -> Iterator[Any]:
    for place in places:
        if isinstance(place, Row):
            yield next(rows)
        else:
            yield before[place.index] if isinstance(place, Live) else place


def _place(two: Any, three: Any, before: Sequence[Any], name: str) -> Any:
    """Where an input comes from, by what it was in a call of two samples and in one of three; its value if it is the same."""
    if not isinstance(two, Tensor):
        return two
    for index, leaf in enumerate(before):
        if leaf is two:
            return Live(index)
    if two.ndim and (len(two), len(three)) == (2, 3):
        return Row()
    if two.shape == three.shape:
        return two
    raise DmquantError(f"{name} reads a tensor that has no row per sample; set scope=model")
