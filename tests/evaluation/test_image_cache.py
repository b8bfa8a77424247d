"""Tests of the image cache: stored images are found for equal pipelines, options and seeds, and for no others."""

import warnings

import pytest
import torch

from dmquant.diffusion.conditioning import Conditioning
from dmquant.diffusion.pipeline import find_target, open_pipeline
from dmquant.diffusion.sampling import set_sampler
from dmquant.evaluation import image_cache
from dmquant.evaluation.image_cache import ImageBatch, ImageCache, default_folder, hash_pipeline, name_folder
from tests.text import make_text_pipeline


@pytest.fixture
def pipeline(tiny_folder):
    return open_pipeline(tiny_folder)


@pytest.fixture
def drawing(monkeypatch):
    """Returns the seeds of every call of the sampler, which is replaced by noise."""
    calls = []

    def generate(pipeline, seeds, plan):
        calls.append(list(seeds))
        yield torch.randint(0, 256, (len(seeds), 3, 8, 8), generator=torch.Generator().manual_seed(seeds[0])).to(torch.uint8)

    monkeypatch.setattr(image_cache, "generate", generate)
    return calls


def test_images_are_generated_once_and_found_with_their_time(pipeline, drawing, tmp_path):
    first = ImageCache(pipeline, steps=2, folder=tmp_path).load_or_generate(range(4))
    again = ImageCache(pipeline, steps=2, folder=tmp_path).load_or_generate(range(4))
    assert torch.equal(first.images, again.images) and first[1:] == again[1:] and drawing == [[0, 1, 2, 3]]


def test_only_seeds_of_one_batch_are_found(pipeline, drawing, tmp_path):
    kept = ImageCache(pipeline, steps=2, folder=tmp_path)
    for seeds in (range(4), range(2), range(1, 4), range(4)):
        kept.load_or_generate(seeds)
    assert drawing == [[0, 1, 2, 3], [0, 1], [1, 2, 3]]


def test_without_a_folder_nothing_is_stored(pipeline, drawing, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        ImageCache(pipeline, steps=2).load_or_generate(range(2))
    assert len(drawing) == 2 and list(tmp_path.iterdir()) == []


def test_whatever_changes_the_images_changes_the_folder(pipeline, tiny_folder, monkeypatch):
    monkeypatch.delenv("DMQUANT_KERNELS", raising=False)
    names = [name_folder(find_target(pipeline), 2), name_folder(find_target(pipeline), 3)]
    set_sampler(pipeline, "dpm++")
    names.append(name_folder(find_target(pipeline), 2))
    with torch.no_grad():
        pipeline.unet.conv_out.bias[0] += 1e-6
    names.append(name_folder(find_target(pipeline), 2))
    names.append(name_folder(find_target(open_pipeline(tiny_folder).to(torch.bfloat16)), 2))
    monkeypatch.setenv("DMQUANT_KERNELS", "torch")
    names.append(name_folder(find_target(pipeline), 2))
    monkeypatch.setattr(image_cache, "hash_sources", lambda: "edited")
    names.append(name_folder(find_target(pipeline), 2))
    assert len(set(names)) == 7


def test_other_prompts_labels_or_guidance_are_other_images(drawing, tmp_path):
    pipeline = make_text_pipeline()
    asked = [Conditioning(("cat", "dog")), Conditioning(("dog", "cat")), Conditioning(("cat", "dog"), guidance=2.0)]
    for conditioning in asked:
        ImageCache(pipeline, steps=2, conditioning=conditioning, folder=tmp_path).load_or_generate(range(2))
    assert len(drawing) == 3
    own_scale = Conditioning(("cat", "dog"), guidance=7.5)  # equals the default
    ImageCache(pipeline, steps=2, conditioning=own_scale, folder=tmp_path).load_or_generate(range(2))
    assert len(drawing) == 3


def test_another_tokenizer_is_another_pipeline():
    one, other = make_text_pipeline(), make_text_pipeline()
    assert hash_pipeline(one) == hash_pipeline(other)
    other.tokenizer.add_tokens(["cat"])
    assert hash_pipeline(one) != hash_pipeline(other)


def test_the_path_of_a_pipeline_does_not_matter(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path / "copy")
    assert hash_pipeline(open_pipeline(tmp_path / "copy")) == hash_pipeline(pipeline)


def test_layers_of_another_class_have_other_images(pipeline):
    class Careful(torch.nn.Conv2d):
        pass

    before = hash_pipeline(pipeline)
    pipeline.unet.conv_in.__class__ = Careful
    assert hash_pipeline(pipeline) != before


@pytest.mark.parametrize("damage", [lambda data: data[:-1] + bytes([data[-1] ^ 1]), lambda data: data[:20], lambda data: b""])
def test_images_of_a_damaged_file_are_generated_again_with_a_warning(pipeline, drawing, tmp_path, damage):
    expected = ImageCache(pipeline, steps=2, folder=tmp_path).load_or_generate(range(3)).images
    file = next(tmp_path.rglob("*.safetensors"))
    file.write_bytes(damage(file.read_bytes()))
    with pytest.warns(UserWarning, match="is damaged"):
        assert torch.equal(ImageCache(pipeline, steps=2, folder=tmp_path).load_or_generate(range(3)).images, expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ImageCache(pipeline, steps=2, folder=tmp_path).load_or_generate(range(3))
    assert len(drawing) == 2


def test_a_full_disk_ends_storing_and_not_generating(pipeline, drawing, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(image_cache.os, "replace", fail)
    kept = ImageCache(pipeline, steps=2, folder=tmp_path)
    with pytest.warns(UserWarning, match="not stored from here on: .*No space"):
        kept.load_or_generate(range(2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kept.load_or_generate(range(2, 4))
    assert drawing == [[0, 1], [2, 3]] and not any(path.is_file() for path in tmp_path.rglob("*"))


def test_the_variable_sets_the_folder(monkeypatch, tmp_path):
    monkeypatch.setenv(image_cache.VARIABLE, str(tmp_path))
    assert default_folder() == tmp_path
    monkeypatch.delenv(image_cache.VARIABLE)
    assert default_folder().parts[-3:] == ("dmquant", "default", "images")


def test_images_are_those_of_the_pipeline(pipeline):
    batch = ImageCache(pipeline, steps=2).load_or_generate(range(2))
    assert isinstance(batch, ImageBatch) and batch.images.shape == (2, 3, 8, 8) and batch.seconds > 0 and batch.peak_bytes == 0
