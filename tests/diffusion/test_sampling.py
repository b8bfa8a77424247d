import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    DiTPipeline,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    UNet2DModel,
)
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models import ModelMixin
from diffusers.models.unets.unet_2d import UNet2DOutput
from diffusers.pipelines import ImagePipelineOutput
from torch import Tensor, nn

from dmquant.diffusion.conditioning import Conditioning, complete
from dmquant.diffusion.sampling import SAMPLERS, SamplingPlan, generate, set_sampler
from dmquant.errors import DmquantError, InputError, OutOfMemory
from dmquant.evaluation.image_grid import make_grid, stack_rows
from dmquant.testing import TINY_UNET
from tests.text import make_text_pipeline


@pytest.fixture
def pipeline() -> DDIMPipeline:
    torch.manual_seed(0)
    return DDIMPipeline(UNet2DModel(**TINY_UNET).eval(), DDIMScheduler())


@pytest.fixture
def dit() -> DiTPipeline:
    torch.manual_seed(0)
    network = DiTTransformer2DModel(
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=8,
        sample_size=4,
        out_channels=4,
        num_embeds_ada_norm=1000,
    )
    nn.init.normal_(network.proj_out_1.weight)
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4, sample_size=4)
    return DiTPipeline(network.eval(), vae.eval(), DDIMScheduler())


def images(pipeline: DiffusionPipeline, seeds=range(4), **settings) -> Tensor:
    return torch.cat(list(generate(pipeline, seeds, SamplingPlan(**{"steps": 3} | settings))))


def furthest(a: Tensor, b: Tensor) -> int:
    return (a.int() - b.int()).abs().max().item()


class OneImage(ModelMixin, ConfigMixin):
    """The exact denoiser of a data set of one image: it knows how the noise got in."""

    @register_to_config
    def __init__(self, sample_size: int = 4, in_channels: int = 3):
        super().__init__()
        self.image = nn.Parameter(torch.linspace(-0.8, 0.8, 48).reshape(3, 4, 4))
        alphas = DDIMScheduler().alphas_cumprod
        self.sigmas = ((1 - alphas) / alphas).sqrt()
        self.class_embedding = None

    def forward(self, sample: Tensor, timestep: Tensor) -> UNet2DOutput:
        below, above = self.sigmas[int(timestep)], self.sigmas[min(int(timestep) + 1, 999)]
        alpha = 1 / (1 + below.lerp(above, float(timestep) % 1) ** 2)
        return UNet2DOutput(sample=(sample - alpha.sqrt() * self.image) / (1 - alpha).sqrt())


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_finds_the_only_image_there_is(name):
    pipeline = DDIMPipeline(OneImage(), DDIMScheduler())
    assert set_sampler(pipeline, name) == name
    expected = ((pipeline.unet.image.detach() / 2 + 0.5) * 255).round()
    # DEIS and PNDM stop at the noise of timestep 0: sigma 0.01, one grey level
    assert furthest(images(pipeline, steps=20), expected.expand(4, -1, -1, -1)) <= 4


@pytest.mark.parametrize("name", SAMPLERS)
def test_an_image_does_not_depend_on_the_batch_around_it(pipeline, name):
    set_sampler(pipeline, name)
    alone = images(pipeline, [3, 1], steps=4, batch=1)
    together = images(pipeline, range(4), steps=4, batch=4)
    assert alone.shape == (2, 3, 8, 8) and alone.dtype == torch.uint8
    assert furthest(alone, together[[3, 1]]) <= 1
    assert furthest(together[0], together[1]) > 1


@pytest.mark.parametrize("kind, scheduler", [(DDIMPipeline, DDIMScheduler), (DDPMPipeline, DDPMScheduler)])
def test_images_are_those_of_the_pipelines_own_call(pipeline, kind, scheduler):
    own = kind(pipeline.unet, scheduler())
    own.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in range(4)]
    called = own(batch_size=4, generator=generators, num_inference_steps=3, output_type="np").images
    expected = torch.from_numpy(called).permute(0, 3, 1, 2).mul(255).round()
    assert furthest(images(own), expected) <= 1


def test_sampling_leaves_the_global_random_state_alone(pipeline, dit):
    before = torch.get_rng_state()
    images(pipeline)
    images(dit, conditioning=Conditioning(class_labels=(1,)))
    assert torch.equal(before, torch.get_rng_state())


def test_images_come_batch_by_batch_and_only_when_asked_for(pipeline):
    calls, tracked = [], []
    pipeline.unet.register_forward_pre_hook(lambda module, arguments: calls.append(len(arguments[0])))
    track = lambda work, label: tracked.append((len(work), label)) or work  # noqa: E731
    chunks = generate(pipeline, range(5), SamplingPlan(1, 2), track=track)
    assert not calls
    assert len(next(chunks)) == 2 and calls == [2]
    assert [len(chunk) for chunk in chunks] == [2, 1]
    assert tracked == [(3, "sampling")]


def test_samples_that_are_not_finite_stop_the_run(pipeline):
    nn.init.constant_(pipeline.unet.conv_out.bias, torch.nan)
    with pytest.raises(DmquantError, match="4 of 4 samples are not finite.*seed 7"):
        images(pipeline, range(7, 11))


def test_too_large_a_batch_says_what_to_do(pipeline, monkeypatch):
    def exhaust(*arguments, **conditions):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(pipeline.unet, "forward", exhaust)
    with pytest.raises(OutOfMemory, match="smaller batch"):
        images(pipeline)


@pytest.mark.parametrize("settings", [{"steps": 0}, {"batch": 0}, {"steps": 1001}, {"seeds": [-1]}, {"seeds": [2**63]}])
def test_impossible_settings_are_refused(pipeline, settings):
    with pytest.raises(InputError):
        images(pipeline, **settings)


def test_a_sampler_that_needs_more_steps_says_so(pipeline):
    set_sampler(pipeline, "pndm")
    with pytest.raises(InputError, match="PNDMScheduler cannot sample in 2 steps"):
        images(pipeline, steps=2)


# Samplers


def test_no_name_keeps_the_sampler_and_says_which(pipeline):
    assert set_sampler(pipeline) == "ddim"
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler()
    assert set_sampler(pipeline, None) == "FlowMatchEulerDiscreteScheduler"


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("settings", [{}, {"num_train_timesteps": 500}, {"beta_schedule": "scaled_linear", "beta_end": 0.012}])
def test_a_sampler_keeps_the_pipelines_noise_schedule(pipeline, name, settings):
    pipeline.scheduler = DDIMScheduler(**settings)
    expected = pipeline.scheduler.alphas_cumprod
    set_sampler(pipeline, name)
    assert torch.allclose(pipeline.scheduler.alphas_cumprod, expected)


def test_unknown_and_unfit_samplers_are_refused(pipeline):
    with pytest.raises(InputError, match="choose from ddim"):
        set_sampler(pipeline, "dimm")
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler()
    with pytest.raises(InputError, match="do not share a noise schedule"):
        set_sampler(pipeline, "ddim")


# Conditioning


def test_an_unconditional_pipeline_takes_no_conditioning(pipeline):
    for wanted in (Conditioning(prompts=("a cat",)), Conditioning(class_labels=(1,)), Conditioning(guidance=2.0)):
        with pytest.raises(InputError, match="takes no"):
            images(pipeline, conditioning=wanted)


@pytest.fixture
def classes() -> DDIMPipeline:
    """A UNet that knows ten classes."""
    torch.manual_seed(0)
    return DDIMPipeline(UNet2DModel(**TINY_UNET, num_class_embeds=10).eval(), DDIMScheduler())


def test_a_seed_decides_the_label_whatever_the_batch_around_it(classes):
    labels = Conditioning(class_labels=(4, 7))
    together = images(classes, range(5), batch=3, conditioning=labels)
    for seed, label in enumerate((4, 7, 4, 7, 4)):
        alone = images(classes, [seed], conditioning=Conditioning(class_labels=(label,)))
        assert furthest(together[seed], alone[0]) <= 1
    assert furthest(*images(classes, [0], conditioning=labels), *images(classes, [0], conditioning=Conditioning((), (7,)))) > 1


def test_without_labels_every_class_is_drawn_equally_often_and_few_seeds_see_classes_from_everywhere(classes, dit):
    labels = complete(classes, Conditioning()).class_labels
    assert sorted(labels) == list(range(10)) and labels == complete(classes, Conditioning()).class_labels
    assert torch.equal(images(classes, range(4)), images(classes, range(4), conditioning=Conditioning(class_labels=labels)))
    many = complete(dit, Conditioning())
    assert sorted(many.class_labels) == list(range(1000)) and many.guidance == 4.0, "the pipeline's own scale"
    first = sorted(many.class_labels[:50])
    assert max(after - before for before, after in zip([0, *first], [*first, 1000])) <= 50


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7, 9, 1000])
def test_the_classes_are_a_permutation_however_many_there_are(count):
    pipeline = DDIMPipeline(UNet2DModel(**TINY_UNET, num_class_embeds=count), DDIMScheduler())
    assert sorted(complete(pipeline, Conditioning()).class_labels) == list(range(count))


def test_labels_that_the_pipeline_does_not_have_are_refused(classes):
    for label in (10, -1):
        with pytest.raises(InputError, match=f"no class {label}; labels are 0 to 9"):
            images(classes, conditioning=Conditioning(class_labels=(3, label)))
    classes.unet.register_to_config(num_class_embeds=None)
    with pytest.raises(InputError, match="does not say how many classes"):
        images(classes)


def test_a_guidance_scale_is_a_finite_number(dit):
    with pytest.raises(InputError, match="no finite number"):
        images(dit, conditioning=Conditioning(guidance=float("nan")))


def test_a_dit_pipeline_answers_to_labels_and_guidance_without_a_progress_bar(dit, capfd):
    labels = Conditioning(class_labels=(1, 2))
    plain, guided = images(dit, [0, 1], conditioning=labels), images(dit, [0, 1], conditioning=Conditioning((), (1, 2), 8.0))
    assert plain.shape == (2, 3, 4, 4)
    assert furthest(plain, guided) > 1
    assert furthest(plain, images(dit, [0, 1], conditioning=Conditioning((), (2, 1)))) > 1
    assert furthest(plain, images(dit, [0, 1], batch=1, conditioning=labels)) <= 1
    assert capfd.readouterr().err == ""
    assert "disable" not in dit._progress_bar_config


def test_a_random_sampler_repeats_where_a_pipeline_passes_no_generator(dit):
    set_sampler(dit, "ddpm")
    labels = Conditioning(class_labels=(1,))
    assert torch.equal(images(dit, conditioning=labels), images(dit, conditioning=labels))


class Painter(DiffusionPipeline):
    """A text pipeline of the older kind: it answers with arrays (B, H, W, 3)."""

    def __init__(self, transformer: nn.Module, text_encoder: nn.Module, scheduler: DDIMScheduler):
        super().__init__()
        self.register_modules(transformer=transformer, text_encoder=text_encoder, scheduler=scheduler)

    def __call__(self, prompt, generator, num_inference_steps, output_type="pil", guidance_scale=1.0):
        shades = torch.tensor([len(text) / 255 for text in prompt])
        assert len(generator) == len(prompt) and num_inference_steps == 3
        return ImagePipelineOutput(images=shades[:, None, None, None].expand(-1, 2, 4, 3).numpy())


def test_a_text_pipeline_gets_the_prompt_of_each_seed():
    painter = Painter(nn.Linear(1, 1), nn.Linear(1, 1), DDIMScheduler())
    with pytest.raises(InputError, match="Painter draws from text; give it prompts"):
        images(painter)
    painted = images(painter, range(3, 6), batch=2, conditioning=Conditioning(prompts=("a", "four"), guidance=2.0))
    assert painted.shape == (3, 3, 2, 4) and painted[:, 0, 0, 0].tolist() == [4, 1, 4]


@pytest.mark.filterwarnings("ignore")  # from inside transformers
def test_stable_diffusion_draws_what_it_is_told_to_under_the_guidance_given():
    pipeline, prompts = make_text_pipeline(), ("a red cat", "x")
    with pytest.raises(InputError, match="takes no class labels"):
        images(pipeline, conditioning=Conditioning(prompts, (1,)))
    drawn = images(pipeline, range(4), batch=4, conditioning=Conditioning(prompts))
    assert drawn.shape == (4, 3, 8, 8)
    assert furthest(drawn, images(pipeline, range(4), batch=1, conditioning=Conditioning(prompts))) <= 1
    assert furthest(drawn, images(pipeline, range(4), conditioning=Conditioning(prompts, guidance=7.5))) <= 1, "its own scale"
    assert furthest(drawn, images(pipeline, range(4), conditioning=Conditioning(prompts, guidance=1.0))) > 1
    others = images(pipeline, range(4), conditioning=Conditioning(prompts[::-1]))
    assert all(furthest(one, other) > 1 for one, other in zip(drawn, others))


def test_the_hash_of_a_conditioning_is_that_of_its_entries_in_order():
    hashes = {Conditioning(prompts=entries).sha256 for entries in (("a", "b"), ("b", "a"), ("ab",), ("a", "b", "a"))}
    assert len(hashes) == 4
    assert Conditioning(("a",), guidance=2.0).sha256 == Conditioning(("a",)).sha256
    assert [Conditioning().kind, Conditioning(("a",)).kind, Conditioning((), (1,)).kind] == [None, "prompts", "class labels"]


# Sheets


def test_a_grid_shows_every_image_in_reading_order():
    tiles = torch.arange(5, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 4, 4) * 10
    grid = make_grid(tiles, 2, zoom=3)
    assert grid.size == (2 + 2 * 14, 2 + 3 * 14)
    corners = [grid.getpixel((2 + 14 * (index % 2), 2 + 14 * (index // 2))) for index in range(6)]
    assert corners == [(0,) * 3, (10,) * 3, (20,) * 3, (30,) * 3, (40,) * 3, (255,) * 3]


def test_small_images_are_enlarged_to_be_seen_and_large_ones_left():
    assert make_grid(torch.zeros(1, 3, 32, 32, dtype=torch.uint8), 1).width == 64 + 4
    assert make_grid(torch.zeros(1, 3, 128, 128, dtype=torch.uint8), 1).width == 128 + 4


def test_models_stand_one_above_the_other_under_their_captions():
    row = torch.zeros(2, 3, 64, 64, dtype=torch.uint8)
    sheet = stack_rows({"float": row, "lsq W4A8, with a caption wider than two small images": row + 100})
    assert sheet.width > 2 * 66 + 2 and sheet.height == 2 * (68 + 18)
    assert sheet.getpixel((10, 18 + 10)) == (0, 0, 0) and sheet.getpixel((10, 86 + 18 + 10)) == (100,) * 3
    band = [sheet.getpixel((x, y)) for x in range(sheet.width) for y in range(18)]
    assert min(band) < (128,) * 3, "the caption is missing"
