"""Layers of other tools, played by classes that look like theirs: known by where they come from, weighed as they are stored."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
from torch import Tensor, nn

from dmquant.diffusion import other_tools
from dmquant.evaluation.cost import measure_cost
from dmquant.evaluation.evaluator import evaluate
from dmquant.evaluation.image_cache import hash_pipeline
from dmquant.testing import TINY_UNET

QUICK = {"metrics": "psnr", "num_images": 2, "steps": 2, "batch": 2}


class QLinear(nn.Linear):
    """As optimum-quanto's: codes and scale in the state dict in place of a weight."""

    def give(self, weight_bits: int, act_bits: int | None) -> "QLinear":
        self.weight_qtype = SimpleNamespace(bits=weight_bits)
        self.activation_qtype = act_bits and SimpleNamespace(bits=act_bits)
        scale = self.weight.detach().abs().amax(1, keepdim=True) / (2 ** (weight_bits - 1) - 1)
        self.codes = torch.zeros(-(-self.weight.numel() * weight_bits // 8), dtype=torch.uint8)
        self.scale, self.weight = scale, nn.Parameter((self.weight.detach() / scale).round() * scale)
        return self

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        kept = {"weight._data": self.codes, "weight._scale": self.scale, "bias": self.bias}
        destination |= {prefix + name: tensor.detach() for name, tensor in kept.items() if tensor is not None}


class Int8Tensor(Tensor):
    """As torchao's: a weight that is made of other tensors."""

    @staticmethod
    def __new__(cls, qdata: Tensor, scale: Tensor, dtype: torch.dtype, **notes):
        return Tensor._make_wrapper_subclass(cls, qdata.shape, dtype=dtype)

    def __init__(self, qdata: Tensor, scale: Tensor, dtype: torch.dtype, **notes):
        self.qdata, self.scale = qdata, scale
        self.__dict__ |= notes

    def __tensor_flatten__(self):
        return ["qdata", "scale"], None

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return args[0]

        def open_up(value):
            return value.qdata.float() * value.scale if isinstance(value, cls) else value

        return function(*map(open_up, args), **(kwargs or {}))


QLinear.__module__, Int8Tensor.__module__ = "optimum.quanto.nn.qlinear", "torchao.quantization.int8"


@pytest.fixture
def pipeline() -> DDIMPipeline:
    torch.manual_seed(0)
    return DDIMPipeline(UNet2DModel(**TINY_UNET).eval(), DDIMScheduler())


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}


def by_quanto(unet: nn.Module, weight_bits: int, act_bits: int | None = None) -> int:
    """Quantizes the linear layers; how many bytes that saved."""
    saved = 0
    for name, layer in linears(unet).items():
        parent, _, leaf = name.rpartition(".")
        before = layer.weight.nbytes
        layer.__class__ = QLinear
        setattr(unet.get_submodule(parent), leaf, layer.give(weight_bits, act_bits))
        saved += before - layer.codes.nbytes - layer.scale.nbytes
    return saved


def by_torchao(unet: nn.Module, **notes) -> int:
    saved = 0
    for layer in linears(unet).values():
        weight = layer.weight.detach()
        scale = weight.abs().amax(1, keepdim=True) / 127
        saved += 3 * weight.numel() - scale.nbytes
        layer.weight = nn.Parameter(Int8Tensor((weight / scale).round().to(torch.int8), scale, weight.dtype, **notes), False)
    return saved


def test_a_float_denoiser_and_one_of_ours_come_from_no_other_tool(pipeline):
    assert other_tools.find_tool(pipeline.unet) is None and other_tools.describe(pipeline.unet) == {}
    assert other_tools.count_bytes(pipeline.unet) == sum(value.nbytes for value in pipeline.unet.state_dict().values())


@pytest.mark.parametrize("weight_bits, act_bits", [(8, None), (4, None), (2, 8)])
def test_a_pipeline_by_quanto_is_a_row_with_its_bits_and_its_bytes(weight_bits, act_bits, pipeline):
    base, whole = DDIMPipeline(UNet2DModel(**TINY_UNET), DDIMScheduler()), other_tools.count_bytes(pipeline.unet)
    saved = by_quanto(pipeline.unet, weight_bits, act_bits)
    report = evaluate(pipeline, float_pipeline=base, **QUICK)
    assert (report.method, report.weight_bits, report.act_bits) == ("quanto", weight_bits, act_bits or 32)
    assert report.size_bytes == whole - saved and report.float_size_bytes == whole
    bits = {cost.name: (cost.weight_bits, cost.act_bits) for cost in measure_cost(pipeline.unet).layers}
    expected = (weight_bits, act_bits or 32)
    assert all(pair == (expected if name in linears(pipeline.unet) else (32, 32)) for name, pair in bits.items())


@pytest.mark.parametrize(
    "notes, bits",
    [({}, (8, 32)), ({"act_quant_kwargs": object()}, (8, 8)), ({"target_dtype": torch.int4}, (4, 32)),
     ({"target_dtype": torch.int2, "activation_quantization": "int8"}, (2, 8))],
)  # fmt: skip
def test_a_pipeline_by_torchao_is_weighed_by_what_its_tensors_are_made_of(notes, bits, pipeline):
    whole = other_tools.count_bytes(pipeline.unet)
    saved = by_torchao(pipeline.unet, **notes)
    assert other_tools.describe(pipeline.unet) == {"method": "torchao", "weight_bits": bits[0], "act_bits": bits[1]}
    assert other_tools.count_bytes(pipeline.unet) == whole - saved


def test_codes_that_differ_are_other_images_though_they_lie_inside_a_tensor(pipeline):
    by_torchao(pipeline.unet)
    before = hash_pipeline(pipeline)
    assert hash_pipeline(pipeline) == before
    next(iter(linears(pipeline.unet).values())).weight.qdata[0, 0] += 1
    assert hash_pipeline(pipeline) != before


def test_layers_of_bitsandbytes_are_read_by_what_they_store():
    layer = nn.Linear(8, 6)
    layer.weight = nn.Parameter(torch.zeros(24, 1, dtype=torch.uint8), requires_grad=False)
    for name, bits in (("Linear4bit", (4, 32)), ("Linear8bitLt", (4, 8))):
        layer.__class__ = type(name, (nn.Linear,), {"__module__": "bitsandbytes.nn.modules"})
        assert other_tools.layer_bits(layer) == bits
