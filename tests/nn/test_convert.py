"""A packed layer computes what its quantized layer computes, from integer codes alone."""

import copy

import pytest
import torch
from diffusers import UNet2DModel
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dmquant.nn.convert import (
    layer_bits,
    layer_scheme,
    layers_of,
    pack_layer,
    pack_model,
    packed_layers,
    prepare_packed,
    read_scheme,
    restore_float,
)
from dmquant.nn.fake_quant_layers import quantized, swap
from dmquant.nn.packed_layers import PackedConv2d
from dmquant.nn.packed_weight import Bases, PackedBases, PackedWeight
from dmquant.nn.scheme import FLOAT, FLOAT_BITS, LayerScheme, Scheme, Timing
from dmquant.quantizers.base import BasisCodes, FixedGrid
from dmquant.quantizers.binary import Binary
from dmquant.quantizers.per_timestep import PerTimestep, TemporalGrid, TemporalStep
from dmquant.quantizers.timestep_clock import Clock, attach_clock
from dmquant.quantizers.uniform import Uniform

LAYERS = {
    "linear": (nn.Linear(10, 6), (2, 5, 10)),
    "linear without bias": (nn.Linear(10, 7, bias=False), (3, 10)),
    "conv1d": (nn.Conv1d(4, 6, 3, padding=1), (2, 4, 9)),
    "conv2d": (nn.Conv2d(4, 6, 3, padding=1), (2, 4, 7, 7)),
    "strided": (nn.Conv2d(4, 6, 3, stride=2, padding=(1, 0)), (2, 4, 7, 7)),
    "grouped and dilated": (nn.Conv2d(4, 6, 3, groups=2, dilation=2, padding="same"), (2, 4, 7, 7)),
    "reflected": (nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect", bias=False), (2, 4, 7, 7)),
}


def quantizers(layer: nn.Module, weight_bits: int, act_bits: int, x: torch.Tensor) -> tuple[nn.Module, nn.Module]:
    size = {"num_channels": len(layer.weight), "ndim": layer.weight.ndim}
    if weight_bits == FLOAT_BITS:
        weight = nn.Identity()
    elif weight_bits == 1:
        weight = Binary(**size)
    else:
        weight = Uniform(weight_bits, **size, init="minmax", symmetric=weight_bits % 2 == 0)
    grid = nn.Identity() if act_bits == FLOAT_BITS else Uniform(act_bits, symmetric=False, init="minmax")
    for quantizer, example in ((weight, layer.weight), (grid, x)):
        if not isinstance(quantizer, nn.Identity):
            quantizer.observe(example)
    return weight, grid


TWO_LEVELS = dict(
    block_out_channels=(8, 16), down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D")
)
ONE_LEVEL = dict(block_out_channels=(8,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",))  # attention between


def tiny_unet(bits: dict[str, tuple[int, int]] | None = None, levels: dict[str, tuple] = TWO_LEVELS) -> nn.Module:
    torch.manual_seed(0)
    unet = UNet2DModel(8, norm_num_groups=4, layers_per_block=1, attention_head_dim=8, **levels)
    swap(unet, lambda name, layer: quantizers(layer, *(bits or {}).get(name, (4, 8)), torch.randn(100)))
    return unet.eval()


def run(unet: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return unet(torch.linspace(-1, 1, 2 * 3 * 64).view(2, 3, 8, 8), torch.tensor([3, 700])).sample


@pytest.mark.parametrize("act_bits", [2, 3, 4, 5, 6, 7, 8, 32])
@pytest.mark.parametrize("weight_bits", [1, 2, 3, 4, 5, 6, 7, 8, 32])
@torch.no_grad()
def test_every_pair_of_bits_and_every_kind_of_layer_gives_the_output_of_the_quantized_layer(weight_bits, act_bits):
    torch.manual_seed(0)
    for plain, shape in LAYERS.values():
        x = torch.randn(shape)
        layer = quantized(plain, *quantizers(plain, weight_bits, act_bits, x))
        packed = pack_layer(layer)
        assert layer_bits(packed) == layer_bits(layer) == (weight_bits, act_bits)
        assert torch.equal(packed(x), layer(x))


@pytest.mark.parametrize("bits", [1, 3, 8])
def test_a_packed_weight_holds_its_codes_and_grids_and_no_float_copy(bits):
    layer = LAYERS["conv2d"][0]
    packed = pack_layer(quantized(layer, *quantizers(layer, bits, 32, torch.randn(9))))
    size_bytes = sum(tensor.nbytes for tensor in packed.weight.state_dict().values())
    assert size_bytes == bits * 6 * 4 * 9 // 8 + 6 * 4 + 6 * 4
    assert packed.weight.shape == layer.weight.shape and packed.weight.numel() == layer.weight.numel()
    assert sorted(packed.state_dict()) == ["bias", "weight.codes", "weight.scale", "weight.zero"]


def test_one_grid_for_the_whole_weight_is_written_as_one_per_channel_and_finer_ones_are_refused():
    layer = nn.Linear(8, 4)
    coarse, fine = Uniform(4, num_channels=1, ndim=2), Uniform(4, num_channels=4, ndim=2)
    coarse.observe(layer.weight)
    packed = pack_layer(quantized(layer, coarse, nn.Identity()))
    assert torch.equal(packed.weight.dequantize(), coarse(layer.weight)) and packed.weight.scale.shape == (4,)
    fine.scale = torch.ones(4, 2)
    with pytest.raises(ValueError, match="one grid per output channel"):
        pack_layer(quantized(nn.Linear(2, 4), fine, nn.Identity()))


def test_half_precision_models_keep_their_grids_in_float32():
    layer = nn.Conv2d(4, 6, 3, padding=1).to(torch.bfloat16)
    layer = quantized(layer, *quantizers(layer, 4, 8, torch.randn(100)))
    packed, x = pack_layer(layer), torch.randn(2, 4, 7, 7, dtype=torch.bfloat16)
    assert packed.weight.scale.dtype == packed.weight.zero.dtype == packed.input.scale.dtype == torch.float32
    assert packed.weight.dtype == packed(x).dtype == torch.bfloat16
    assert torch.equal(packed(x), layer(x))


def test_packing_a_model_leaves_it_as_it_was_and_shares_what_stays_in_float():
    unet = tiny_unet()
    before, kinds = copy.deepcopy(unet.state_dict()), [type(module) for module in unet.modules()]
    packed = pack_model(unet)
    assert [type(module) for module in unet.modules()] == kinds
    assert all(torch.equal(before[name], tensor) for name, tensor in unet.state_dict().items())
    assert packed.conv_norm_out.weight.data_ptr() == unet.conv_norm_out.weight.data_ptr()
    assert torch.equal(run(packed), run(unet))
    packed.to("meta")
    assert not any(tensor.is_meta for tensor in unet.state_dict().values())


def test_packing_twice_changes_nothing():
    packed = pack_model(tiny_unet())
    again = pack_model(packed)
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in packed.state_dict().items())


def test_a_packed_model_can_be_copied_and_has_no_float_weight_of_its_layers():
    packed = copy.deepcopy(pack_model(tiny_unet()))
    assert len(packed_layers(packed)) == len(layers_of(packed)) > 20
    assert all(isinstance(layer.weight, PackedWeight) for layer in packed_layers(packed).values())
    assert not any(name.endswith("conv1.weight") for name, _ in packed.named_parameters())


def test_a_packed_model_compiles_to_one_graph():
    packed = pack_model(tiny_unet(levels=ONE_LEVEL))
    compiled = torch.compile(packed, backend="eager", fullgraph=True)
    assert torch.equal(run(compiled), run(packed))


def test_layers_that_stay_in_float_stay_what_they_are():
    packed = pack_model(tiny_unet({"conv_in": (32, 32), "conv_out": (32, 8), "mid_block.resnets.0.conv1": (1, 32)}))
    assert type(packed.conv_in) is nn.Conv2d
    assert type(packed.conv_out) is PackedConv2d and isinstance(packed.conv_out.weight, nn.Parameter)
    assert isinstance(packed.mid_block.resnets[0].conv1.input, nn.Identity)


def test_an_empty_model_of_the_same_layout_takes_the_tensors():
    packed = pack_model(tiny_unet({"conv_in": (32, 32), "conv_out": (32, 8)}))
    with torch.device("meta"):
        empty = UNet2DModel.from_config(packed.config)
    prepare_packed(empty, read_scheme(packed), dtype=torch.float32)
    assert all(tensor.is_meta for tensor in empty.state_dict().values())
    empty.load_state_dict(packed.state_dict(), assign=True)
    assert torch.equal(run(empty.eval()), run(packed))


def test_restoring_gives_plain_layers_with_the_dequantized_weights():
    packed = pack_model(tiny_unet({"conv_out": (32, 8)}))
    weights = {name: layer.weight for name, layer in packed_layers(packed).items()}
    restored = copy.deepcopy(packed)
    restore_float(restored)
    assert not packed_layers(restored) and not any(isinstance(module, FixedGrid) for module in restored.modules())
    assert restored.conv_out.weight.equal(weights["conv_out"])
    assert restored.conv_in.weight.equal(weights["conv_in"].dequantize())
    for layer in packed_layers(packed).values():
        layer.input = nn.Identity()
    assert torch.equal(run(restored), run(packed))


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_the_layout_says_the_bits_of_every_layer(data):
    names = ["a", "blocks.0.b", "blocks.1.b", "blocks.1.c.0", "blocks.2.c.1", "blocks.10.c.0", "1"]
    model = nn.Module()
    model.blocks = nn.ModuleList([nn.Module() for _ in range(11)])
    for name in names:
        if ".c." in name:
            model.get_submodule(name.rpartition(".")[0].rpartition(".")[0]).c = nn.ModuleList([nn.Identity(), nn.Identity()])
    for name in names:
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, nn.Linear(2, 2))
    bits = {name: data.draw(st.sampled_from([(4, 8), (8, 8), (32, 32), (32, 8)])) for name in names}
    swap(model, lambda name, layer: quantizers(layer, *bits[name], torch.randn(9)))
    default = data.draw(st.sampled_from([None, (4, 8), (2, 2)]))
    scheme = read_scheme(model, default)
    assert {name: scheme.layer(name)[:2] for name in names} == bits
    assert scheme.unused(names) == set() and scheme.unused(["x"]) == set(scheme.overrides)


def test_repeated_blocks_take_one_override():
    bits = {name: (8, 8) for name in layers_of(tiny_unet()) if name.endswith("conv1")}
    assert len(bits) > 5
    overrides = read_scheme(tiny_unet(bits)).overrides
    patterns = {"down_blocks.*.resnets.*.conv1", "mid_block.resnets.*.conv1", "up_blocks.*.resnets.*.conv1"}
    assert overrides == dict.fromkeys(patterns, (8, 8, ()))


class BinaryBases(Binary):
    """A weight quantizer that keeps several binary bases: random signs, always the same."""

    traits = (Bases(),)

    def __init__(self, count: int, *, num_channels: int):
        super().__init__(num_channels=num_channels)
        self.bits = count
        self.scales = torch.linspace(0.1, 1, count * num_channels).view(count, num_channels, 1, 1, 1)

    def encode(self, x: torch.Tensor) -> BasisCodes:
        codes = torch.randint(1 << self.bits, x.shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
        return BasisCodes(codes, self.scales)


@pytest.mark.parametrize("count", [2, 3])
def test_binary_bases_are_planes_with_scales_of_their_own(count):
    layer, quantizer = nn.Conv2d(4, 6, 3), BinaryBases(count, num_channels=6)
    packed, wanted = pack_layer(quantized(layer, quantizer, nn.Identity())), quantizer.encode(layer.weight).decode()
    assert torch.equal(packed.weight.dequantize(), wanted) and len(wanted[0].unique()) == 2**count
    assert sum(tensor.nbytes for tensor in packed.weight.state_dict().values()) == count * 6 * 4 * 9 // 8 + count * 6 * 4
    assert layer_scheme(packed) == (count, 32, (Bases(),))


def test_a_layout_remembers_which_weights_are_bases():
    unet = tiny_unet()
    unet.conv_out.weight_quantizer = BinaryBases(2, num_channels=3)
    packed = pack_model(unet)
    with torch.device("meta"):
        empty = UNet2DModel.from_config(packed.config)
    prepare_packed(empty, read_scheme(packed), dtype=torch.float32)
    empty.load_state_dict(packed.state_dict(), assign=True)
    assert isinstance(empty.conv_out.weight, PackedBases) and torch.equal(run(empty.eval()), run(packed))


def timed_unet(lookup: str = "nearest") -> nn.Module:
    """A tiny UNet whose inputs, but those of the time embedding, have a grid for each of three timesteps."""
    unet, clock = tiny_unet(), Clock(torch.tensor([700.0, 300.0, 3.0]), lookup)
    for name, layer in layers_of(unet).items():
        if not name.startswith("time_embedding"):
            layer.input_quantizer = TemporalStep(8, clock)
            with clock.at(torch.tensor([700, 300, 3]), 3):
                layer.input_quantizer.observe(torch.randn(3, 50) * torch.tensor([[1.0], [2.0], [3.0]]))
    attach_clock(clock, unet)
    return unet


@pytest.mark.parametrize("lookup", ["nearest", "linear"])
def test_temporal_grids_run_packed_as_they_did_each_model_by_its_own_clock(lookup):
    unet = timed_unet(lookup)
    packed = pack_model(unet)
    assert torch.equal(run(packed), run(unet))
    assert packed.clock is not unet.clock and packed.conv_in.input.clock is packed.clock
    assert unet.conv_in.input_quantizer.clock is unet.clock
    packed.clock.set(torch.tensor(300), 2)
    assert unet.clock.step.tolist() == [2, 0]


@pytest.mark.parametrize("lookup", ["nearest", "linear"])
def test_a_layout_says_which_grids_are_temporal_and_over_how_many_steps(lookup):
    packed = pack_model(timed_unet(lookup))
    scheme = read_scheme(packed)
    assert scheme.timing == Timing(3, lookup) and scheme.default == LayerScheme(4, 8, (PerTimestep(),))
    assert scheme.layer("time_embedding.linear_1") == LayerScheme(4, 8)
    with torch.device("meta"):
        empty = UNet2DModel.from_config(packed.config)
    prepare_packed(empty, scheme, dtype=torch.float32)
    empty.load_state_dict(packed.state_dict(), assign=True)
    assert type(empty.conv_in.input) is TemporalGrid and type(empty.time_embedding.linear_1.input) is FixedGrid
    assert torch.equal(run(empty.eval()), run(packed))


def test_a_model_made_float_again_has_no_clock():
    restored = pack_model(timed_unet())
    restore_float(restored)
    assert not any("clock" in name for name in restored.state_dict()) and read_scheme(restored).timing is None
    assert run(restored).isfinite().all()


def test_an_override_of_no_layer_is_found():
    assert Scheme(LayerScheme(4, 8), {"conv_in": FLOAT, "conv_inn": FLOAT}).unused(["conv_in"]) == {"conv_inn"}
