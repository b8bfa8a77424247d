import io
import json
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from dmquant.diffusion.image_files import list_images
from dmquant.errors import DamagedFile, InputError
from dmquant.evaluation.metrics import npz
from dmquant.evaluation.metrics import reference_stats as module
from dmquant.evaluation.metrics.feature_extractor import Extractor
from dmquant.evaluation.metrics.reference_stats import compute_reference, open_reference, save_reference

WIDTH = 6


class Moments(nn.Module):
    """A feature extractor that returns mean and deviation of each colour."""

    num_features = WIDTH

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, images):
        x = images.float() * self.scale
        return torch.cat([x.mean((2, 3)), x.std((2, 3))], 1)


class Everything(Moments):
    """The same extractor with spatial features."""

    num_spatial = 4

    def read(self, images):
        return self(images), images[:, 0, :2, :2].float().flatten(1), None


@pytest.fixture
def extractor() -> Extractor:
    return Extractor(Moments(), "moments", "a" * 64)


@pytest.fixture
def seeing() -> Extractor:
    return Extractor(Everything(), "moments", "a" * 64)


def write_images(folder: Path, count: int = 7, size: int = 8) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    for i in range(count):
        Image.fromarray(generator.integers(0, 256, (size, size, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return folder


def moments(seed: int = 0, width: int = WIDTH) -> dict[str, np.ndarray]:
    rows = np.random.default_rng(seed).normal(size=(50, width))
    return {"mu": rows.mean(0), "sigma": np.cov(rows, rowvar=False)}


def write_npz(path: Path, **arrays) -> Path:
    np.savez(path, **arrays)
    return path


def test_statistics_of_a_folder_are_the_mean_and_covariance_of_its_features(tmp_path, extractor):
    folder = write_images(tmp_path / "images")
    pixels = torch.stack([torch.from_numpy(np.array(Image.open(folder / f"{i}.png"))).permute(2, 0, 1) for i in range(7)])
    features = extractor.features(pixels).numpy()

    found = open_reference(folder, extractor)

    assert np.allclose(found.mu.numpy(), features.mean(0)) and np.allclose(found.sigma.numpy(), np.cov(features, rowvar=False))
    assert (found.num_images, found.name, found.mu.dtype) == (7, "images", torch.float64)


def test_the_batch_changes_neither_the_statistics_nor_the_hash(tmp_path, extractor):
    files = list_images(write_images(tmp_path))
    whole, parts = (compute_reference(files, extractor, name="x", batch=batch) for batch in (100, 3))
    assert torch.allclose(whole.sigma, parts.sigma) and whole.sha256 == parts.sha256


def test_images_are_resized_to_the_size_of_the_generated_ones(tmp_path, extractor):
    write_images(tmp_path, count=2, size=8)
    write_images(tmp_path / "large", count=2, size=16)
    with pytest.raises(InputError, match="different sizes"):
        open_reference(tmp_path, extractor)
    assert open_reference(tmp_path, extractor, size=8).num_images == 4


def test_one_image_is_not_a_reference(tmp_path, extractor):
    with pytest.raises(InputError, match="at least 2 images, got 1"):
        open_reference(write_images(tmp_path, count=1), extractor)


def test_saved_statistics_are_found_by_name_bit_for_bit(tmp_path, extractor, monkeypatch):
    monkeypatch.setattr(module, "FOLDER", tmp_path / "built-in")
    (tmp_path / "built-in").mkdir()
    made = open_reference(write_images(tmp_path / "images"), extractor)
    save_reference(made, extractor, tmp_path / "built-in" / "set.moments.npz")

    found = open_reference("set", extractor)

    assert torch.equal(found.mu, made.mu) and torch.equal(found.sigma, made.sigma)
    assert (found.name, found.num_images) == ("set", 7)
    assert [file.name for file in (tmp_path / "built-in").iterdir()] == ["set.moments.npz"]


def test_saving_twice_writes_the_same_bytes_and_other_tools_can_read_them(tmp_path, extractor):
    made = open_reference(write_images(tmp_path / "images"), extractor)
    for name in ("a.npz", "b.npz"):
        save_reference(made, extractor, tmp_path / name)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    with np.load(tmp_path / "a.npz", allow_pickle=False) as stats:
        assert stats["mu"].shape == (WIDTH,) and stats["sigma"].shape == (WIDTH, WIDTH) and stats["n"] == 7
        assert json.loads(str(stats["meta"]))["extractor_sha256"] == extractor.sha256


def test_statistics_of_other_weights_under_the_same_name_are_refused(tmp_path, extractor):
    made = open_reference(write_images(tmp_path / "images"), extractor)
    save_reference(made, extractor, tmp_path / "a.npz")
    with pytest.raises(InputError, match="other weights"):
        open_reference(tmp_path / "a.npz", extractor._replace(sha256="b" * 64))


def test_files_of_other_tools_are_read(tmp_path, extractor):
    stats = moments()
    adm = {**stats, "mu_s": np.zeros(3), "sigma_s": np.eye(3), "arr_0": np.zeros((2, 4, 4, 3), np.uint8)}
    single = {key: array.astype(np.float32) for key, array in stats.items()}
    for arrays in (stats, adm, single):
        found = open_reference(write_npz(tmp_path / "stats.npz", **arrays), extractor)
        assert np.allclose(found.mu, stats["mu"]) and np.allclose(found.sigma, stats["sigma"], atol=1e-6)
        assert found.sigma.dtype == torch.float64 and found.num_images is None


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"mu": np.zeros(7)}, InputError, r"mu has shape \(7,\), the extractor needs \(6,\)"),
        ({"sigma": np.eye(7)}, InputError, r"sigma has shape \(7, 7\)"),
        ({"mu": np.zeros(WIDTH, dtype=object)}, InputError, "not numbers"),
        ({"mu": np.array(["1"] * WIDTH)}, InputError, "not numbers"),
        ({"mu": np.full(WIDTH, np.nan)}, DamagedFile, "not finite"),
        ({"sigma": np.full((WIDTH, WIDTH), np.inf)}, DamagedFile, "not finite"),
        ({"sigma": np.triu(np.ones((WIDTH, WIDTH)))}, DamagedFile, "not symmetric"),
        ({"sigma": -np.eye(WIDTH)}, DamagedFile, "positive diagonal"),
        ({"n": np.int64(1)}, DamagedFile, "made from 1 images"),
        ({"meta": np.array("[1]")}, DamagedFile, "meta does not name"),
        ({"meta": np.array("no json")}, DamagedFile, "cannot be read"),
        ({"meta": np.array("x" * 20000)}, DamagedFile, "meta is not a short string"),
    ],
)
def test_a_malformed_file_is_refused_with_its_fault(tmp_path, extractor, change, error, message):
    path = tmp_path / "stats.npz"
    np.savez(path, **{**moments(), **change})
    with pytest.raises(error, match=message):
        open_reference(path, extractor)


def test_a_file_with_other_keys_is_refused_with_the_expected_ones(tmp_path, extractor):
    with pytest.raises(InputError, match="has no 'mu'"):
        open_reference(write_npz(tmp_path / "stats.npz", feats=np.zeros((3, 3))), extractor)


def test_a_zip_bomb_is_refused_from_its_header(tmp_path, extractor):
    path = tmp_path / "bomb.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as npz:
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(header, {"descr": "<f8", "fortran_order": False, "shape": (2**24,)})
        npz.writestr("mu.npy", header.getvalue() + bytes(2**27))
    tracemalloc.start()
    with pytest.raises(InputError, match=r"shape \(16777216,\)"):
        open_reference(path, extractor)
    assert tracemalloc.get_traced_memory()[1] < 2**22
    tracemalloc.stop()


@pytest.mark.parametrize("keep", [0, 10, 400])
def test_a_truncated_file_is_damaged(tmp_path, extractor, keep):
    path = write_npz(tmp_path / "stats.npz", **moments())
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DamagedFile, match="cannot be read"):
        open_reference(path, extractor)


def test_an_altered_file_is_damaged(tmp_path, extractor):
    path = write_npz(tmp_path / "stats.npz", **moments())
    content = bytearray(path.read_bytes())
    content[170] ^= 1  # inside the numbers of mu: the zip's checksum notices
    path.write_bytes(content)
    with pytest.raises(DamagedFile, match="cannot be read"):
        open_reference(path, extractor)


def test_pickles_are_not_opened(tmp_path, extractor):
    (tmp_path / "stats.pkl").write_bytes(b"")
    with pytest.raises(InputError, match="pickle.*convert"):
        open_reference(tmp_path / "stats.pkl", extractor)


def test_a_name_without_statistics_for_this_extractor_is_refused_with_the_built_in_names(tmp_path, extractor, monkeypatch):
    monkeypatch.setattr(module, "FOLDER", tmp_path)
    for file in ("set.other.npz", "birds.moments.npz"):
        (tmp_path / file).touch()
    with pytest.raises(InputError, match="no reference 'set' for moments; built in: birds"):
        open_reference("set", extractor)


def test_spatial_statistics_and_features_are_computed_in_the_same_pass(tmp_path, seeing):
    folder = write_images(tmp_path / "images")
    pixels = torch.stack([torch.from_numpy(np.array(Image.open(folder / f"{i}.png"))).permute(2, 0, 1) for i in range(7)])
    seen = seeing.read(pixels)

    found = open_reference(folder, seeing)

    assert np.allclose(found.spatial.mu, seen.spatial.mean(0)) and np.allclose(found.spatial.sigma, seen.spatial.T.cov())
    assert torch.equal(found.features, seen.features.half())


def test_features_of_a_large_set_are_kept_at_even_spacing(tmp_path, extractor):
    files = list_images(write_images(tmp_path))
    everything, some = (compute_reference(files, extractor, name="x", kept=kept, batch=2).features for kept in (7, 3))
    assert torch.equal(some, everything[[0, 3, 6]])


def test_a_saved_reference_is_read_with_all_its_parts(tmp_path, seeing, extractor):
    made = open_reference(write_images(tmp_path / "images"), seeing)
    save_reference(made, seeing, tmp_path / "a.npz")
    found = open_reference(tmp_path / "a.npz", seeing)
    assert all(torch.equal(a, b) for a, b in zip(made.spatial, found.spatial)) and torch.equal(made.features, found.features)
    for part in ("mu", "spatial", "features"):
        found.require(part)
    assert open_reference(tmp_path / "a.npz", extractor).spatial is None  # an extractor without spatial features


def test_optional_parts_of_a_built_in_reference_are_read_from_a_second_file(tmp_path, seeing, monkeypatch):
    monkeypatch.setattr(module, "FOLDER", tmp_path)
    made = open_reference(write_images(tmp_path / "images"), seeing)
    (tmp_path / "more").mkdir()
    save_reference(made, seeing, tmp_path / "set.moments.npz", parts=["mu"])
    bare = open_reference("set", seeing)
    save_reference(made, seeing, tmp_path / "more" / "set.moments.npz", parts=["spatial", "features"])
    found = open_reference("set", seeing)
    assert bare.features is None and torch.equal(found.features, made.features) and found.sha256 == bare.sha256


def test_missing_parts_are_refused_with_a_hint(tmp_path, seeing):
    found = open_reference(write_npz(tmp_path / "stats.npz", **moments()), seeing)
    with pytest.raises(InputError, match="stats.npz has no features; make one that has: dmquant reference"):
        found.require("features")
    with pytest.raises(InputError, match="has no spatial statistics"):
        found.require("spatial")


def test_features_of_clean_fid_are_read(tmp_path, extractor):
    rows = np.random.default_rng(0).normal(size=(9, WIDTH)).astype(np.float32)
    found = open_reference(write_npz(tmp_path / "stats.npz", feats=rows, **moments()), extractor)
    assert np.array_equal(found.features.numpy(), rows)


@pytest.mark.parametrize(
    "arrays, error, message",
    [
        ({"features": np.zeros((5, 7))}, InputError, r"features has shape \(5, 7\), the extractor needs \(5, 6\)"),
        ({"features": np.zeros(6)}, InputError, r"features has shape \(6,\)"),
        ({"features": np.zeros((1, 6))}, InputError, r"expected \(2 to 200000, 6\)"),
        ({"features": np.full((5, 6), np.nan)}, DamagedFile, "features holds values that are not finite"),
        ({"features": np.zeros((5, 6), dtype=object)}, InputError, "not numbers"),
        ({"mu_s": np.zeros(5), "sigma_s": np.eye(5)}, InputError, r"mu_s has shape \(5,\), the extractor needs \(4,\)"),
        ({"mu_s": np.zeros(4), "sigma_s": -np.eye(4)}, DamagedFile, "sigma_s is not symmetric"),
    ],
)
def test_optional_parts_of_a_file_are_checked_too(tmp_path, seeing, arrays, error, message):
    with pytest.raises(error, match=message):
        open_reference(write_npz(tmp_path / "stats.npz", **moments(), **arrays), seeing)


def test_features_of_adm_images_are_computed_on_request(tmp_path, extractor, monkeypatch):
    pixels = np.random.default_rng(0).integers(0, 256, (7, 5, 6, 3), dtype=np.uint8)
    path = write_npz(tmp_path / "stats.npz", arr_0=pixels, **moments())
    monkeypatch.setattr(npz, "BATCH", 3)
    assert open_reference(path, extractor).features is None
    found = open_reference(path, extractor, parts=["mu", "features"])
    expected = extractor.features(torch.from_numpy(pixels).permute(0, 3, 1, 2)).half()
    assert torch.allclose(found.features.float(), expected.float(), rtol=1e-3)
    monkeypatch.setattr(module, "NUM_KEPT", 3)
    assert torch.equal(open_reference(path, extractor, parts=["features"]).features, found.features[[0, 3, 6]])


@pytest.mark.parametrize(
    "images, error, message",
    [
        (np.zeros((5, 4, 4, 3)), InputError, "arr_0 is float64 .*, not images"),
        (np.zeros((5, 3, 4, 4), np.uint8), InputError, "not images"),
        (np.zeros((1, 4, 4, 3), np.uint8), InputError, "expected uint8"),
        (np.broadcast_to(np.uint8(0), (2, 2049, 2048, 3)), InputError, "not images"),
        (np.asfortranarray(np.zeros((5, 4, 4, 3), np.uint8)), DamagedFile, "Fortran"),
    ],
)
def test_an_array_that_does_not_hold_images_is_refused(tmp_path, extractor, images, error, message):
    path = write_npz(tmp_path / "stats.npz", arr_0=images, **moments())
    with pytest.raises(error, match=message):
        open_reference(path, extractor, parts=["features"])
