"""Low-rank Representation Mimicking: the student's block features follow the teacher's, in the directions that matter."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dmquant.diffusion.blocks import Block
from dmquant.diffusion.trajectories import Samples
from dmquant.training.objectives import Objective


class Subspaces(nn.Module):
    """For each block an orthonormal basis (C, k) of the teacher's principal feature directions: buffers, never trained."""

    def __init__(self, bases: Sequence[Tensor]):
        super().__init__()
        self.count = len(bases)
        for index, basis in enumerate(bases):
            self.register_buffer(f"basis_{index}", basis)

    def forward(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        """Mean over blocks of the mean squared distance of the projected features. BinaryDM, eq. 14-15."""
        bases = [self.get_buffer(f"basis_{index}") for index in range(self.count)]
        distances = [
            ((flatten(ours).float() - flatten(theirs).float()) @ basis).square().mean()
            for ours, theirs, basis in zip(student, teacher, bases, strict=True)
        ]
        return torch.stack(distances).mean()


class Mimicking:
    """An objective plus weight * distance of the block features to the teacher's. The bases are its state."""

    def __init__(
        self, objective: Objective, subspaces: Subspaces, *, blocks: Sequence[Block], student: nn.Module, teacher: nn.Module,
        weight: float,
    ):  # fmt: skip
        self._objective, self._subspaces, self._weight = objective, subspaces, weight
        self._blocks, self._student, self._teacher = blocks, student, teacher

    def loss(
        self, student: nn.Module, batch: int, *, step: int, generator: torch.Generator, device: torch.device
    ) -> Tensor:
        # `student` may be wrapped for several processes; the hooks are on the network itself
        with watch(self._student, self._blocks) as ours, watch_call(self._student) as call:
            loss = self._objective.loss(student, batch, step=step, generator=generator, device=device)
        with torch.no_grad(), watch(self._teacher, self._blocks) as theirs:
            self._teacher(*call["args"], **call["kwargs"])
        features = [[seen[block.name] for block in self._blocks] for seen in (ours, theirs)]
        return loss + self._weight * self._subspaces(*features)

    def state_dict(self) -> dict[str, Any]:
        return self._subspaces.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._subspaces.load_state_dict(state_dict)


@torch.no_grad()
def find_subspaces(
    teacher: nn.Module, blocks: Sequence[Block], samples: Samples, *, compression: int, batch: int
) -> Subspaces:
    """Principal directions of the teacher's features over the samples, c / compression of the c channels of each block.

    Not centred, as the covariance of eq. 11 (BinaryDM); over channels, where the public code takes the image's columns.
    """
    moments: dict[str, Tensor] = {}
    device = next(teacher.parameters()).device
    for part in samples.split(batch):
        with watch(teacher, blocks) as features:
            part.on(device).call(teacher)
        for name, feature in features.items():
            rows = flatten(feature).float()
            moments[name] = moments.get(name, 0) + (rows.T @ rows).double()
    return Subspaces([principal_directions(moments[block.name], compression) for block in blocks])


def principal_directions(moment: Tensor, compression: int) -> Tensor:
    """The eigenvectors (C, max(1, round(C / compression))) of a second moment (C, C) with the largest eigenvalues."""
    count = max(1, round(len(moment) / compression))
    vectors = torch.linalg.eigh(moment.cpu()).eigenvectors  # ascending; on the CPU, where the result is reproducible
    return vectors[:, -count:].flip(1).float().to(moment.device)


def flatten(feature: Tensor) -> Tensor:
    """Features as rows of channels: (B, C, H, W) or (B, N, C) -> (B H W or B N, C)."""
    return (feature.permute(0, 2, 3, 1) if feature.ndim == 4 else feature).flatten(0, -2)


@contextmanager
def watch(network: nn.Module, blocks: Sequence[Block]) -> Iterator[dict[str, Tensor]]:
    """Collects the output of each block while inside, by the block's name."""
    features: dict[str, Tensor] = {}
    with ExitStack() as stack:
        for block in blocks:
            module = network.get_submodule(block.modules[-1])
            stack.callback(module.register_forward_hook(partial(_note_output, features, block.name)).remove)
        yield features


@contextmanager
def watch_call(network: nn.Module) -> Iterator[dict[str, Any]]:
    """Keeps the arguments of the network's call while inside."""
    call: dict[str, Any] = {}
    hook = network.register_forward_pre_hook(partial(_note_call, call), with_kwargs=True)
    try:
        yield call
    finally:
        hook.remove()


def _note_output(features: dict[str, Tensor], name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    # blocks with a text stream answer (text, image), others (image,)
    features[name] = output if isinstance(output, Tensor) else [part for part in output if isinstance(part, Tensor)][-1]


def _note_call(call: dict[str, Any], network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    call.update(args=args, kwargs=kwargs)
