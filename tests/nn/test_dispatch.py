"""A packed layer takes the kernel that may run it, keeps its weight once, and leaves what no kernel takes to the reference."""

import copy
import io
import pickle
import threading

import pytest
import torch
from torch import nn

from dmquant.kernels import autotune, norm, registry, self_check, status
from dmquant.kernels.conv_shape import POINTWISE, ConvGeometry
from dmquant.kernels.operands import NO_OPS, FusedOps
from dmquant.nn import dispatch, kernel_choice
from dmquant.nn.convert import pack_model, packed_layers
from dmquant.quantizers.per_timestep import TemporalGrid
from dmquant.quantizers.timestep_clock import Clock
from tests.kernels.test_ops import USABLE, error, expected, fitting, make_layer
from tests.nn.test_convert import run, tiny_unet


@pytest.fixture(autouse=True)
def automatic(monkeypatch):
    monkeypatch.setenv("DMQUANT_KERNELS", "c")


def resident_bytes(model: nn.Module) -> int:
    """Of everything that the packed layers hold, weights and what belongs to them."""
    total = 0
    for layer in packed_layers(model).values():
        held = [*layer.parameters(), *layer.buffers()]
        total += sum(tensor.nbytes for tensor in held) + (layer.weight.blocked.nbytes if layer.weight.blocked else 0)
    return total


def conv(weight_bits: int = 1, act_bits: int = 4, **options) -> nn.Module:
    return make_layer((40, 70, 3, 3), weight_bits, act_bits, padding=1, **options)


@pytest.mark.needs_compiler
def test_the_first_call_chooses_and_the_output_is_that_of_the_reference():
    layer, x = conv(), torch.randn(2, 70, 6, 5)
    found = layer(x)
    assert layer.weight.blocked.kernel in registry.BY_NAME and error(found, expected(layer, x)) < 1e-5
    assert torch.equal(layer(x), found)


@pytest.mark.needs_compiler
def test_channels_last_in_and_plain_give_the_same_values():
    layer, x = conv(), torch.randn(2, 70, 6, 5)
    assert torch.equal(layer(x), layer(x.contiguous(memory_format=torch.channels_last)))


@pytest.mark.needs_compiler
@pytest.mark.parametrize("first, count", [(0, 64), (37, 70), (1, 130), (64, 67)])
@pytest.mark.parametrize("kernel", USABLE)
def test_every_kernel_reads_a_slice_of_channels_as_a_copy_of_it(kernel, first, count):
    whole = torch.randn(2, 131, 5, 9).contiguous(memory_format=torch.channels_last)
    part = whole[:, first : first + count]
    gain, offset = norm.moments(part.permute(0, 2, 3, 1), None, None, 1, 1e-5)
    for size, weight_bits, act_bits in ((3, 1, 4), (1, 2, 6), (1, 8, 8)):
        layer = make_layer((37, count, size, size), weight_bits, act_bits, padding=size // 2, symmetric=size == 3)
        if kernel not in fitting(layer):
            continue
        layer.weight.block(kernel)
        normed = FusedOps(gain, offset, norm.SILU, torch.rand(count))
        for fused in (NO_OPS, normed, FusedOps(gain, offset, epsilon=1e-5), FusedOps(upsample=2)):
            found, wanted = (dispatch.launch(layer, layer.weight.blocked, x, fused) for x in (part, part.clone()))
            assert torch.equal(found, wanted)


def test_only_slices_of_channels_are_read_where_they_lie():
    image = torch.randn(2, 20, 5, 9).contiguous(memory_format=torch.channels_last)
    pixels, stride = dispatch.as_channels_last(image[:, 3:10])
    assert stride == 20 and pixels.data_ptr() == image[:, 3:10].data_ptr()
    others = (image, image[:, ::2], image[:, 3:10, 1:], image[:, 3:10, :, 1:], image[:1, 3:10].expand(2, -1, -1, -1))
    for x in (*others, torch.randn(2, 20, 5, 9), torch.randn(2, 20, 1, 1)):
        copied, stride = dispatch.as_channels_last(x)
        assert stride == x.shape[1] and copied.is_contiguous(memory_format=torch.channels_last) and torch.equal(copied, x)


@pytest.mark.needs_compiler
def test_a_one_bit_weight_takes_one_bit_of_memory():
    layers = nn.ModuleList([make_layer((128, 256, 3, 3), 1, 4, padding=1), make_layer((256, 512), 1, 4)])
    for layer, shape in zip(layers, [(1, 256, 4, 4), (3, 512)]):
        layer(torch.randn(shape))
    float_bytes = sum(4 * layer.weight.numel() for layer in layers)
    assert all(layer.weight.blocked for layer in layers)
    assert resident_bytes(layers) <= float_bytes / 24


@pytest.mark.needs_compiler
def test_what_is_blocked_reads_copies_pickles_and_saves_as_what_was_stored():
    for layer in (conv(), conv(4, 8), conv(8, 8), make_layer((9, 33), 0, 4, bases=2)):
        before, x = copy.deepcopy(layer.state_dict()), torch.randn((2, 70, 6, 5) if layer.weight.shape[1] == 70 else (3, 33))
        found = layer(x)
        assert layer.weight.blocked and layer.weight._buffers["codes"] is None
        stream = io.BytesIO()
        torch.save(layer, stream)
        stream.seek(0)
        others = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(stream, weights_only=False), layer]
        for other in others:
            state = other.state_dict()
            assert list(state) == list(before) and all(torch.equal(state[name], before[name]) for name in before)
            assert torch.equal(other(x), found)
        assert torch.equal(layer.weight.codes, before["weight.codes"])


def test_loading_and_moving_let_go_of_the_blocked_weight():
    layer, other, x = conv(), conv(), torch.randn(1, 70, 4, 4)
    layer(x)
    layer.load_state_dict(other.state_dict())
    assert layer.weight.blocked is None and torch.equal(layer(x), other(x))
    assert torch.equal(layer.to(torch.float64).weight.codes, other.weight.codes) and layer.weight.blocked is None
    assert layer.to("meta").weight.codes.is_meta


@pytest.mark.parametrize(
    "change",
    [
        lambda layer, x: (layer, x.double()), lambda layer, x: (layer, x.requires_grad_()),
        lambda layer, x: (setattr(layer, "padding_mode", "reflect") or layer, x),
        lambda layer, x: (setattr(layer, "input", nn.Identity()) or layer, x),
        lambda layer, x: (layer.input.zero.fill_(0.25) is not None and layer, x),
        lambda layer, x: (layer.weight.zero.fill_(0.1) is not None and layer, x),
    ],
    ids=["float64", "gradients", "reflected", "float input", "fractional zero", "fractional zero of weights"],
)  # fmt: skip
def test_what_no_kernel_takes_goes_to_the_reference(change):
    layer, x = change(conv(), torch.randn(2, 70, 6, 5))
    assert dispatch.run_kernel(layer, x) is None and layer.weight.blocked is None


@pytest.mark.parametrize("options", [{"groups": 2}, {"dilation": 2}])
def test_groups_and_dilation_go_to_the_reference(options):
    layer, x = conv(**options), torch.randn(2, 70 * options.get("groups", 1), 6, 5)
    assert dispatch.run_kernel(layer, x) is None and layer(x).shape[1] == 40


def test_autocast_goes_to_the_reference():
    with torch.autocast("cpu", torch.bfloat16):
        assert dispatch.run_kernel(conv(), torch.randn(2, 70, 6, 5)) is None


def test_a_grid_that_changes_is_followed():
    layer, x = conv(4, 8), torch.randn(2, 70, 6, 5)
    layer(x)
    layer.input.scale.mul_(2)
    layer.input.zero.fill_(100)
    layer.weight.scale.mul_(3)
    assert error(layer(x), expected(layer, x)) < 1e-5


@pytest.mark.parametrize("steps", [[0, 0, 0], [2, 0, 1]], ids=["one timestep", "mixed timesteps"])
@pytest.mark.parametrize("shape", [(40, 70, 3, 3), (40, 70)])
def test_each_sample_takes_the_grid_of_its_timestep(shape, steps, has_compiler):
    layer = make_layer(shape, 4, 6, **({"padding": 1} if len(shape) == 4 else {}))
    clock = Clock(torch.tensor([0.0, 10.0, 20.0]))
    layer.input = TemporalGrid(6, clock)
    layer.input.scale.copy_(torch.tensor([0.1, 0.2, 0.4]))
    layer.input.zero.copy_(torch.tensor([31.0, 20.0, 0.0]))
    x = torch.randn((3, 70, 5, 6) if len(shape) == 4 else (3, 7, 70))
    with clock.at(torch.tensor(steps) * 10.0, 3), torch.no_grad():
        found = layer(x)
        assert bool(layer.weight.blocked) == has_compiler
        weight, quantized = layer.weight.dequantize(torch.float64), layer.input(x).double()
        product = layer._conv_forward if len(shape) == 4 else nn.functional.linear
        wanted = product(quantized, weight, layer.bias.double())
    assert error(found, wanted) < 1e-5


@pytest.mark.needs_compiler
@pytest.mark.parametrize("kernel", [name for name in USABLE if registry.BY_NAME[name].fits(1, 4, POINTWISE)])
@pytest.mark.parametrize("steps", [(1, 1), (0, 2)])
def test_the_residual_of_tokens_is_added_where_samples_are_at_one_timestep_and_at_several(kernel, steps):
    layer, clock = make_layer((40, 70), 1, 4), Clock(torch.tensor([0.0, 10.0, 20.0]))
    layer.input = TemporalGrid(4, clock)
    layer.input.scale.copy_(torch.tensor([0.3, 0.5, 0.9]))
    layer.input.zero.copy_(torch.tensor([7.0, 8.0, 5.0]))
    x, residual = torch.randn(2, 7, 70), torch.randn(2, 7, 40)
    layer.weight.block(kernel)
    with clock.at(torch.tensor(steps) * 10.0, 2), torch.no_grad():
        plain = dispatch.launch(layer, layer.weight.blocked, x)
        found = dispatch.launch(layer, layer.weight.blocked, x, FusedOps(residual=residual))
    assert torch.equal(found, plain + residual)


@pytest.mark.needs_compiler
@pytest.mark.parametrize("factor", [1 + 1e-7, torch.nan])
def test_a_kernel_that_is_wrong_is_disabled_with_a_warning(monkeypatch, factor):
    self_check.check.cache_clear()
    right, calls = self_check.ops.quantized_conv, []

    def fail(*arguments):
        calls.append(arguments)
        return right(*arguments) * (1 if len(calls) == 1 else factor)

    monkeypatch.setattr(self_check.ops, "quantized_conv", fail)
    try:
        with pytest.warns(RuntimeWarning, match="is not used: it is wrong by"):
            assert dispatch.run_kernel(conv(), torch.randn(2, 70, 6, 5)) is None
    finally:
        self_check.check.cache_clear()


@pytest.mark.parametrize(
    "slow, winner",
    [
        pytest.param((), "scalar", marks=pytest.mark.needs_compiler, id="C"), pytest.param(("scalar",), "onednn", id="oneDNN"),
        pytest.param(("scalar", "onednn"), None, id="torch"),
    ],
)  # fmt: skip
def test_nobody_runs_who_is_slower_than_the_others(monkeypatch, slow, winner):
    monkeypatch.setenv("DMQUANT_KERNELS", "auto")
    monkeypatch.setattr(kernel_choice, "exact_candidates", lambda format, geometry: iter(["scalar"]))
    monkeypatch.setattr(autotune, "_least_seconds", lambda calls: {name: 1.3 if name in slow else 1.0 for name in calls})
    autotune.fastest.cache_clear()
    try:
        layer, x = conv(8, 6), torch.randn(2, 70, 6, 5)  # oneDNN is wrong about 8 times 8 bits where there is no VNNI
        found = layer(x)
        assert error(found, expected(layer, x)) < 1e-5 and torch.equal(layer(x), found)
        assert getattr(layer.weight.blocked, "kernel", None) == winner and layer.weight.is_left_alone == (winner is None)
    finally:
        autotune.fastest.cache_clear()


def test_threads_that_call_first_at_once_get_the_same():
    layer, x = conv(), torch.randn(2, 70, 6, 5)
    found = []
    threads = [threading.Thread(target=lambda: found.append(layer(x))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 and all(torch.equal(y, found[0]) for y in found)


@pytest.mark.needs_compiler
def test_a_layer_that_has_run_compiles_to_one_graph_around_the_operator():
    layer, x = conv(), torch.randn(2, 70, 6, 5)
    layer(x)
    graphs = []

    def keep(graph, _):
        graphs.append(graph)
        return graph

    with torch.no_grad():
        assert torch.equal(torch.compile(layer, backend=keep, fullgraph=True)(x), layer(x))
    targets = [str(node.target) for node in graphs[0].graph.nodes]
    assert len(graphs) == 1 and any("dmquant.quantized_conv" in target for target in targets)


def test_a_packed_model_gives_what_the_reference_gives(monkeypatch, has_compiler):
    packed = pack_model(tiny_unet())
    found = run(packed)
    assert all(bool(layer.weight.blocked) == has_compiler for layer in packed_layers(packed).values())
    monkeypatch.setenv("DMQUANT_KERNELS", "torch")
    assert error(found, run(copy.deepcopy(packed))) < 1e-4


def test_the_choice_is_one_of_six(monkeypatch):
    monkeypatch.setenv("DMQUANT_KERNELS", "fast")
    with pytest.raises(ValueError, match="auto, c, onednn, torch, triton, exact"):
        status.kernel_status()
    monkeypatch.setenv("DMQUANT_KERNELS", "torch")
    assert set(status.kernel_status().values()) == {"DMQUANT_KERNELS=torch"}
    assert dispatch.run_kernel(conv(), torch.randn(2, 70, 6, 5)) is None


def test_a_kernel_is_no_candidate_for_geometries_that_it_does_not_support(monkeypatch):
    monkeypatch.setattr(registry, "find_missing", lambda kernel: "")
    monkeypatch.setattr(self_check, "check", lambda *_: "")
    format = self_check.CodeFormat(4, 1, 4)
    assert "winograd" not in kernel_choice.exact_candidates(format, POINTWISE)
    assert "winograd" not in kernel_choice.exact_candidates(format, ConvGeometry((3, 3), (2, 2), (1, 1, 1, 1)))
    monkeypatch.setattr(kernel_choice, "KERNELS", [kernel for kernel in registry.KERNELS if kernel.name != "amx"])
    assert "winograd" in kernel_choice.exact_candidates(format, ConvGeometry((3, 3), padding=(0, 1, 0, 1)))
    assert "winograd" not in kernel_choice.exact_candidates(format._replace(bits=5), ConvGeometry((3, 3), padding=(0, 1, 0, 1)))
