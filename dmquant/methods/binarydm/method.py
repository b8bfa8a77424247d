"""BinaryDM (Zheng et al., ICLR 2025): binary weights, trained with evolvable bases and low-rank representation mimicking."""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import nn

from dmquant.diffusion.blocks import find_blocks, find_ends
from dmquant.diffusion.trajectories import Samples
from dmquant.methods.base import Method, setting
from dmquant.methods.binarydm.basis_schedule import BasisSchedule, BinarizationWarmup, group_layers, set_num_bases
from dmquant.methods.binarydm.evolvable_basis import EvolvableBasis
from dmquant.methods.binarydm.low_rank_mimicking import LowRankMimicking, find_subspaces
from dmquant.nn.fake_quant_layers import quantized_layers
from dmquant.progress import Track
from dmquant.quantizers.timestep_clock import Clock
from dmquant.training.objectives import Objective
from dmquant.training.resume import Run


@dataclass(frozen=True, kw_only=True)
class BinaryDM(Method):
    """LSQ with binary weights, two bases that become one (EBB, eq. 5-9), and a loss on block features (LRM, eq. 11-15).

    Differs from the paper: the penalty takes absolute values; attention products stay in float by default.
    """

    name: ClassVar[str] = "binarydm"

    weight_bits: int = setting(1, "bits per weight: 1")
    act_bits: int = setting(4, "bits per activation, 2 to 8; 32 keeps activations in float")
    learning_rate: float = setting(1e-3, "AdamW rate of weights, biases and norms, decaying to zero along a cosine")
    basis: Literal["evolvable", "multi", "single"] = setting(
        "evolvable", "bases of weights in the first and last blocks: two that become one (EBB), always two (LMB), or always one"
    )
    switch: float = setting(0.5, "fraction of the run after which weights have one basis")
    basis_penalty: float = setting(3.0, "weight of the mean second scale in the loss")
    mimic_weight: float = setting(0.1, "weight of the distance to the teacher's block features in the loss (LRM); 0: none")
    mimic_compression: int = setting(4, "channels per principal direction in which features are compared")
    warmup: int = setting(0, "steps after which the next group of blocks is binarized, from the middle outwards; 0: all at once")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weight_bits != 1:
            raise ValueError(f"weight_bits must be 1 for binarydm, got {self.weight_bits}; lsq has 1 to 8")
        if not 0 <= self.switch <= 1:
            raise ValueError(f"switch must be 0 to 1, got {self.switch}")
        for name in ("basis_penalty", "mimic_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be 0 or more, got {getattr(self, name)}")
        if self.mimic_compression < 1:
            raise ValueError(f"mimic_compression must be at least 1, got {self.mimic_compression}")
        if self.warmup < 0:
            raise ValueError(f"warmup must be 0 or more, got {self.warmup}")

    def plan(self, denoiser: nn.Module) -> dict[str, tuple[int, int]]:
        """Returns weight and activation bits by layer; with basis=multi, two bits for weights with two bases."""
        plan = super().plan(denoiser)
        if self.basis == "multi":
            plan |= {name: (2, plan[name][1]) for name in self.two_basis_layers(denoiser)}
        return plan

    def prepare(self, student: nn.Module, clock: Clock) -> None:
        """Swaps in LSQ's layers, and gives the weights in the first and last blocks two bases."""
        super().prepare(student, clock)
        layers = quantized_layers(student)
        for layer in (layers[name] for name in self.two_basis_layers(student) if name in layers):
            quantizer = EvolvableBasis(num_channels=len(layer.weight), ndim=layer.weight.ndim)
            layer.weight_quantizer = quantizer.to(layer.weight.device)

    def finetune(
        self, student: nn.Module, objective: Objective, *, teacher: nn.Module, samples: Samples, seed: int, run: Run, track: Track
    ) -> None:
        """Trains weights and grids together, with the basis schedule, the warm-up and the loss on features."""
        quantizers = [layer.weight_quantizer for layer in quantized_layers(student).values()]
        evolving = [q for q in quantizers if isinstance(q, EvolvableBasis)] if self.basis == "evolvable" else []
        if evolving:
            objective = BasisSchedule(objective, evolving, round(self.switch * self.max_steps), self.basis_penalty)
        if self.warmup:
            objective = BinarizationWarmup(objective, group_layers(student), self.warmup)
        if self.mimic_weight and self.max_steps:
            objective = self.add_mimicking(objective, student, teacher, samples)
        super().finetune(student, objective, teacher=teacher, samples=samples, seed=seed, run=run, track=track)
        set_num_bases(evolving, 1)

    def add_mimicking(self, objective: Objective, student: nn.Module, teacher: nn.Module, samples: Samples) -> LowRankMimicking:
        """Returns the objective with the added distance to the teacher's features."""
        blocks, few = find_blocks(teacher), samples.spread(self.calibration_samples)
        subspaces = find_subspaces(teacher, blocks, few, compression=self.mimic_compression, batch=self.batch)
        return LowRankMimicking(objective, subspaces, blocks=blocks, student=student, teacher=teacher, weight=self.mimic_weight)

    def two_basis_layers(self, denoiser: nn.Module) -> list[str]:
        """Returns the names of the layers that start with two bases: the binary ones in the first and last blocks."""
        if self.basis == "single":
            return []
        ends = tuple(f"{module}." for block in find_ends(denoiser) for module in block.modules)
        return [name for name, bits in super().plan(denoiser).items() if bits[0] == 1 and f"{name}.".startswith(ends)]
