"""Low-rank Representation Mimicking (LRM) of BinaryDM: a loss on block features in their principal directions."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dmquant.diffusion.blocks import Block
from dmquant.diffusion.trajectories import Samples
from dmquant.training.objectives import Objective


class PrincipalSubspaces(nn.Module):
    """Holds, for each block, an orthonormal basis (C, k) of the teacher's principal feature directions as a buffer."""

    def __init__(self, bases: Sequence[Tensor]):
        super().__init__()
        self.count = len(bases)
        for index, basis in enumerate(bases):
            self.register_buffer(f"basis_{index}", basis)

    def forward(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        """Returns the mean over blocks of the mean squared distance between projected features. BinaryDM, eq. 14-15."""
        bases = [self.get_buffer(f"basis_{index}") for index in range(self.count)]
        distances = [
            ((flatten_channels(ours).float() - flatten_channels(theirs).float()) @ basis).square().mean()
            for ours, theirs, basis in zip(student, teacher, bases, strict=True)
        ]
        return torch.stack(distances).mean()


class LowRankMimicking:
    """Objective that adds weight * distance of the block features to the teacher's. Its state are the bases."""

    def __init__(
        self, objective: Objective, subspaces: PrincipalSubspaces, *, blocks: Sequence[Block], student: nn.Module,
        teacher: nn.Module, weight: float,
    ):  # fmt: skip
        self._objective, self._subspaces, self._weight = objective, subspaces, weight
        self._blocks, self._student, self._teacher = blocks, student, teacher

    def loss(self, student: nn.Module, batch: int, *, step: int, generator: torch.Generator, device: torch.device) -> Tensor:
        # `student` may be wrapped for distributed training; hooks are set on the network itself
        with capture_features(self._student, self._blocks) as ours, capture_call(self._student) as call:
            loss = self._objective.loss(student, batch, step=step, generator=generator, device=device)
        with torch.no_grad(), capture_features(self._teacher, self._blocks) as theirs:
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
) -> PrincipalSubspaces:
    """Returns the C / compression principal directions of the teacher's features over the samples, for each block.

    The covariance is not centred, as in BinaryDM, eq. 11. Directions are over channels; the public code takes image columns.
    """
    moments: dict[str, Tensor] = {}
    device = next(teacher.parameters()).device
    for part in samples.split(batch):
        with capture_features(teacher, blocks) as features:
            part.on(device).call(teacher)
        for name, feature in features.items():
            rows = flatten_channels(feature).float()
            moments[name] = moments.get(name, 0) + (rows.T @ rows).double()
    return PrincipalSubspaces([principal_directions(moments[block.name], compression) for block in blocks])


def principal_directions(moment: Tensor, compression: int) -> Tensor:
    """Returns the eigenvectors (C, max(1, round(C / compression))) of a second moment (C, C) with the largest eigenvalues."""
    count = max(1, round(len(moment) / compression))
    vectors = torch.linalg.eigh(moment.cpu()).eigenvectors  # ascending; on the CPU, where the result is reproducible
    return vectors[:, -count:].flip(1).float().to(moment.device)


def flatten_channels(feature: Tensor) -> Tensor:
    """Reshapes features (B, C, H, W) or (B, N, C) to rows of channels (B H W, C) or (B N, C)."""
    return (feature.permute(0, 2, 3, 1) if feature.ndim == 4 else feature).flatten(0, -2)


@contextmanager
def capture_features(network: nn.Module, blocks: Sequence[Block]) -> Iterator[dict[str, Tensor]]:
    """Inside the context, records the output of each block by name."""
    features: dict[str, Tensor] = {}
    with ExitStack() as stack:
        for block in blocks:
            module = network.get_submodule(block.modules[-1])
            stack.callback(module.register_forward_hook(partial(_record_output, features, block.name)).remove)
        yield features


@contextmanager
def capture_call(network: nn.Module) -> Iterator[dict[str, Any]]:
    """Inside the context, records the arguments of the network's last call."""
    call: dict[str, Any] = {}
    hook = network.register_forward_pre_hook(partial(_record_call, call), with_kwargs=True)
    try:
        yield call
    finally:
        hook.remove()


def _record_output(features: dict[str, Tensor], name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    # blocks with a text stream return (text, image), others (image,)
    features[name] = output if isinstance(output, Tensor) else [part for part in output if isinstance(part, Tensor)][-1]


def _record_call(call: dict[str, Any], network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    call.update(args=args, kwargs=kwargs)
