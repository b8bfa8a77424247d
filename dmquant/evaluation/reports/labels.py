"""Where the labels of points stand, so that none covers another, a point, or the frame."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

LETTER, HEIGHT = 6.6, 14  # pixels: width of a letter, about, and height of a line
REACH = 7  # pixels between a point and its label
RADIUS = 5  # of a point
MAX_SHIFT = 12  # half lines that a label may stand above or below its point


@dataclass(frozen=True)
class Box:
    """Pixels, y downwards."""

    left: float
    top: float
    right: float
    bottom: float

    def meets(self, other: "Box") -> bool:
        across = self.left < other.right and other.left < self.right
        return across and self.top < other.bottom and other.top < self.bottom

    def holds(self, other: "Box") -> bool:
        across = self.left <= other.left and other.right <= self.right
        return across and self.top <= other.top and other.bottom <= self.bottom


def place_labels(points: Sequence[tuple[float, float]], labels: Sequence[str], frame: Box) -> list[Box]:
    """A box for each label, as near to its point as is free: above or below, right or left. The first come first.

    Where nothing is free, the nearest place.
    """
    taken = [Box(x - RADIUS, y - RADIUS, x + RADIUS, y + RADIUS) for x, y in points]
    boxes = []
    for (x, y), label in zip(points, labels, strict=True):
        places = [box for box in _list_places(x, y, LETTER * len(label)) if frame.holds(box)]
        free = (box for box in places if not any(box.meets(other) for other in taken))
        box = next(free, places[0] if places else next(_list_places(x, y, LETTER * len(label))))
        taken.append(box)
        boxes.append(box)
    return boxes


def _list_places(x: float, y: float, width: float) -> Iterator[Box]:
    """Beside the point, right then left, and ever further above and below."""
    for shift in sorted(range(-MAX_SHIFT, MAX_SHIFT + 1), key=abs):
        middle = y + shift * HEIGHT / 2
        for left in (x + REACH, x - REACH - width):
            yield Box(left, middle - HEIGHT / 2, left + width, middle + HEIGHT / 2)
