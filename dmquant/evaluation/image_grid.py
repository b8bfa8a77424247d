"""Draws images of several seeds as one picture: a grid, or one captioned row per model."""

from collections.abc import Mapping

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

CAPTION_SIZE = 12  # pixels


def make_grid(images: Tensor, columns: int, *, zoom: int | None = None) -> Image.Image:
    """Returns images uint8 (N, 3, H, W) as a grid on white, filled row by row.

    Args:
        zoom: Factor of enlargement; default: the largest whole one with which an image is at most 64 pixels wide.
    """
    count, _, height, width = images.shape
    zoom = zoom or max(1, 64 // width)
    gap = 2
    tile_width, tile_height = width * zoom + gap, height * zoom + gap
    rows = -(-count // columns)
    grid = Image.new("RGB", (columns * tile_width + gap, rows * tile_height + gap), "white")
    for index, image in enumerate(images):
        tile = Image.fromarray(image.permute(1, 2, 0).contiguous().cpu().numpy())
        tile = tile.resize((width * zoom, height * zoom), Image.Resampling.NEAREST)
        row, column = divmod(index, columns)
        grid.paste(tile, (gap + column * tile_width, gap + row * tile_height))
    return grid


def stack_rows(rows: Mapping[str, Tensor]) -> Image.Image:
    """Returns one picture with a captioned row of images uint8 (N, 3, H, W) per model; equal columns have equal seeds."""
    font = ImageFont.load_default(CAPTION_SIZE)
    strips = {caption: make_grid(images, len(images)) for caption, images in rows.items()}
    band = CAPTION_SIZE + 6
    width = max(max(strip.width, int(font.getlength(caption)) + 8) for caption, strip in strips.items())
    sheet = Image.new("RGB", (width, sum(strip.height + band for strip in strips.values())), "white")
    top = 0
    for caption, strip in strips.items():
        ImageDraw.Draw(sheet).text((4, top + 3), caption, fill="black", font=font)
        sheet.paste(strip, (0, top + band))
        top += band + strip.height
    return sheet
