"""A denoiser's call as a CUDA graph: what was a thousand launches from Python is one.

`capture` puts itself before a denoiser's forward and `release` takes itself away; hooks of the denoiser run as before, so the
clock has read the timestep when a recording is replayed. What changes from call to call is copied into the tensors that were
recorded: all tensor arguments, the timestep as a tensor even where it came as a number, and the steps of the clock, by which
temporal grids find their rows. Each set of shapes, dtypes and other arguments has a recording of its own.

What cannot be recorded runs as it is: gradients, training mode, inputs that are not on the GPU. Weights that were moved or loaded
anew are noticed, except loaded into layers whose input is split. Hooks on layers inside are not called again. Never run on a GPU:
all but the recording itself is tested without.
"""

import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map, tree_unflatten

from dmquant.nn.packed_weight import BlockedCodes
from dmquant.quantizers.timestep_clock import Clock, find_clock, find_timestep_name

MAX_RECORDINGS = 8  # each holds the memory of a call
WARM_UPS = 3  # calls before a recording: kernels are chosen and compiled, libraries get their workspaces


class Graph(Protocol):
    """Something that records what a call launches, and launches it again. The outputs are written into the same memory."""

    device_type: str

    def record(self, run: Callable[[], Any]) -> Any: ...

    def replay(self) -> None: ...


class CudaGraph:
    device_type = "cuda"

    def record(self, run: Callable[[], Any]) -> Any:
        """The outputs, not yet computed."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                run()
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            return run()

    def replay(self) -> None:
        self.graph.replay()


@dataclass(frozen=True)
class Recording:
    graph: Graph
    inputs: list[Tensor]
    outputs: Any  # what the call gives, around tensors that every replay overwrites


class CapturedForward:
    """Stands in for a denoiser's forward. Copies and pickles have no recordings."""

    def __init__(self, denoiser: nn.Module, kind: type[Graph]):
        self.denoiser, self.kind = denoiser, kind
        self.recordings: dict[tuple, Recording | None] = {}  # None: it could not be recorded
        self.weights: list[tuple[Any, Any]] = []  # who holds a weight, and what it held when it was recorded

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        return type(self.denoiser).forward.__get__(self.denoiser)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "recordings": {}, "weights": []}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = with_timestep_tensor(self.__wrapped__, args, kwargs)
        leaves, structure = tree_flatten((args, kwargs, clock_state(self.denoiser)))
        key = self._key(leaves, structure)
        if key is None:
            return self.__wrapped__(*args, **kwargs)
        if self._has_other_weights():
            self.recordings.clear()
        if key not in self.recordings:
            self.recordings[key] = self._record(leaves, structure)
        recording = self.recordings[key]
        if recording is None:
            return self.__wrapped__(*args, **kwargs)
        for ours, given in zip(recording.inputs, filter(is_tensor, leaves)):
            ours.copy_(given)
        recording.graph.replay()
        return tree_map(lambda leaf: leaf.clone() if is_tensor(leaf) else leaf, recording.outputs)

    def _key(self, leaves: list[Any], structure: TreeSpec) -> tuple | None:
        """What a recording is valid for; None where there can be none."""
        device = next(self.denoiser.parameters()).device
        is_free = not (torch.is_grad_enabled() or self.denoiser.training or torch.compiler.is_compiling())
        if not is_free or device.type != self.kind.device_type or not all(can_be_copied(leaf, device) for leaf in leaves):
            return None
        return device, structure, *(describe(leaf) for leaf in leaves)

    def _has_other_weights(self) -> bool:
        return any(address(holder) != address(held) for holder, held in self.weights)

    def _record(self, leaves: list[Any], structure: TreeSpec) -> Recording | None:
        device = next(self.denoiser.parameters()).device
        with torch.inference_mode(False):  # its tensors could not be written to outside
            ours = [torch.empty_like(leaf, device=device).copy_(leaf) if is_tensor(leaf) else leaf for leaf in leaves]
        before, graph = clock_state(self.denoiser), self.kind()

        def run() -> Any:
            args, kwargs, state = tree_unflatten(ours, structure)
            set_clock(self.denoiser, state)
            return self.__wrapped__(*args, **kwargs)

        try:
            outputs = graph.record(run)
        except RuntimeError as error:  # whatever a capture does not allow
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            warnings.warn(f"the denoiser runs without a CUDA graph: {reason}", RuntimeWarning, stacklevel=3)
            return None
        finally:
            set_clock(self.denoiser, before)
        while len(self.recordings) >= MAX_RECORDINGS:
            self.recordings.pop(next(iter(self.recordings)))
        self.weights = weights_of(self.denoiser)
        return Recording(graph, [leaf for leaf in ours if is_tensor(leaf)], outputs)


def capture(denoiser: nn.Module, kind: type[Graph] = CudaGraph) -> None:
    """Makes a denoiser's calls replays of CUDA graphs, where they can be."""
    if "forward" in vars(denoiser):
        raise ValueError(f"the forward of this {type(denoiser).__name__} was replaced already, by offloading or a graph")
    denoiser.forward = CapturedForward(denoiser, kind)


def release(denoiser: nn.Module) -> None:
    """Makes them calls again, and frees what the graphs hold."""
    if isinstance(vars(denoiser).get("forward"), CapturedForward):
        del denoiser.forward


def with_timestep_tensor(forward: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """The arguments of a denoiser's call, its timestep a tensor: a number would be part of what is recorded."""
    bound = inspect.signature(forward).bind(*args, **kwargs)
    name = find_timestep_name(bound.arguments)
    bound.arguments[name] = torch.as_tensor(bound.arguments[name])
    return bound.args, bound.kwargs


def clock_state(denoiser: nn.Module) -> Any:
    """What temporal grids read of the call that is running."""
    clock = getattr(denoiser, "clock", None)
    return (clock.step, clock.neighbours) if isinstance(clock, Clock) else None


def set_clock(denoiser: nn.Module, state: Any) -> None:
    if state is not None:
        clock = find_clock(denoiser)
        clock.step, clock.neighbours = state


def weights_of(denoiser: nn.Module) -> list[tuple[Any, Any]]:
    """Holders of weights and what they hold. Held on to, so that nothing else comes to lie where it was."""
    packed = [module for module in denoiser.modules() if isinstance(module, BlockedCodes)]
    return [(parameter, parameter.data) for parameter in denoiser.parameters()] + [(module, module.blocked) for module in packed]


def address(holder: Any) -> Any:
    """Where a weight is."""
    if is_tensor(holder):
        return holder.data_ptr()
    return id(holder.blocked if isinstance(holder, BlockedCodes) else holder)


def is_tensor(leaf: Any) -> bool:
    return isinstance(leaf, Tensor)


def can_be_copied(leaf: Any, device: torch.device) -> bool:
    """Whether an argument can be part of a recording. Timesteps may come from the CPU."""
    return leaf.device == device or leaf.dim() < 2 if is_tensor(leaf) else leaf.__hash__ is not None


def describe(leaf: Any) -> Any:
    return (leaf.shape, leaf.stride(), leaf.dtype) if is_tensor(leaf) else (type(leaf), leaf)
