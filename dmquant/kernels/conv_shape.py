"""."""

from collections.abc import Sequence

from torch import Tensor

from dmquant.kernels.layouts import fill_up

ROW = 32  # pixels of a row where the layer does not care: rows are what threads share
POINT = (1, 1, 1, 1, 0, 0, 0, 0)  # the window of a linear layer


def output_size(x: Tensor, window: Sequence[int], zoom: int = 1) -> tuple[int, int]:
    """Height and width of the output for x (N, H, W, C)."""
    return size_behind(x.shape[1], x.shape[2], window, zoom)


def size_behind(height: int, width: int, window: Sequence[int], zoom: int) -> tuple[int, int]:
    """The same for an image of this height and width."""
    kernel_h, kernel_w, stride_h, stride_w, top, bottom, left, right = window
    return (height * zoom + top + bottom - kernel_h) // stride_h + 1, (width * zoom + left + right - kernel_w) // stride_w + 1


def rows_of(pixels: int) -> tuple[int, int, int]:
    """Rows of 32 pixels, their width, and that of the last one, which has what is left: where the shape of an image means
    nothing."""
    rows = fill_up(pixels, ROW) // ROW
    return rows, ROW, pixels - (rows - 1) * ROW
