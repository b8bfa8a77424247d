"""Trains on images, by the denoising loss that the denoiser was trained with."""

import inspect
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDPMScheduler, SchedulerMixin
from torch import Tensor, nn

from dmquant.diffusion.image_files import list_images, load_images
from dmquant.diffusion.pipeline import Target
from dmquant.diffusion.sampling import convert_scheduler
from dmquant.errors import InputError

CONDITIONS = {"prompt", "prompt_embeds", "class_labels", "image"}  # arguments of conditional pipelines
TARGETS = {
    "epsilon": lambda scheduler, x, noise, timestep: noise,
    "sample": lambda scheduler, x, noise, timestep: x,
    "v_prediction": lambda scheduler, x, noise, timestep: scheduler.get_velocity(x, noise, timestep),
}


@dataclass(frozen=True)
class Denoising:
    """Mean squared error of the denoiser's prediction on noised images. DDPM, eq. 14 (Ho et al., 2020)."""

    images: Tensor  # uint8 (N, 3, H, W)
    scheduler: SchedulerMixin
    vae: AutoencoderKL | None  # encodes pixels to latents, in latent pipelines

    def loss(self, student: nn.Module, batch: int, *, step: int, generator: torch.Generator, device: torch.device) -> Tensor:
        images = self.images[torch.randint(len(self.images), (batch,), generator=generator)]
        flipped = torch.rand(batch, generator=generator) < 0.5
        pixels = torch.where(flipped.view(-1, 1, 1, 1), images.flip(-1), images).to(device).float() / 127.5 - 1
        x = self._encode(pixels, generator)
        noise = torch.randn(x.shape, generator=generator).to(device)
        timestep = torch.randint(self.scheduler.config.num_train_timesteps, (batch,), generator=generator).to(device)
        target = TARGETS[self.scheduler.config.prediction_type](self.scheduler, x, noise, timestep)
        answer = student(self.scheduler.add_noise(x, noise, timestep), timestep, return_dict=False)[0]
        return nn.functional.mse_loss(answer.float(), target.float())

    @torch.no_grad()
    def _encode(self, pixels: Tensor, generator: torch.Generator) -> Tensor:
        if self.vae is None:
            return pixels
        distribution = self.vae.encode(pixels.to(self.vae.dtype)).latent_dist
        noise = torch.randn(distribution.mean.shape, generator=generator).to(pixels.device)
        return (distribution.mean + distribution.std * noise).float() * self.vae.config.scaling_factor


def open_denoising(target: Target, data: str | Path) -> Denoising:
    """Returns the objective over a folder or zip of images, resized to the pipeline's size.

    Raises:
        InputError: the pipeline is conditional, or its scheduler, VAE, channels or size are not supported.
    """
    pipeline, denoiser = target.pipeline, target.denoiser
    asked = CONDITIONS & set(inspect.signature(pipeline.__call__).parameters)
    if asked or getattr(denoiser, "class_embedding", None) is not None:
        raise InputError("training on images needs an unconditional pipeline; leave --data out to follow the teacher instead")
    scheduler, vae = pipeline.scheduler, getattr(pipeline, "vae", None) or getattr(pipeline, "vqvae", None)
    if not hasattr(scheduler, "alphas_cumprod") or scheduler.config.get("prediction_type") not in TARGETS:
        raise InputError(f"training on images does not know {type(scheduler).__name__}; leave --data out")
    if not isinstance(vae, AutoencoderKL | None):
        raise InputError(f"training on images does not know {type(vae).__name__}; leave --data out")
    channels = (denoiser.config.in_channels, denoiser.config.out_channels)
    if len(set(channels)) > 1 or (vae is None and channels[0] != 3):
        raise InputError(f"training on images does not know {channels[0]} channels in and {channels[1]} out; leave --data out")
    factor = 1 if vae is None else 2 ** (len(vae.config.block_out_channels) - 1)
    if not isinstance(denoiser.config.sample_size, int):
        raise InputError(f"training on images needs square ones, not {denoiser.config.sample_size}; leave --data out")
    images, _ = load_images(list_images(data), size=denoiser.config.sample_size * factor)
    return Denoising(images, convert_scheduler(scheduler, DDPMScheduler), vae)
