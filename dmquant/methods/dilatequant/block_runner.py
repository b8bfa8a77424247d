"""Runs one reconstruction unit of a denoiser alone. A unit is a block, or a quantized layer outside all blocks.

The inputs of a unit, skip connections and embeddings included, are recorded in a call of the whole network, so that this code
does not depend on the architecture.
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


class ModuleCall(NamedTuple):
    """Inputs and outputs of one call of a module, as leaves of a pytree."""

    inputs: list[Any]
    spec: TreeSpec
    outputs: list[Any]
    output_spec: TreeSpec


class UnitDone(Exception):
    """Stops a forward pass after the last module of a unit."""


def find_units(student: nn.Module, samples: Samples) -> list[Block]:
    """Returns the reconstruction units with quantized layers, in order of execution.

    Each quantized layer outside all blocks is a unit of its own.
    """
    blocks = find_blocks(student)
    inside = tuple(f"{module}." for block in blocks for module in block.modules)
    single = [Block(name, (name,)) for name in quantized_layers(student) if not f"{name}.".startswith(inside)]
    units = [unit for unit in (*blocks, *single) if any(quantized_layers(student.get_submodule(name)) for name in unit.modules)]
    by_first_module = {student.get_submodule(unit.modules[0]): unit for unit in units}
    order: dict[nn.Module, None] = {}
    with ExitStack() as hooks, torch.no_grad():
        for first in by_first_module:
            hooks.callback(first.register_forward_pre_hook(lambda module, args: order.setdefault(module)).remove)
        samples[:1].on(next(student.parameters()).device).call(student)
    return [by_first_module[first] for first in order]


@torch.no_grad()
def trace_unit(network: nn.Module, unit: Block, part: Samples, *, with_outputs: bool = True) -> list[ModuleCall]:
    """Runs the network on samples up to the end of the unit, and returns the calls of the unit's modules.

    Without outputs the last module does not run, and its call has no outputs. The samples must be on the network's device.
    """
    calls: list[ModuleCall] = []
    with ExitStack() as hooks:
        for name in unit.modules:
            module, is_last = network.get_submodule(name), name == unit.modules[-1]
            if is_last and not with_outputs:
                hook = module.register_forward_pre_hook(partial(_record_inputs, calls), with_kwargs=True)
            else:
                hook = module.register_forward_hook(partial(_record_call, calls, is_last), with_kwargs=True)
            hooks.callback(hook.remove)
        with suppress(UnitDone):
            part.call(network)
    return calls


def _record_call(
    calls: list[ModuleCall], is_last: bool, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> None:
    calls.append(ModuleCall(*tree_flatten((args, kwargs)), *tree_flatten(output)))
    if is_last:
        raise UnitDone


def _record_inputs(calls: list[ModuleCall], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    calls.append(ModuleCall(*tree_flatten((args, kwargs)), *tree_flatten(())))
    raise UnitDone


@dataclass(frozen=True)
class PerSample:
    """Marks an input or output tensor with one row per sample."""


@dataclass(frozen=True)
class PreviousOutput:
    """Marks an input that is an output of the module before."""

    index: int  # among the leaves of that output


class BlockRunner(nn.Module):
    """Runs the modules of a unit one after the other on recorded inputs.

    Calls with two and with three samples are compared: inputs whose length changes have one row per sample, all others are
    constants. Raises DmquantError if the unit cannot run alone.
    """

    def __init__(self, network: nn.Module, unit: Block, samples: Samples):
        super().__init__()
        self.parts = nn.ModuleList(network.get_submodule(name) for name in unit.modules)
        device = next(network.parameters()).device
        twice, thrice = (trace_unit(network, unit, samples[torch.zeros(n, dtype=torch.long)].on(device)) for n in (2, 3))
        self._calls = twice
        self._sources: list[list[Any]] = []
        before: list[Any] = []
        for one, other in zip(twice, thrice):
            self._sources.append([_find_source(*pair, before, unit.name) for pair in zip(one.inputs, other.inputs)])
            before = one.outputs
        if not all(any(isinstance(source, PreviousOutput) for source in sources) for sources in self._sources[1:]):
            raise DmquantError(f"the parts of {unit.name} do not follow each other; set scope=model")
        pairs = enumerate(zip(before, thrice[-1].outputs))
        self._outputs = [index for index, pair in pairs if isinstance(_find_source(*pair, [], unit.name), PerSample)]

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Returns the per-sample outputs of the last module, for inputs in the order of `inputs_from`."""
        rest = iter(inputs)
        outputs: list[Any] = []
        for part, call, sources in zip(self.parts, self._calls, self._sources):
            args, kwargs = tree_unflatten(list(_resolve(sources, rest, outputs)), call.spec)
            outputs = tree_flatten(part(*args, **kwargs))[0]
        return tuple(outputs[index] for index in self._outputs)

    def inputs_from(self, calls: Sequence[ModuleCall]) -> list[Tensor]:
        """Returns the per-sample inputs of traced calls."""
        pairs = (pair for call, sources in zip(calls, self._sources) for pair in zip(call.inputs, sources))
        return [leaf for leaf, source in pairs if isinstance(source, PerSample)]

    def outputs_from(self, calls: Sequence[ModuleCall]) -> list[Tensor]:
        """Returns the per-sample outputs of the last of traced calls."""
        return [calls[-1].outputs[index] for index in self._outputs]

    @contextmanager
    def returning(self, network: nn.Module, unit: Block, outputs: Sequence[Tensor]) -> Iterator[None]:
        """Inside the context, the unit's modules in a network do not run, and the last one returns these outputs.

        The modules before it return outputs of the right structure, which no other module reads.
        """
        last = list(self._calls[-1].outputs)
        for index, output in zip(self._outputs, outputs):
            last[index] = output
        leaves_by_module = [*(call.outputs for call in self._calls[:-1]), last]
        modules = [network.get_submodule(name) for name in unit.modules]
        try:
            for module, call, leaves in zip(modules, self._calls, leaves_by_module):
                module.forward = partial(_return_fixed, tree_unflatten(leaves, call.output_spec))
            yield
        finally:
            for module in modules:
                vars(module).pop("forward", None)


def _return_fixed(output: Any, *args: Any, **kwargs: Any) -> Any:
    return output


def _resolve(sources: Sequence[Any], inputs: Iterator[Tensor], before: Sequence[Any]) -> Iterator[Any]:
    """Yields the value of each input of a module: the next per-sample input, an output of the module before, or a constant."""
    for source in sources:
        if isinstance(source, PerSample):
            yield next(inputs)
        else:
            yield before[source.index] if isinstance(source, PreviousOutput) else source


def _find_source(two: Any, three: Any, before: Sequence[Any], name: str) -> Any:
    """Returns the source of an input from its values in calls with two and with three samples; a constant is returned itself."""
    if not isinstance(two, Tensor):
        return two
    for index, leaf in enumerate(before):
        if leaf is two:
            return PreviousOutput(index)
    if two.ndim and (len(two), len(three)) == (2, 3):
        return PerSample()
    if two.shape == three.shape:
        return two
    raise DmquantError(f"{name} reads a tensor that has no row per sample; set scope=model")
