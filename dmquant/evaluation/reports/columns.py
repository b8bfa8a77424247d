"""The quantities that reports are compared by: how each is called, its unit, which way is better, how it is rounded."""

from dataclasses import dataclass, replace

Cell = str | int | float | None
ABSENT = "–"


@dataclass(frozen=True)
class Column:
    """One quantity."""

    key: str
    title: str
    unit: str = ""
    better: str = ""  # "lower", "higher" or neither
    decimals: int = 2
    is_signed: bool = False

    @property
    def heading(self) -> str:
        arrow = {"lower": " ↓", "higher": " ↑", "": ""}[self.better]
        return self.title + (f", {self.unit}" if self.unit else "") + arrow

    def write(self, value: Cell) -> str:
        """The value as a reader wants it."""
        if value is None:
            return ABSENT
        if isinstance(value, float):
            return f"{value:{'+' if self.is_signed else ''},.{self.decimals}f}"
        return str(value)

    @property
    def is_change(self) -> bool:
        """Whether it repeats another column, as a difference to the float model."""
        return self.key.endswith(CHANGE)


CHANGE = "_change"
IDENTITY = (Column("model", "model"), Column("method", "method"), Column("bits", "W/A"))
COST = (
    Column("size_mb", "size", "MB", "lower"),
    Column("size_ratio", "float size / size", "", "higher"),
    Column("bits_per_weight", "bits/weight", "", "lower"),
    Column("giga_ops", "OPs", "G", "lower", 3),
)
NUM_IMAGES = Column("num_images", "n")
TIME = Column("seconds_per_image", "time", "s/image", "lower", 3)
MEMORY = Column("peak_memory_mb", "peak memory", "MB", "lower", 1)
QUANTIZING = (
    Column("quantize_s", "quantize", "s", "lower", 0),
    Column("quantize_memory_mb", "quantizing memory", "MB", "lower", 0),
)
METRICS = {
    "fid": Column("fid", "FID", "", "lower"),
    "sfid": Column("sfid", "sFID", "", "lower"),
    "kid": Column("kid", "KID", "", "lower", 5),
    "is": Column("is", "IS", "", "higher"),
    "precision": Column("precision", "precision", "", "higher", 3),
    "recall": Column("recall", "recall", "", "higher", 3),
    "density": Column("density", "density", "", "higher", 3),
    "coverage": Column("coverage", "coverage", "", "higher", 3),
    "clip_score": Column("clip_score", "CLIP score", "", "higher"),
    "psnr": Column("psnr", "PSNR to float", "dB", "higher"),
    "ssim": Column("ssim", "SSIM to float", "", "higher", 4),
    "cosine": Column("cosine", "cosine to float", "", "higher", 5),
}
# the same quantities in features that are not Inception's: short name -> (title, decimals)
ELSEWHERE = {"fid": ("fd", "FD", 4), "sfid": ("sfd", "SFD", 4), "kid": ("kd", "KD", 5), "is": ("cs", "CS", 3)}
DISTANCES = ("fid", "sfid")


def name_metric(name: str) -> Column:
    """The column of a metric, also where its name carries an extractor's: `fd-resnet-cifar10`."""
    kind, extractor = split_name(name)
    if kind not in METRICS:
        return Column(name, name, "", "", 4)
    known = METRICS[kind]
    if not extractor:
        return known
    if kind not in ELSEWHERE:  # a name that promises no network: whose features it was taken in stands in the protocol
        return replace(known, key=name)
    _, title, decimals = ELSEWHERE[kind]
    return Column(name, f"{title} {extractor}", known.unit, known.better, decimals)


def split_name(name: str) -> tuple[str, str]:
    """What a metric measures and in whose features: "sfd-vgg" -> ("sfid", "vgg"), "fid" -> ("fid", "")."""
    short, _, extractor = name.partition("-")
    kinds = {entry[0]: kind for kind, entry in ELSEWHERE.items()}
    return kinds.get(short, short) if extractor else name, extractor


def is_distance(name: str) -> bool:
    """Whether it is a Frechet distance, in any features."""
    return split_name(name)[0] in DISTANCES


def rank(name: str) -> tuple[int, str]:
    """Order of metrics in a table."""
    order, (kind, extractor) = list(METRICS), split_name(name)
    return (order.index(kind) if kind in order else len(order), extractor or name)
