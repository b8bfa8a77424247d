"""Geometry of a convolution: kernel size, stride and padding, and the sizes that follow from them."""

from dataclasses import dataclass

from dmquant.kernels.layouts import fill_up

ROW = 32  # pixels of a row of a pointwise layer, whose pixels form no image: threads share rows


@dataclass(frozen=True, slots=True)
class ConvGeometry:
    """Kernel size and stride as (height, width), zero padding as (top, bottom, left, right), all in pixels."""

    kernel_size: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)

    @property
    def taps(self) -> int:
        """Number of kernel positions K."""
        return self.kernel_size[0] * self.kernel_size[1]

    def output_size(self, height: int, width: int, upsample: int = 1) -> tuple[int, int]:
        """Returns (H', W') for an input of this height and width, enlarged by the factor `upsample` before the convolution."""
        top, bottom, left, right = self.padding
        padded = height * upsample + top + bottom, width * upsample + left + right
        rows, columns = ((size - kernel) // stride + 1 for size, kernel, stride in zip(padded, self.kernel_size, self.stride))
        return rows, columns


POINTWISE = ConvGeometry()  # of a linear layer and of a 1x1 convolution without stride and padding


def split_rows(pixels: int) -> tuple[int, int, int]:
    """Returns the number of rows of ROW pixels, their width, and the width of the last row, which holds the remainder."""
    rows = fill_up(pixels, ROW) // ROW
    return rows, ROW, pixels - (rows - 1) * ROW
