import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from dmquant.errors import InputError, MissingResource
from dmquant.evaluation.metrics import feature_extractor as module
from dmquant.evaluation.metrics.feature_extractor import Extractor, load_embedded, load_extractor
from dmquant.evaluation.metrics.reference_stats import DEFAULT, FOLDER, MORE, open_reference
from dmquant.evaluation.metrics.resnet import ResNetExtractor


def images(count: int = 3, size: int = 32) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, size, size), generator=torch.Generator().manual_seed(0)).to(torch.uint8)


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    tensors = {k: v.half() if v.is_floating_point() else v for k, v in ResNetExtractor(10).state_dict().items()}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "record.json").write_text(json.dumps({"name": "resnet-cifar10", "classes": list("0123456789")}))
    return tmp_path


def test_the_embedded_extractor_comes_with_its_name_and_hash(folder, monkeypatch):
    monkeypatch.setattr(module, "EMBEDDED_FOLDER", folder)
    network, name, sha256 = load_extractor("resnet-cifar10")
    assert name == "resnet-cifar10" and len(sha256) == 64
    assert not network.training and next(network.parameters()).dtype == torch.float32


def test_features_are_float64_rows_that_do_not_depend_on_the_batch(folder):
    extractor = load_embedded(folder)
    features = extractor.features(images())
    assert features.shape == (3, extractor.network.num_features) and features.dtype == torch.float64
    one_by_one = torch.cat([extractor.features(one) for one in images().split(1)])
    assert torch.allclose(features, one_by_one, atol=1e-5)


def test_the_embedded_network_returns_spatial_features_and_logits_too(folder):
    extractor = load_embedded(folder)
    seen = extractor.read(images())
    x = images().float() / 127.5 - 1
    network = extractor.network
    middle = network.blocks[:3](torch.relu(network.norm(network.stem(x))))  # (B, 128, 8, 8)
    assert seen.spatial.shape == (3, network.num_spatial) == (3, 448)
    assert torch.allclose(seen.spatial[:, (2 * 8 + 5) * 7 + 6].float(), middle[:, 6, 2, 5], atol=1e-6)
    assert torch.allclose(seen.logits.float(), network.classify(x), atol=1e-5)
    assert {part.dtype for part in seen} == {torch.float64}


def test_autocast_around_does_not_change_the_features(folder):
    extractor = load_embedded(folder)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = extractor.features(images())
    assert torch.equal(inside, extractor.features(images()))


def test_images_of_another_size_or_type_are_refused(folder):
    extractor = load_embedded(folder)
    with pytest.raises(InputError, match="takes 32x32 images, got 64x64; try extractor inception"):
        extractor.features(images(size=64))
    with pytest.raises(InputError, match="uint8"):
        extractor.features(images().float())


def test_a_network_without_a_fixed_size_takes_any():
    network = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 5))

    class AnySize(nn.Module):
        def __init__(self):
            super().__init__()
            self.network = network

        def forward(self, x):
            return self.network(x.float())

    seen = Extractor(AnySize(), "any", "").read(images(size=7))
    assert seen.features.shape == (3, 5) and seen.spatial is None and seen.logits is None


def test_an_unknown_name_is_refused_with_the_most_similar_one_or_the_list():
    with pytest.raises(InputError, match="did you mean 'inception'"):
        load_extractor("inceptoin")
    with pytest.raises(InputError, match="known: resnet-cifar10, inception"):
        load_extractor("vgg")


def test_inception_without_weights_is_never_replaced_by_another_network(tmp_path):
    with pytest.raises(MissingResource, match="nowhere"):
        load_extractor("inception", tmp_path / "nowhere.pth")


def test_the_embedded_extractor_is_accurate_and_small_and_made_the_embedded_reference():
    record = json.loads((module.EMBEDDED_FOLDER / "record.json").read_text())
    assert record["test_accuracy"] >= 0.85 and (module.EMBEDDED_FOLDER / "model.safetensors").stat().st_size < 5e6
    extractor = load_extractor(module.EMBEDDED)
    file = FOLDER / f"{DEFAULT}.{extractor.name}.npz"
    with np.load(file) as stats:
        meta = json.loads(str(stats["meta"]))
    assert extractor.name == record["name"] == meta["extractor"]
    assert (extractor.sha256, record["train_sha256"]) == (meta["extractor_sha256"], meta["source_sha256"])
    reference = open_reference(None, extractor)
    assert reference.num_images == record["train_images"] == 50000
    with np.load(FOLDER / MORE / file.name) as more:
        assert json.loads(str(more["meta"])) == meta
    assert len(reference.features) == 5000 and len(reference.spatial.mu) == extractor.network.num_spatial
    # the kept features represent all
    mean, spread = reference.features.double().mean(0), reference.sigma.diagonal().sqrt()
    assert ((mean - reference.mu).abs() < 5 * spread / 5000**0.5).all()
