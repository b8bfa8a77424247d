import weakref

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, DiTPipeline, DiTTransformer2DModel
from torch import nn

from dmquant.diffusion.conditioning import Conditioning
from dmquant.diffusion.pipeline import find_target, open_pipeline
from dmquant.diffusion.sampling import SamplingPlan, generate, set_sampler
from dmquant.diffusion.trajectories import Recorder, Samples, record, recording_seeds, stepping
from dmquant.errors import InputError
from dmquant.training.resume import SavedRun
from tests.text import make_sdxl_pipeline, make_text_pipeline


@pytest.fixture
def pipeline(tiny_folder):
    return open_pipeline(tiny_folder)


def test_replaying_a_recording_gives_the_teachers_answers(pipeline):
    samples = record(pipeline, 3, steps=4, seed=0)
    assert len(samples) == 12 and samples.timestep.tolist() == [750] * 3 + [500] * 3 + [250] * 3 + [0] * 3
    with torch.no_grad():
        answer = samples.call(find_target(pipeline).denoiser)
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
    assert all(min(recording_seeds(seed, 9)) >= 1 << 31 and max(recording_seeds(seed, 9)) < 1 << 32 for seed in range(50))


def test_recording_leaves_no_hook_behind_even_when_interrupted(pipeline):
    denoiser = find_target(pipeline).denoiser

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


def record_two_calls(denoiser):
    recorder = Recorder()
    hook = denoiser.register_forward_hook(recorder.note, with_kwargs=True)
    arguments = dict(
        encoder_hidden_states=torch.randn(2, 5, 3), added_cond_kwargs={"text_embeds": torch.randn(2, 4)}, img_ids=torch.ones(7, 3)
    )
    for timestep in (900, 100):
        denoiser(torch.randn(2, 3, 4, 4), timestep=torch.tensor(timestep), **arguments, return_dict=False)
    hook.remove()
    return recorder


def test_nested_and_shared_arguments_are_recorded_and_given_back():
    denoiser = Conditional()
    samples = record_two_calls(denoiser).take()
    assert len(samples) == 4 and samples.timestep.tolist() == [900, 900, 100, 100]
    assert set(samples.conditioning) == {"encoder_hidden_states", "added_cond_kwargs.text_embeds"}
    assert set(samples.shared) == {"img_ids"}
    assert torch.allclose(samples[slice(0, 2)].call(denoiser), samples.target[:2])


def test_joining_the_calls_lets_go_of_each_part_before_the_next(monkeypatch):
    recorder, join, alive = record_two_calls(Conditional()), torch.cat, []
    parts = [weakref.ref(getattr(call, name)) for call in recorder._calls for name in ("x", "target")]

    def count(tensors):
        alive.append(sum(part() is not None for part in parts))
        return join(tensors)

    monkeypatch.setattr(torch, "cat", count)
    recorder.take()
    assert alive == [4, 2, 2, 0, 0]  # x, timestep, target, then what conditions them


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
    run.load_or_record(lambda: samples)
    run._save(1, {})
    again = SavedRun(tmp_path / "run")
    again.open({}, {})
    assert again.load_or_record(lambda: None).guidance == 7.5


def test_a_sampler_that_reuses_its_tensors_does_not_change_the_recording():
    denoiser, recorder = nn.Identity(), Recorder()
    denoiser.forward = lambda sample, timestep: (sample,)
    x, timestep = torch.ones(1, 3), torch.ones(1)
    recorder.note(denoiser, (x, timestep), {}, (x,))
    x.zero_(), timestep.zero_()
    samples = recorder.take()
    assert samples.x.sum() == 3 and samples.target.sum() == 3 and samples.timestep == 1


def test_a_teacher_with_dropout_is_recorded_without_and_left_in_its_mode(tiny_folder):
    pipeline = open_pipeline(tiny_folder)
    denoiser = find_target(pipeline).denoiser
    for block in denoiser.mid_block.resnets:
        block.dropout.p = 0.5
    denoiser.train()
    one, two = (record(pipeline, 1, steps=2, seed=0) for _ in range(2))
    assert torch.equal(one.target, two.target) and denoiser.training


def make_dit(out_channels: int) -> DiTPipeline:
    """A class-conditional transformer of 4 latent channels; with 8 out it has learned a variance."""
    torch.manual_seed(0)
    network = DiTTransformer2DModel(
        num_layers=1, num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=out_channels, sample_size=4,
        patch_size=2, num_embeds_ada_norm=1000,
    ).eval()  # fmt: skip
    return DiTPipeline(network, AutoencoderKL(latent_channels=4, block_out_channels=(4,), norm_num_groups=2), DDIMScheduler())


@pytest.mark.parametrize("out_channels", [4, 8])
def test_of_a_learned_variance_only_what_the_sampler_uses_is_followed(out_channels):
    pipeline = make_dit(out_channels)
    denoiser, samples = pipeline.transformer, record(make_dit(out_channels), 2, steps=2, seed=0)
    assert samples.target.shape == samples.x.shape == (8, 4, 4, 4), "two steps, both halves of the guidance"
    with torch.no_grad():
        whole = denoiser(samples.x, timestep=samples.timestep, class_labels=samples.conditioning["class_labels"]).sample
    assert whole.shape[1] == out_channels and torch.equal(samples.call(denoiser), whole[:, :4])
    assert torch.allclose(samples.target, whole[:, :4], atol=1e-5)


def test_a_variance_that_the_sampler_does_use_is_followed_too(tiny_folder):
    pipeline = open_pipeline(tiny_folder)
    pipeline.register_modules(unet=type(pipeline.unet)(**{**pipeline.unet.config, "out_channels": 6}))
    pipeline.scheduler = DDPMScheduler(variance_type="learned_range")
    assert record(pipeline, 2, steps=2, seed=0).target.shape == (4, 6, 8, 8)


@pytest.mark.parametrize("make", [lambda: make_dit(8), make_text_pipeline], ids=["DiT", "Stable Diffusion"])
def test_eta_reaches_the_sampler_whether_or_not_its_pipeline_takes_one(make):
    pipeline = make()
    asked = Conditioning(("a",)) if isinstance(make(), type(make_text_pipeline())) else Conditioning()
    still, noisy, again, less = (
        record(pipeline, 2, steps=3, seed=0, eta=eta, conditioning=asked).x for eta in (0.0, 1.0, 1.0, 0.5)
    )
    assert torch.equal(noisy, again) and torch.equal(still[:4], noisy[:4]), "the first step starts from the same noise"
    assert not torch.allclose(still[4:], noisy[4:]) and not torch.allclose(less[4:], noisy[4:])


def test_eta_draws_the_noise_of_its_steps_from_each_seed(pipeline):
    one, two = (record(pipeline, 3, steps=3, seed=0, eta=1.0, batch=batch).x for batch in (1, 3))
    assert torch.allclose(one.unflatten(0, (3, 3)).transpose(0, 1).flatten(0, 1), two, atol=1e-5)


def test_steps_with_eta_one_add_noise_of_the_variance_in_ddims_equation_16():
    scheduler, shape = DDIMScheduler(clip_sample=False), (1, 1, 500, 500)
    scheduler.set_timesteps(10)
    x, answer = torch.zeros(shape), torch.zeros(shape)
    with stepping(scheduler, 1.0):
        moved = scheduler.step(answer, 500, x, generator=torch.Generator().manual_seed(0)).prev_sample
    now, before = scheduler.alphas_cumprod[500].double(), scheduler.alphas_cumprod[400].double()
    assert moved.double().var().item() == pytest.approx(((1 - before) / (1 - now) * (1 - now / before)).item(), rel=0.02)


def test_a_sampler_without_eta_is_refused_before_anything_is_drawn_and_every_sampler_is_left_as_it_was(pipeline):
    before = torch.cat(list(generate(pipeline, range(2), SamplingPlan(2))))
    record(pipeline, 1, steps=2, seed=0, eta=1.0)
    assert "step" not in vars(pipeline.scheduler)
    assert torch.equal(torch.cat(list(generate(pipeline, range(2), SamplingPlan(2)))), before)
    set_sampler(pipeline, "euler")
    with pytest.raises(InputError, match="eta of 1: EulerDiscreteScheduler takes none; leave it at 0"):
        record(pipeline, 1, steps=2, seed=0, eta=1.0, track=lambda *_: pytest.fail("an image was drawn"))
    set_sampler(pipeline, "ddim")


@pytest.mark.filterwarnings("ignore")  # from inside transformers
def test_what_sdxl_is_told_of_each_image_stays_with_its_sample():
    pipeline, asked = make_sdxl_pipeline(), Conditioning(("a red cat", "x"))
    own, told = pipeline._get_add_time_ids, []

    def tell(*args, **kwargs):  # a size of its own at each call: positive and negative differ, and so do batches
        told.append(float(len(told)))
        return own((told[-1], told[-1]), *args[1:], **kwargs)

    pipeline._get_add_time_ids = tell
    samples = record(pipeline, 3, steps=2, seed=0, batch=2, conditioning=asked)
    times = samples.conditioning["added_cond_kwargs.time_ids"]
    assert len(samples) == len(times) == 12 and not samples.shared
    assert len(times[:, 0].unique()) > 1
    for part in samples.split(5):  # no batch that was recorded
        with torch.no_grad():
            assert torch.allclose(part.call(pipeline.unet), part.target, atol=1e-5)


def test_places_of_tokens_are_shared_even_where_there_are_as_many_as_samples():
    recorder, network = Recorder(), nn.Identity()
    network.forward = lambda hidden_states, timestep, img_ids, ids: None
    x = torch.ones(2, 2, 3)
    recorder.note(network, (x, torch.ones(2)), {"img_ids": torch.ones(2, 3), "ids": torch.ones(2, 2, 3)}, (x,))
    samples = recorder.take()
    assert set(samples.shared) == {"img_ids"} and set(samples.conditioning) == {"ids"}
