"""The columns of a comparison: key, title, unit, direction (lower or higher is better), decimals of each quantity."""

from dataclasses import dataclass, replace

Cell = str | int | float | None
ABSENT = "–"


@dataclass(frozen=True)
class Column:
    """One quantity of a report. `key` is its name in CSV and JSON, `title` its name in tables and plots."""

    key: str
    title: str
    unit: str = ""
    better: str = ""  # "lower", "higher", or "" where neither is better
    decimals: int = 2
    is_signed: bool = False

    @property
    def heading(self) -> str:
        """The title with its unit and an arrow (↓ lower is better, ↑ higher is better)."""
        arrow = {"lower": " ↓", "higher": " ↑", "": ""}[self.better]
        return self.title + (f", {self.unit}" if self.unit else "") + arrow

    def format(self, value: Cell) -> str:
        """Returns a float rounded to `decimals`, other values as text, and ABSENT for None."""
        if value is None:
            return ABSENT
        if isinstance(value, float):
            return f"{value:{'+' if self.is_signed else ''},.{self.decimals}f}"
        return str(value)

    @property
    def is_change(self) -> bool:
        """Whether the column shows the change of another column against the float model."""
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
# metrics of features that are not Inception's: metric -> (short name in keys, title, decimals)
OTHER_FEATURES = {"fid": ("fd", "FD", 4), "sfid": ("sfd", "SFD", 4), "kid": ("kd", "KD", 5), "is": ("cs", "CS", 3)}
DISTANCES = ("fid", "sfid")


def name_metric(name: str) -> Column:
    """Returns the column of a metric; a name may end in that of an extractor, as in `fd-resnet-cifar10`."""
    kind, extractor = split_name(name)
    if kind not in METRICS:
        return Column(name, name, "", "", 4)
    known = METRICS[kind]
    if not extractor:
        return known
    if kind not in OTHER_FEATURES:  # a title that implies no network; the protocol names the extractor
        return replace(known, key=name)
    _, title, decimals = OTHER_FEATURES[kind]
    return Column(name, f"{title} {extractor}", known.unit, known.better, decimals)


def split_name(name: str) -> tuple[str, str]:
    """Returns the metric and the extractor that a name consists of: "sfd-vgg" -> ("sfid", "vgg"), "fid" -> ("fid", "")."""
    short, _, extractor = name.partition("-")
    kinds = {entry[0]: kind for kind, entry in OTHER_FEATURES.items()}
    return kinds.get(short, short) if extractor else name, extractor


def is_distance(name: str) -> bool:
    """Whether a metric is a Frechet distance, in the features of any extractor."""
    return split_name(name)[0] in DISTANCES


def sort_key(name: str) -> tuple[int, str]:
    """Returns the key that sorts metrics in the order of METRICS, then by extractor; unknown ones come last."""
    order, (kind, extractor) = list(METRICS), split_name(name)
    return (order.index(kind) if kind in order else len(order), extractor or name)
