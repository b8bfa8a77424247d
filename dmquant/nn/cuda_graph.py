"""Records a denoiser's call as a CUDA graph and replays it: one launch instead of about a thousand from Python.

State: `capture` sets the attribute `forward` of the denoiser, `release` deletes it; nothing is captured unless the user asks for
it (cuda_graph=True). A wrapper module would change the denoiser's class, its config and the names in its state dict, which
diffusers reads; a hook cannot replace a call. Hooks of the denoiser run before the replay, so the clock has read the timestep.

Before a replay these are copied into the tensors that were recorded: all tensor arguments, the timestep (as a tensor even if it
is given as a number), and the steps of the clock, by which temporal grids select their rows. There is a recording for each set of
shapes, dtypes and other arguments, at most MAX_RECORDINGS; each holds the memory of a call.

Calls with gradients, in training mode, or with inputs that are not on the GPU run without a graph. Weights that are moved or
loaded invalidate the recordings, except in layers whose input is split. Hooks on inner modules are not called by a replay. Tests
use a graph in Python; the recording itself has not been run on a GPU.
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

MAX_RECORDINGS = 8  # the oldest is freed first
WARM_UPS = 3  # calls before a recording, in which kernels are chosen and compiled and libraries allocate workspaces


class Graph(Protocol):
    """Records the kernels that a call launches, and launches them again. Outputs are written into the same memory."""

    device_type: str

    def record(self, call: Callable[[], Any]) -> Any: ...

    def replay(self) -> None: ...


class CudaGraph:
    """A Graph by torch.cuda.CUDAGraph."""

    device_type = "cuda"

    def record(self, call: Callable[[], Any]) -> Any:
        """Returns the output tensors, whose values are computed by the first replay."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                call()
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            return call()

    def replay(self) -> None:
        self.graph.replay()


@dataclass(frozen=True)
class Recording:
    """A recorded call: its graph, the tensors it reads, and its outputs."""

    graph: Graph
    inputs: list[Tensor]
    outputs: Any  # return value of the call; every replay overwrites its tensors


class CapturedForward:
    """Replaces a denoiser's forward: replays a recording where there is one. Copies and pickles have no recordings."""

    def __init__(self, denoiser: nn.Module, graph_type: type[Graph]):
        self.denoiser, self.graph_type = denoiser, graph_type
        self.recordings: dict[tuple, Recording | None] = {}  # None: recording failed
        self.weights: list[tuple[Any, Any]] = []  # holder of a weight, and the weight when it was recorded

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
        for recorded, given in zip(recording.inputs, filter(is_tensor, leaves)):
            recorded.copy_(given)
        recording.graph.replay()
        return tree_map(lambda leaf: leaf.clone() if is_tensor(leaf) else leaf, recording.outputs)

    def _key(self, leaves: list[Any], structure: TreeSpec) -> tuple | None:
        """Returns the key of the recording for these arguments; None if the call cannot be recorded."""
        device = next(self.denoiser.parameters()).device
        is_free = not (torch.is_grad_enabled() or self.denoiser.training or torch.compiler.is_compiling())
        if not is_free or device.type != self.graph_type.device_type or not all(can_be_copied(leaf, device) for leaf in leaves):
            return None
        return device, structure, *(describe(leaf) for leaf in leaves)

    def _has_other_weights(self) -> bool:
        return any(address(holder) != address(held) for holder, held in self.weights)

    def _record(self, leaves: list[Any], structure: TreeSpec) -> Recording | None:
        device = next(self.denoiser.parameters()).device
        with torch.inference_mode(False):  # inference tensors could not be written to outside of inference mode
            ours = [torch.empty_like(leaf, device=device).copy_(leaf) if is_tensor(leaf) else leaf for leaf in leaves]
        before, graph = clock_state(self.denoiser), self.graph_type()

        def call() -> Any:
            args, kwargs, state = tree_unflatten(ours, structure)
            set_clock(self.denoiser, state)
            return self.__wrapped__(*args, **kwargs)

        try:
            outputs = graph.record(call)
        except RuntimeError as error:  # the call does something that a capture does not allow
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            warnings.warn(f"the denoiser runs without a CUDA graph: {reason}", RuntimeWarning, stacklevel=3)
            return None
        finally:
            set_clock(self.denoiser, before)
        while len(self.recordings) >= MAX_RECORDINGS:
            self.recordings.pop(next(iter(self.recordings)))
        self.weights = weights_of(self.denoiser)
        return Recording(graph, [leaf for leaf in ours if is_tensor(leaf)], outputs)


def capture(denoiser: nn.Module, graph_type: type[Graph] = CudaGraph) -> None:
    """Records and replays a denoiser's calls from now on. Raises ValueError if its forward has been replaced already."""
    if "forward" in vars(denoiser):
        raise ValueError(f"the forward of this {type(denoiser).__name__} has been replaced already, by offloading or by a graph")
    denoiser.forward = CapturedForward(denoiser, graph_type)


def release(denoiser: nn.Module) -> None:
    """Undoes `capture` and frees the memory of the graphs."""
    if isinstance(vars(denoiser).get("forward"), CapturedForward):
        del denoiser.forward


def with_timestep_tensor(forward: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Returns the arguments of a call with the timestep as a tensor, since a recording would fix a number."""
    bound = inspect.signature(forward).bind(*args, **kwargs)
    name = find_timestep_name(bound.arguments)
    bound.arguments[name] = torch.as_tensor(bound.arguments[name])
    return bound.args, bound.kwargs


def clock_state(denoiser: nn.Module) -> Any:
    """Returns the state of the clock that temporal grids read; None without a clock."""
    clock = getattr(denoiser, "clock", None)
    return (clock.step, clock.neighbours) if isinstance(clock, Clock) else None


def set_clock(denoiser: nn.Module, state: Any) -> None:
    """Sets the state that `clock_state` returns."""
    if state is not None:
        clock = find_clock(denoiser)
        clock.step, clock.neighbours = state


def weights_of(denoiser: nn.Module) -> list[tuple[Any, Any]]:
    """Returns holders of weights with their weights. The references keep their memory from being reused at the same address."""
    packed = [module for module in denoiser.modules() if isinstance(module, BlockedCodes)]
    return [(parameter, parameter.data) for parameter in denoiser.parameters()] + [(module, module.blocked) for module in packed]


def address(holder: Any) -> Any:
    """Returns the identity of a weight: its memory address, or the id of its blocked codes."""
    if is_tensor(holder):
        return holder.data_ptr()
    return id(holder.blocked if isinstance(holder, BlockedCodes) else holder)


def is_tensor(leaf: Any) -> bool:
    return isinstance(leaf, Tensor)


def can_be_copied(leaf: Any, device: torch.device) -> bool:
    """Returns whether an argument can be copied into a recording, or compared. Timesteps may be on the CPU."""
    return leaf.device == device or leaf.dim() < 2 if is_tensor(leaf) else leaf.__hash__ is not None


def describe(leaf: Any) -> Any:
    """Returns the part of an argument that a recording depends on."""
    return (leaf.shape, leaf.stride(), leaf.dtype) if is_tensor(leaf) else (type(leaf), leaf)
