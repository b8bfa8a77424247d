"""Trains the embedded feature extractor on a class-per-folder image set and writes it with a record of the training.

python benchmarks/train_extractor.py --train A.zip B.zip --test T.zip -o dmquant/assets/extractor
"""

import argparse
import json
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from dmquant.diffusion.image_files import hash_images, list_images, load_images
from dmquant.evaluation.metrics.resnet import ResNetExtractor


def main() -> None:
    args = parse_arguments()
    torch.manual_seed(args.seed)
    images, labels, classes = load_classes(args.train)
    test_images, test_labels, _ = load_classes(args.test)
    model = ResNetExtractor(len(classes)).to(memory_format=torch.channels_last)
    started = time.monotonic()
    loss = train(model, images, labels, args)
    accuracy = measure_accuracy(model, test_images, test_labels)
    record = {
        "name": args.name,
        "classes": classes,
        "epochs": args.epochs,
        "batch": args.batch,
        "seed": args.seed,
        "peak_learning_rate": args.learning_rate,
        "train_loss": round(loss, 5),
        "test_accuracy": accuracy,
        "minutes": round((time.monotonic() - started) / 60, 1),
        "num_parameters": sum(p.numel() for p in model.parameters()),
        "train_images": len(images),
        "train_sha256": hash_images(images),
        "test_sha256": hash_images(test_images),
    }
    write(model, record, args.output)
    print(json.dumps(record))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train", nargs="+", required=True, help="folders or zips with one folder per class")
    parser.add_argument("--test", nargs="+", required=True)
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--name", default="resnet-cifar10", help="name of the extractor, which is part of the names of metrics")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--learning-rate", type=float, default=0.4, help="peak of the one-cycle schedule")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def load_classes(paths: list[str]) -> tuple[Tensor, Tensor, list[str]]:
    images, files = load_images(list_images(*paths))
    classes = sorted({file.label for file in files})
    return images, torch.tensor([classes.index(file.label) for file in files]), classes


def train(model: ResNetExtractor, images: Tensor, labels: Tensor, args: argparse.Namespace) -> float:
    """One-cycle SGD with label smoothing; returns the mean loss of the last epoch."""
    steps = args.epochs * (len(images) // args.batch)
    optimizer = torch.optim.SGD(model.parameters(), lr=args.learning_rate, momentum=0.9, nesterov=True, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.learning_rate, total_steps=steps, pct_start=0.25)
    generator = torch.Generator().manual_seed(args.seed)
    mean_loss = float("nan")
    for epoch in range(args.epochs):
        order, losses = torch.randperm(len(images), generator=generator), []
        for index in order[: len(order) // args.batch * args.batch].split(args.batch):
            x = augment(images[index].float() / 127.5 - 1, generator)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                logits = model.classify(x.to(memory_format=torch.channels_last))
            loss = F.cross_entropy(logits.float(), labels[index], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        mean_loss = sum(losses) / len(losses)
        print(f"epoch {epoch + 1}/{args.epochs}: loss {mean_loss:.4f}", flush=True)
    return mean_loss


def augment(x: Tensor, generator: torch.Generator) -> Tensor:
    """Returns images with a random flip each, and a random shift of up to 4 pixels per chunk of 32 images."""
    flipped = torch.rand(len(x), generator=generator) < 0.5
    x = torch.where(flipped[:, None, None, None], x.flip(-1), x)
    padded, size = F.pad(x, (4, 4, 4, 4), mode="reflect"), x.shape[-1]
    shifts = torch.randint(0, 9, (-(-len(x) // 32), 2), generator=generator).tolist()
    return torch.cat([part[:, :, dy : dy + size, dx : dx + size] for part, (dy, dx) in zip(padded.split(32), shifts)])


@torch.no_grad()
def measure_accuracy(model: ResNetExtractor, images: Tensor, labels: Tensor) -> float:
    model.eval()
    hits = [(model.classify(x.float() / 127.5 - 1).argmax(1) == y).sum() for x, y in zip(images.split(500), labels.split(500))]
    return sum(hits).item() / len(images)


def write(model: ResNetExtractor, record: dict, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {k: v.half() if v.is_floating_point() else v for k, v in sorted(model.state_dict().items())}
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "model.safetensors")
    (folder / "record.json").write_text(json.dumps(record, indent=2, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
