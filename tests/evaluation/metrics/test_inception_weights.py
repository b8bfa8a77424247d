import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import cached_assets_path
from safetensors.torch import save_file

from dmquant.errors import DamagedFile, MissingResource
from dmquant.evaluation.metrics import inception_weights
from dmquant.evaluation.metrics.inception_v3 import InceptionV3


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Iterator[Path]:
    """A file of random weights with the names of the published file, which has no batch counters."""
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    with torch.device("meta"):
        shapes = InceptionV3().state_dict()
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.rand(t.shape, generator=generator) * 0.05 for name, t in shapes.items() if t.is_floating_point()}
    torch.save(tensors, path)
    yield path
    path.unlink()  # 91 MiB


@pytest.fixture(scope="module")
def sha256(file) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


@pytest.fixture(autouse=True)
def empty_caches(tmp_path, monkeypatch):
    monkeypatch.delenv(inception_weights.VARIABLE, raising=False)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr("huggingface_hub.constants.HF_ASSETS_CACHE", str(tmp_path / "assets"))
    monkeypatch.setattr("huggingface_hub.utils._cache_assets.HF_ASSETS_CACHE", str(tmp_path / "assets"))


def test_a_file_of_the_expected_hash_loads_and_gives_2048_features(file, sha256):
    network, found = inception_weights.load_inception(file, sha256_prefix=sha256[:8])
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)

    with torch.no_grad():
        features = network(images)

    assert features.shape == (2, 2048) and features.isfinite().all() and features.std() > 0
    assert found == sha256 and not network.training
    assert all(not p.is_meta and not p.requires_grad for p in network.parameters())


def test_a_safetensors_conversion_holds_the_same_network(file, sha256, tmp_path):
    tensors = torch.load(file, weights_only=True)
    save_file(tensors, tmp_path / "inception.safetensors")
    network, _ = inception_weights.load_inception(tmp_path / "inception.safetensors")
    assert all(torch.equal(network.state_dict()[name], tensor) for name, tensor in tensors.items())


def test_a_file_of_another_hash_is_refused_before_it_is_read(tmp_path):
    (tmp_path / "other.pth").write_bytes(b"anything")
    with pytest.raises(DamagedFile, match="expected 6726825d"):
        inception_weights.load_inception(tmp_path / "other.pth")


@pytest.mark.parametrize("content", [b"", b"anything", b"\x80\x02cos\nsystem\n."])
def test_a_file_that_holds_no_tensors_is_damaged(tmp_path, content):
    (tmp_path / "other.pth").write_bytes(content)
    with pytest.raises(DamagedFile, match="cannot be read as weights"):
        inception_weights.load_inception(tmp_path / "other.pth", sha256_prefix="")
    (tmp_path / "other.safetensors").write_bytes(content)
    with pytest.raises(DamagedFile, match="cannot be read as weights"):
        inception_weights.load_inception(tmp_path / "other.safetensors")


def test_code_in_the_file_is_not_run(tmp_path):
    class Payload:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    torch.save({"fc.weight": Payload()}, tmp_path / "hostile.pth")
    with pytest.raises(DamagedFile):
        inception_weights.load_inception(tmp_path / "hostile.pth", sha256_prefix="")
    assert not (tmp_path / "ran").exists()


def test_a_missing_or_misshapen_tensor_is_named(tmp_path):
    save_file({"fc.weight": torch.zeros(2, 2)}, tmp_path / "part.safetensors")
    with pytest.raises(DamagedFile, match="Conv2d_1a_3x3.conv.weight"):
        inception_weights.load_inception(tmp_path / "part.safetensors")


def test_the_error_of_missing_weights_names_url_file_hash_and_folder():
    with pytest.raises(MissingResource) as error:
        inception_weights.load_inception()
    hub = str(inception_weights.cache_paths()[0].parent)
    ways_out = ("--inception-weights", inception_weights.VARIABLE, "dmquant fetch inception")
    for word in (inception_weights.URL, inception_weights.FILE_NAME, "6726825d", hub, *ways_out):
        assert word in str(error.value)
    assert error.value.exit_code == 3


def test_a_path_that_does_not_exist_is_not_replaced_by_the_cache(tmp_path):
    place = inception_weights.cache_paths()[0]
    place.parent.mkdir(parents=True)
    place.write_bytes(b"cached")
    with pytest.raises(MissingResource, match="nowhere.pth"):
        inception_weights.find_inception(tmp_path / "nowhere.pth")


def test_a_given_path_has_priority_over_the_variable_and_the_variable_over_the_caches(tmp_path, monkeypatch):
    given, named = tmp_path / "given.pth", tmp_path / "named.pth"
    for place in reversed([given, named, *inception_weights.cache_paths()]):
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(b"")
        if place == named:
            monkeypatch.setenv(inception_weights.VARIABLE, str(named))
        assert inception_weights.find_inception(given if place == given else None) == place


def test_our_cache_is_where_huggingface_hub_keeps_assets():
    assert inception_weights.cache_paths()[-1].parent == cached_assets_path("dmquant", subfolder="inception")


def test_a_downloaded_file_is_checked_and_found_by_loading(tmp_path):
    source = tmp_path / "source.pth"
    source.write_bytes(b"weights")
    prefix = hashlib.sha256(b"weights").hexdigest()[:8]
    assert inception_weights.fetch_inception(url=source.as_uri(), sha256_prefix=prefix) == inception_weights.find_inception()


def test_a_download_with_another_hash_leaves_no_file(tmp_path):
    source = tmp_path / "source.pth"
    source.write_bytes(b"a login page")
    with pytest.raises(DamagedFile, match="not the expected file"):
        inception_weights.fetch_inception(url=source.as_uri())
    with pytest.raises(MissingResource, match="cannot be reached"):
        inception_weights.fetch_inception(url=(tmp_path / "nowhere.pth").as_uri())
    assert not list(inception_weights.cache_paths()[-1].parent.iterdir())
