"""Trains the embedded reference pipeline (unconditional 32x32 DDPM) on any image set and writes it as a diffusers folder.

    python benchmarks/train_reference.py --data A.zip B.zip --minutes 100 -o dmquant/assets/pipeline

The length is wall-clock time, so that the learning-rate schedule is completed on slow and fast machines.
`--warm-start` continues from another pipeline of the same shape; `--warm-start-note` describes it in the record.
"""

import argparse
import copy
import json
import math
import time
from pathlib import Path

import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
from torch import Tensor

from dmquant.diffusion.image_files import hash_images, list_images, load_images

SHAPE = dict(
    sample_size=32,
    in_channels=3,
    out_channels=3,
    layers_per_block=1,
    block_out_channels=(48, 96, 96),
    down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    norm_num_groups=16,
    attention_head_dim=32,
)
SNR_CAP = 5.0  # min-SNR-gamma loss weight (Hang et al., 2023)


def main() -> None:
    args = parse_arguments()
    images, _ = load_images(list_images(*args.data), size=SHAPE["sample_size"])
    model = start_model(args).to(args.device, memory_format=torch.channels_last)
    average = copy.deepcopy(model).requires_grad_(False)
    steps, loss = train(model, average, images.to(args.device), args)
    record = {
        "minutes": args.minutes,
        "steps": steps,
        "batch": args.batch,
        "loss": round(loss, 5),
        "seed": args.seed,
        "learning_rate": args.learning_rate,
        "ema_decay": args.ema_decay,
        "warm_start": args.warm_start_note,
        "data_images": len(images),
        "data_sha256": hash_images(images),
        "precision": "bf16 autocast",
        "device": args.device,
        "num_parameters": sum(p.numel() for p in model.parameters()),
    }
    write(average, record, args.output)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", nargs="+", required=True, help="image folders or zips")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--minutes", type=float, default=100)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=6e-4, help="peak of a cosine schedule over the given time")
    parser.add_argument("--ema-decay", type=float, default=0.9995)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--warm-start", help="a pipeline folder of the same shape to continue from")
    parser.add_argument("--warm-start-note", help="text about that pipeline for the record", default=None)
    parser.add_argument("--compile", action="store_true", help="torch.compile the model")
    return parser.parse_args()


def start_model(args: argparse.Namespace) -> UNet2DModel:
    torch.manual_seed(args.seed)
    if args.warm_start:
        return UNet2DModel.from_pretrained(args.warm_start, subfolder="unet", use_safetensors=True).float()
    return UNet2DModel(**SHAPE)


def train(model: UNet2DModel, average: UNet2DModel, images: Tensor, args: argparse.Namespace) -> tuple[int, float]:
    """Noise-prediction training until the time is up; returns the steps done and the running loss."""
    alphas = DDIMScheduler(num_train_timesteps=1000, beta_schedule="linear").alphas_cumprod.to(images.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    generator = torch.Generator(images.device).manual_seed(args.seed + 1)
    denoiser = torch.compile(model) if args.compile else model
    started, step, running = time.monotonic(), 0, None
    while (progress := (time.monotonic() - started) / (60 * args.minutes)) < 1:
        set_learning_rate(optimizer, args.learning_rate, step, progress)
        weighted, plain = loss_on_batch(denoiser, images, alphas, args.batch, generator)
        weighted.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        update_average(average, model, min(args.ema_decay, (1 + step) / (10 + step)))
        running = plain if running is None else 0.995 * running + 0.005 * plain
        if step % 200 == 0:
            speed = step * args.batch / (time.monotonic() - started)
            print(f"step {step}  {progress:.0%}  loss {running:.5f}  {speed:.0f} images/s", flush=True)
            write(average, {"unfinished_at": progress}, args.output.with_name(args.output.name + ".partial"))
    return step, running


def loss_on_batch(
    model: UNet2DModel, images: Tensor, alphas: Tensor, batch: int, generator: torch.Generator
) -> tuple[Tensor, float]:
    """Returns the min-SNR weighted noise-prediction error of a random batch, and its mean squared error."""
    draw = dict(generator=generator, device=images.device)
    x = images[torch.randint(0, len(images), (batch,), **draw)].float() / 127.5 - 1
    flipped = torch.rand(batch, **draw) < 0.5
    x = torch.where(flipped[:, None, None, None], x.flip(-1), x).to(memory_format=torch.channels_last)
    timestep, noise = torch.randint(0, len(alphas), (batch,), **draw), torch.randn(x.shape, **draw)
    alpha = alphas[timestep].view(-1, 1, 1, 1)
    noisy = alpha.sqrt() * x + (1 - alpha).sqrt() * noise
    with torch.autocast(images.device.type, dtype=torch.bfloat16):
        predicted = model(noisy, timestep).sample.float()
    error = (predicted - noise).square().mean((1, 2, 3))
    snr = alphas[timestep] / (1 - alphas[timestep])
    return (snr.clamp(max=SNR_CAP) / snr * error).mean(), error.mean().item()


def set_learning_rate(optimizer: torch.optim.Optimizer, peak: float, step: int, progress: float) -> None:
    rate = peak * min(1, (step + 1) / 200) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))
    for group in optimizer.param_groups:
        group["lr"] = rate


@torch.no_grad()
def update_average(average: UNet2DModel, model: UNet2DModel, decay: float) -> None:
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)


def write(average: UNet2DModel, record: dict, folder: Path) -> None:
    scheduler = DDIMScheduler(num_train_timesteps=1000, beta_schedule="linear")
    unet = copy.deepcopy(average).half().to("cpu", memory_format=torch.contiguous_format)
    unet.register_to_config(_name_or_path="")  # the path of a warm start does not belong into the result
    DDIMPipeline(unet, scheduler).save_pretrained(folder)
    (folder / "record.json").write_text(json.dumps(record, indent=2, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
