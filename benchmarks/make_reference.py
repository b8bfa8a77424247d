"""Computes the reference statistics of an image set in the features of an extractor, and writes them as built-in ones.

    python benchmarks/make_reference.py A.zip B.zip --name cifar10-train -o dmquant/assets/reference

Mean and covariance go to NAME.EXTRACTOR.npz, spatial statistics and some features to more/NAME.EXTRACTOR.npz, so that the
file for FID does not change when other statistics are added.
"""

import argparse
from pathlib import Path

from dmquant.diffusion.image_files import list_images
from dmquant.evaluation.metrics.feature_extractor import EMBEDDED, NAMES, load_extractor
from dmquant.evaluation.metrics.reference_stats import MORE, PARTS, compute_reference, save_reference


def main() -> None:
    args = parse_arguments()
    extractor = load_extractor(args.extractor, args.inception_weights)
    reference = compute_reference(list_images(*args.images), extractor, name=args.name, size=args.size, kept=args.kept)
    for folder, parts in ((args.output, ("mu",)), (args.output / MORE, tuple(PARTS))):
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"{args.name}.{extractor.name}.npz"
        save_reference(reference, extractor, file, size=args.size, parts=parts)
        print(f"{file}: {', '.join(parts)} of {reference.num_images} images, pixels {reference.sha256}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("images", nargs="+", help="image folders or zips")
    parser.add_argument("--name", required=True, help="name of the set; the file is NAME.EXTRACTOR.npz")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--extractor", default=EMBEDDED, choices=NAMES)
    parser.add_argument("--inception-weights", type=Path)
    parser.add_argument("--size", type=int, help="resize images to this side in pixels first (bicubic, centre crop)")
    parser.add_argument("--kept", type=int, default=5000, help="number of images whose features are stored")
    return parser.parse_args()


if __name__ == "__main__":
    main()
