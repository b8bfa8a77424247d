"""Files that ship with the package: the embedded pipeline, its feature extractor, reference statistics, the page template."""

from pathlib import Path

ASSETS = Path(__file__).parent
