"""Tests that every method must pass: its settings, its determinism, the law, and what its plan promises of the file."""

import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
from torch import Tensor, nn

from dmquant import methods
from dmquant.checkpoint import serialization
from dmquant.diffusion.pipeline import find_target
from dmquant.diffusion.trajectories import Samples, record
from dmquant.errors import InputError
from dmquant.evaluation.cost import measure_cost
from dmquant.methods.base import Method
from dmquant.nn.fake_quant_layers import quantized_layers
from dmquant.progress import plain
from dmquant.quantization import make_student, plan_scheme, quantize
from dmquant.quantizers import uniform
from dmquant.quantizers.base import Quantizer
from dmquant.quantizers.timestep_clock import Clock

TINY_UNET: dict[str, Any] = dict(
    sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, attention_head_dim=8,
    down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
)  # fmt: skip
QUICK = dict(trajectories=4, sampling_steps=3, calibration_samples=8, max_steps=4, batch=4)
BAD_SETTINGS = [
    ({"act_bit": 4}, "did you mean 'act_bits'"),
    ({"weight_bits": 9}, "weight_bits must be 1 to 8"),
    ({"act_bits": 1}, "act_bits must be 2 to 8"),
    ({"max_steps": "many"}, "max_steps"),
    ({"keep": "roof"}, "keep"),
    ({"learning_rate": -1}, "learning_rate must be 0 or more"),
    ({"eta": 1.5}, "eta must be in"),
    ({"quantizer_rate": "nan"}, "quantizer_rate must be 0 or more"),
    ({"clip_norm": "inf"}, "clip_norm must be above 0"),
    ({"batch": 0}, "batch must be at least 1"),
]


def make_tiny_pipeline() -> DDIMPipeline:
    """Returns a float pipeline of some 20 thousand random parameters that draws 8x8 RGB images."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return DDIMPipeline(UNet2DModel(**TINY_UNET), DDIMScheduler())


class MethodContract:
    """Tests of one method. A subclass names the method's class; its own name begins with Test.

        class TestMine(MethodContract):
            method = Mine

    The method must be registered under its name: install its package first. All runs are made on a tiny pipeline in memory.
    """

    method: ClassVar[type[Method]]
    settings: ClassVar[Mapping[str, Any]] = {}  # beside QUICK, where the method has settings of its own that cost time
    stages: ClassVar[tuple[str, ...]] = ("sampling", "calibrate", "correct biases", "fine-tune", "correct answers")  # as tracked

    @pytest.fixture(scope="class", autouse=True)
    @classmethod
    def fast(cls) -> Iterator[None]:
        """Grids are chosen among few candidates, by one thread: on so small a model several mostly wait for each other."""
        num_threads = torch.get_num_threads()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(uniform, "SEARCH_STEPS", 8)
            torch.set_num_threads(1)
            yield
        torch.set_num_threads(num_threads)

    @pytest.fixture(scope="class")
    @classmethod
    def method_class(cls) -> type[Method]:
        return cls.method

    @pytest.fixture(scope="class")
    @classmethod
    def quick(cls) -> dict[str, Any]:
        """Settings of a run that takes a second."""
        return {**QUICK, **cls.settings}

    @pytest.fixture(scope="class")
    @classmethod
    def pipeline(cls) -> DDIMPipeline:
        """The float pipeline. Read it; do not change it."""
        return make_tiny_pipeline()

    @pytest.fixture(scope="class")
    @classmethod
    def samples(cls, pipeline: DDIMPipeline) -> Samples:
        """Calls recorded along four trajectories of three steps."""
        return record(pipeline, 4, steps=3, seed=0)

    @pytest.fixture(scope="class")
    @classmethod
    def student(cls, method_class: type[Method], quick: dict[str, Any], pipeline: DDIMPipeline, samples: Samples) -> nn.Module:
        """The denoiser that a run on the recorded calls ends with. Read it; do not change it."""
        return make_student(pipeline, method_class.parse(quick), samples=samples)

    def test_a_method_is_a_registered_frozen_dataclass_with_help_and_a_summary(self, method_class: type[Method]) -> None:
        assert issubclass(method_class, Method) and methods.get(method_class.name) is method_class
        assert all(setting.help for setting in method_class.describe())
        assert len(methods.summary(method_class.name)) > 10
        with pytest.raises(AttributeError):
            method_class().weight_bits = 3  # type: ignore[misc]

    def test_settings_survive_being_written_and_read(self, method_class: type[Method]) -> None:
        method = method_class.parse({"max_steps": "7", "keep": "skip,attention", "learning_rate": "1e-3"})
        assert (method.max_steps, method.learning_rate, len(method.keep)) == (7, 1e-3, 2)
        assert method_class.parse(method.settings()) == method

    @pytest.mark.parametrize("settings, message", BAD_SETTINGS)
    def test_bad_settings_are_refused_by_name(self, method_class: type[Method], settings: dict[str, Any], message: str) -> None:
        with pytest.raises(InputError, match=message):
            method_class.parse(settings)

    def test_preparing_looks_at_shapes_only_and_so_runs_on_meta(
        self, method_class: type[Method], pipeline: DDIMPipeline, samples: Samples
    ) -> None:
        denoiser = find_target(pipeline).denoiser
        empty, real = copy.deepcopy(denoiser).to("meta"), copy.deepcopy(denoiser)
        for student in (empty, real):
            method_class().prepare(student, Clock(samples.timestep.unique()))
        assert {k: v.shape for k, v in empty.state_dict().items()} == {k: v.shape for k, v in real.state_dict().items()}
        assert set(denoiser.state_dict()) <= set(real.state_dict())

    @pytest.mark.parametrize("attention_bits", [32, 8])
    def test_what_a_plan_counts_is_what_is_written_to_the_byte(
        self, method_class: type[Method], quick: dict[str, Any], pipeline: DDIMPipeline, samples: Samples, attention_bits: int,
        tmp_path: Path,
    ) -> None:  # fmt: skip
        method = method_class.parse({**quick, "act_bits": 4, "attention_bits": attention_bits})
        planned = measure_cost(find_target(pipeline).denoiser, scheme=plan_scheme(pipeline, method))
        folder = serialization.save(quantize(pipeline, method, samples=samples), tmp_path / "out")
        assert planned.size_bytes == (folder / "unet" / "diffusion_pytorch_model.safetensors").stat().st_size
        assert planned == measure_cost(find_target(serialization.load(folder)).denoiser)

    @torch.no_grad()
    def test_quantizing_equals_encoding_and_decoding_in_every_quantizer_of_a_finished_run(
        self, student: nn.Module, samples: Samples
    ) -> None:
        names = {module: name for name, module in student.named_modules() if isinstance(module, Quantizer)}
        checked: set[str] = set()
        broken: set[str] = set()

        def compare(quantizer: Quantizer, arguments: tuple[Tensor], output: Tensor) -> None:
            is_equal = torch.equal(output, quantizer.encode(*arguments).decode())
            (checked if is_equal else broken).add(names[quantizer])

        hooks = [quantizer.register_forward_hook(compare) for quantizer in names]
        try:
            samples.call(student)
        finally:
            for hook in hooks:
                hook.remove()
        layers = quantized_layers(student).values()
        parts = [part for layer in layers for part in (layer.weight_quantizer, layer.input_quantizer)]
        own = {names[part] for part in parts if isinstance(part, Quantizer)}
        assert not broken and own and own <= checked

    def test_a_run_leaves_the_teacher_alone_and_repeats_itself_with_a_recording_of_its_own(
        self, method_class: type[Method], quick: dict[str, Any], pipeline: DDIMPipeline, student: nn.Module
    ) -> None:
        teacher, labels = find_target(pipeline).denoiser, []
        before = {name: value.clone() for name, value in teacher.state_dict().items()}

        def note(work: Any, label: str) -> Any:
            labels.append(label)
            return plain(work, label)

        again = make_student(pipeline, method_class.parse(quick), track=note)
        assert tuple(labels) == self.stages
        assert all(torch.equal(value, teacher.state_dict()[name]) for name, value in before.items())
        assert all(torch.equal(value, again.state_dict()[name]) for name, value in student.state_dict().items())

    def test_fine_tuning_brings_the_student_nearer_to_the_teacher(
        self, method_class: type[Method], quick: dict[str, Any], pipeline: DDIMPipeline, samples: Samples
    ) -> None:
        rates = {"learning_rate": 1e-3, "quantizer_rate": 1e-2}
        distances = []
        for max_steps in (0, 20):
            method = method_class.parse({**quick, **rates, "act_bits": 4, "batch": 8, "max_steps": max_steps})
            student = make_student(pipeline, method, samples=samples)
            with torch.no_grad():
                distances.append((samples.call(student) - samples.target).square().mean().item())
        assert distances[1] < distances[0]
