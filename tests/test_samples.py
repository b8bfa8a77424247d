import pytest
import torch
from torch import nn

from dmquant.denoiser import find_denoiser, open_pipeline
from dmquant.generation import Conditioning
from dmquant.runs import SavedRun
from dmquant.samples import Recorder, Samples, record, recording_seeds
from tests.text import make_text_pipeline


@pytest.fixture
def pipeline(tiny_folder):
    return open_pipeline(tiny_folder)


def test_replaying_a_recording_gives_the_teachers_answers(pipeline):
    samples = record(pipeline, 3, steps=4, seed=0)
    assert len(samples) == 12 and samples.timestep.tolist() == [750] * 3 + [500] * 3 + [250] * 3 + [0] * 3
    with torch.no_grad():
        answer = samples.call(find_denoiser(pipeline)[1])
    assert torch.allclose(answer, samples.target, atol=1e-5)


def test_a_recording_depends_on_its_seed_and_on_nothing_else(pipeline):
    torch.manual_seed(1)
    first = record(pipeline, 2, steps=2, seed=5)
    torch.manual_seed(2)
    again, other = record(pipeline, 2, steps=2, seed=5), record(pipeline, 2, steps=2, seed=6)
    assert torch.equal(first.x, again.x) and torch.equal(first.target, again.target)
    assert not torch.equal(first.x, other.x)


def test_recorded_noise_is_not_the_noise_of_the_seeds_that_people_evaluate(pipeline):
    noise = record(pipeline, 1, steps=1, seed=0).x[0]
    shape = noise.shape
    drawn = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in range(100)]
    assert not any(torch.equal(noise, one) for one in drawn)
    # torch's CPU generator reads the lower 32 bits of a seed: they alone must keep the two apart
    assert all(1 << 31 <= min(recording_seeds(seed, 9)) and max(recording_seeds(seed, 9)) < 1 << 32 for seed in range(50))


def test_recording_leaves_no_hook_behind_even_when_interrupted(pipeline):
    denoiser = find_denoiser(pipeline)[1]

    def stop(work, label):
        yield next(iter(work))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        record(pipeline, 4, steps=2, seed=0, batch=2, track=stop)
    assert not denoiser._forward_hooks


def test_a_spread_is_even_and_never_longer_than_the_recording(pipeline):
    samples = record(pipeline, 2, steps=4, seed=0)
    assert len(samples.spread(100)) == 8
    assert len(samples.spread(4).timestep.unique()) == 4
    assert [len(part) for part in samples.split(3)] == [3, 3, 2]


class Conditional(nn.Module):
    """Like PixArt and others: the second argument is not the timestep."""

    def forward(self, hidden_states, encoder_hidden_states, timestep, added_cond_kwargs, img_ids, return_dict=True):
        total = hidden_states + encoder_hidden_states.mean() + added_cond_kwargs["text_embeds"].mean() + img_ids.sum()
        return (total * timestep.view(-1, 1, 1, 1) if timestep.ndim else total * timestep,)


def test_nested_and_shared_arguments_are_recorded_and_given_back():
    denoiser, recorder = Conditional(), Recorder()
    hook = denoiser.register_forward_hook(recorder.note, with_kwargs=True)
    arguments = dict(
        encoder_hidden_states=torch.randn(2, 5, 3), added_cond_kwargs={"text_embeds": torch.randn(2, 4)}, img_ids=torch.ones(7, 3)
    )
    for timestep in (900, 100):
        denoiser(torch.randn(2, 3, 4, 4), timestep=torch.tensor(timestep), **arguments, return_dict=False)
    hook.remove()
    samples = recorder.samples()
    assert len(samples) == 4 and samples.timestep.tolist() == [900, 900, 100, 100]
    assert set(samples.conditioning) == {"encoder_hidden_states", "added_cond_kwargs.text_embeds"}
    assert set(samples.shared) == {"img_ids"}
    assert torch.allclose(samples[slice(0, 2)].call(denoiser), samples.target[:2])


def test_a_spread_misses_no_timestep_whatever_the_counts():
    for steps, trajectories, count in ((20, 50, 21), (20, 200, 64), (50, 30, 256)):
        timestep = torch.arange(steps).repeat_interleave(trajectories)
        empty = torch.zeros(len(timestep), 1)
        samples = Samples(empty, timestep, empty, {}, {})
        assert len(samples.spread(count).timestep.unique()) == steps


def test_the_guidance_of_a_recording_goes_wherever_its_samples_go(tmp_path):
    run, samples = SavedRun(tmp_path / "run"), record(make_text_pipeline(), 1, steps=2, seed=0, conditioning=Conditioning(("a",)))
    assert samples.guidance == samples[:2].guidance == samples.spread(2).on(torch.device("cpu")).guidance == 7.5
    run.open({}, {})
    run.recall(lambda: samples)
    run._save(1, {})
    again = SavedRun(tmp_path / "run")
    again.open({}, {})
    assert again.recall(lambda: None).guidance == 7.5


def test_a_sampler_that_reuses_its_tensors_does_not_change_the_recording():
    denoiser, recorder = nn.Identity(), Recorder()
    denoiser.forward = lambda sample, timestep: (sample,)
    x, timestep = torch.ones(1, 3), torch.ones(1)
    recorder.note(denoiser, (x, timestep), {}, (x,))
    x.zero_(), timestep.zero_()
    assert recorder.samples().x.sum() == 3 and recorder.samples().target.sum() == 3 and recorder.samples().timestep == 1


def test_a_teacher_with_dropout_is_recorded_without_and_left_in_its_mode(tiny_folder):
    pipeline = open_pipeline(tiny_folder)
    denoiser = find_denoiser(pipeline)[1]
    for block in denoiser.mid_block.resnets:
        block.dropout.p = 0.5
    denoiser.train()
    one, two = (record(pipeline, 1, steps=2, seed=0) for _ in range(2))
    assert torch.equal(one.target, two.target) and denoiser.training
