"""A captured denoiser gives what it gives, whatever changes between its calls; a stand-in records instead of a GPU."""

import copy

import pytest
import torch
from torch import nn

from dmquant.nn import cuda_graph
from dmquant.quantizers.per_timestep import TemporalGrid
from dmquant.quantizers.timestep_clock import Clock, attach_clock

CALLS = []


class FakeGraph:
    """Calls again what was recorded, on the tensors that were recorded, and writes into the outputs that were given."""

    device_type = "cpu"

    def record(self, call):
        self.call, self.outputs = call, call()
        CALLS.append("record")
        return self.outputs

    def replay(self):
        CALLS.append("replay")
        self.outputs["sample"].copy_(self.call()["sample"])


class Denoiser(nn.Module):
    """What it gives depends on the sample, the timestep, a weight, a condition and the row of a temporal grid."""

    def __init__(self, lookup="nearest"):
        super().__init__()
        self.weight, clock = nn.Parameter(torch.tensor(2.0)), Clock(torch.tensor([0.0, 10.0, 20.0]), lookup)
        self.grid = TemporalGrid(8, clock)
        self.grid.scale.copy_(torch.tensor([0.1, 0.01, 0.03]))
        self.grid.zero.fill_(128)
        attach_clock(clock, self)

    def forward(self, sample, timestep, condition=None, double=False):
        out = self.grid(sample) * self.weight + torch.as_tensor(timestep).reshape(-1, 1)
        out = out if condition is None else out + condition["shift"]
        return {"sample": out * 2 if double else out}


@pytest.fixture(autouse=True)
def no_gradients():
    CALLS.clear()
    with torch.no_grad():
        torch.manual_seed(0)
        yield


def pair(**options):
    """A denoiser and its captured copy."""
    plain = Denoiser(**options).eval()
    captured = copy.deepcopy(plain)
    cuda_graph.capture(captured, FakeGraph)
    return plain, captured


def check(plain, captured, *args, **kwargs):
    wanted, found = plain(*args, **kwargs)["sample"], captured(*args, **kwargs)["sample"]
    assert torch.equal(found, wanted)
    return found


@pytest.mark.parametrize("lookup", ["nearest", "linear"])
@pytest.mark.filterwarnings("ignore:sampling at timesteps")
def test_one_recording_is_right_at_every_timestep_whether_number_or_tensor(lookup):
    plain, captured = pair(lookup=lookup)
    for timestep in (torch.tensor(20), torch.tensor(0), torch.tensor(12)):
        check(plain, captured, torch.randn(3, 4), timestep)
    for timestep in (10, 20, 5):
        check(plain, captured, torch.randn(3, 4), timestep)
    check(plain, captured, torch.randn(3, 4), torch.tensor([20, 0, 10]))
    assert CALLS.count("record") == 2, "one for a timestep of all samples, one for one each"
    assert torch.equal(captured.clock.step, plain.clock.step)


def test_what_was_given_stays_when_the_next_call_comes():
    plain, captured = pair()
    first = check(plain, captured, torch.randn(3, 4), 10)
    kept = first.clone()
    check(plain, captured, torch.randn(3, 4), 10)
    assert torch.equal(first, kept)


def test_other_shapes_and_other_arguments_have_recordings_of_their_own():
    plain, captured = pair()
    for _ in range(2):
        check(plain, captured, torch.randn(3, 4), 10)
        check(plain, captured, torch.randn(5, 4), 10)
        check(plain, captured, torch.randn(3, 4), 10, double=True)
        check(plain, captured, torch.randn(3, 4), timestep=10, condition={"shift": torch.randn(4)})
    assert CALLS.count("record") == 4 and CALLS.count("replay") == 8


def test_the_oldest_recording_goes_when_there_are_too_many(monkeypatch):
    monkeypatch.setattr(cuda_graph, "MAX_RECORDINGS", 2)
    plain, captured = pair()
    for size in (1, 2, 3, 1):
        check(plain, captured, torch.randn(size, 4), 10)
    assert CALLS.count("record") == 4 and len(captured.forward.recordings) == 2


def test_weights_that_are_written_are_read_and_weights_that_are_moved_are_recorded_anew():
    plain, captured = pair()
    check(plain, captured, torch.randn(3, 4), 10)
    for model in (plain, captured):
        model.weight.fill_(7.0)
    check(plain, captured, torch.randn(3, 4), 10)
    assert CALLS.count("record") == 1
    captured.weight.data = captured.weight.data.clone()
    check(plain, captured, torch.randn(3, 4), 10)
    assert CALLS.count("record") == 2


@pytest.mark.parametrize(
    "spoil",
    [
        lambda model, sample: model.train(), lambda model, sample: torch.set_grad_enabled(True),
        lambda model, sample: setattr(FakeGraph, "device_type", "cuda"),
    ],
    ids=["training", "gradients", "another device"],
)  # fmt: skip
def test_what_cannot_be_recorded_runs_as_it_is(spoil, monkeypatch):
    plain, captured = pair()
    monkeypatch.setattr(FakeGraph, "device_type", "cpu")
    sample = torch.randn(3, 4)
    spoil(captured, sample)
    check(plain, captured, sample, 10)
    assert not CALLS


def test_a_call_that_fails_to_be_recorded_is_told_of_once_and_runs(monkeypatch):
    def refuse(self, call):
        call()
        raise RuntimeError("operation not permitted when stream is capturing\nmore of it")

    monkeypatch.setattr(FakeGraph, "record", refuse)
    plain, captured = pair()
    with pytest.warns(RuntimeWarning, match="without a CUDA graph: operation not permitted when stream is capturing$"):
        check(plain, captured, torch.randn(3, 4), 20)
    check(plain, captured, torch.randn(3, 4), 10)


def test_copies_record_for_themselves_and_release_leaves_nothing():
    plain, captured = pair()
    check(plain, captured, torch.randn(3, 4), 10)
    twin = copy.deepcopy(captured)
    twin.weight.fill_(5.0), plain.weight.fill_(5.0)
    check(plain, twin, torch.randn(3, 4), 20)
    assert twin.forward.denoiser is twin and CALLS.count("record") == 2
    cuda_graph.release(twin)
    assert "forward" not in vars(twin)
    cuda_graph.release(twin)


def test_a_forward_that_somebody_else_replaced_is_not_captured():
    captured = pair()[1]
    with pytest.raises(ValueError, match="forward of this Denoiser has been replaced already"):
        cuda_graph.capture(captured)
