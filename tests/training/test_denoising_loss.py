import pytest
import torch
from diffusers import DDIMScheduler, DiTPipeline
from PIL import Image

from dmquant.diffusion.pipeline import find_target, open_pipeline
from dmquant.errors import InputError
from dmquant.training.denoising_loss import open_denoising


@pytest.fixture
def images(tmp_path):
    for index in range(4):
        Image.new("RGB", (12, 10), (index * 60, 20, 200)).save(tmp_path / f"{index}.png")
    return tmp_path


def draw(objective, denoiser, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return objective.loss(denoiser, 4, step=0, generator=generator, device=torch.device("cpu"))


class Oracle(torch.nn.Module):
    """Knows the clean images, so it can name the noise: x_t = sqrt(a) x + sqrt(1 - a) e."""

    def __init__(self, clean, scheduler):
        super().__init__()
        self.clean, self.scheduler = clean, scheduler

    def forward(self, sample, timestep, return_dict=True):
        alpha = self.scheduler.alphas_cumprod[timestep].view(-1, 1, 1, 1)
        return ((sample - alpha.sqrt() * self.clean) / (1 - alpha).sqrt(),)


def test_a_denoiser_that_names_the_noise_has_no_loss(tmp_path, tiny_folder):
    Image.new("RGB", (8, 8), (90, 20, 200)).save(tmp_path / "one.png")
    objective = open_denoising(find_target(open_pipeline(tiny_folder)), tmp_path)
    clean = objective.images[:1].float() / 127.5 - 1
    assert draw(objective, Oracle(clean, objective.scheduler)) < 1e-6


def test_images_are_brought_to_the_pipelines_size_and_draws_follow_the_generator(images, tiny_folder):
    pipeline = open_pipeline(tiny_folder)
    objective, denoiser = open_denoising(find_target(pipeline), images), find_target(pipeline).denoiser
    assert objective.images.shape == (4, 3, 8, 8)
    assert draw(objective, denoiser) == draw(objective, denoiser) != draw(objective, denoiser, seed=1)


@pytest.mark.parametrize("prediction_type", ["sample", "v_prediction"])
def test_other_prediction_types_have_their_own_target(images, tiny_folder, prediction_type):
    pipeline = open_pipeline(tiny_folder)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, prediction_type=prediction_type)
    objective = open_denoising(find_target(pipeline), images)
    assert torch.isfinite(draw(objective, find_target(pipeline).denoiser))


def test_conditional_pipelines_are_refused_with_the_way_out(images):
    from diffusers import DiTTransformer2DModel

    transformer = DiTTransformer2DModel(num_layers=1, num_attention_heads=2, attention_head_dim=8, sample_size=8)
    pipeline = DiTPipeline(transformer, None, DDIMScheduler())
    with pytest.raises(InputError, match="leave --data out"):
        open_denoising(find_target(pipeline), images)
