"""The score equals the cosine computed from the parts of CLIP, image by image."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPModel

from dmquant.errors import DamagedFile, InputError, MissingResource
from dmquant.evaluation.metrics.base import Batch
from dmquant.evaluation.metrics.clip_score import DEFAULT, Clip, ClipScore, fetch_clip, load_clip
from dmquant.evaluation.metrics.inception_weights import hash_file
from tests.text import LONGEST, make_tokenizer, save_clip

PROMPTS = ("a red cat", "x", "two dogs and a house")
MEAN, DEVIATION = (np.array(line) for line in ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_clip(tmp_path_factory.mktemp("models") / "clip")


@pytest.fixture(scope="module")
def clip(folder) -> Clip:
    return load_clip(folder)


@pytest.fixture
def images():
    return torch.randint(0, 256, (3, 3, 20, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def cosine_by_hand(image: np.ndarray, prompt: str, folder) -> float:
    """Oracle: preprocessing, encoders, projections and cosine in float64, without processor and padding."""
    network = CLIPModel.from_pretrained(folder).double().eval()
    resized = Image.fromarray(image).resize((19, 16), Image.Resampling.BICUBIC)  # the shorter side to 16, then a centre crop
    pixels = (np.asarray(resized)[:, 1:17] / 255 - MEAN) / DEVIATION
    words = make_tokenizer()(prompt)["input_ids"]
    words = [*words[: LONGEST - 1], words[-1]] if len(words) > LONGEST else words
    with torch.no_grad():
        seen = network.visual_projection(network.vision_model(torch.tensor(pixels).permute(2, 0, 1)[None]).pooler_output)[0]
        read = network.text_projection(network.text_model(torch.tensor([words])).pooler_output)[0]
    return float(seen @ read / math.sqrt((seen @ seen) * (read @ read)))


@pytest.mark.filterwarnings("ignore")  # from inside transformers
def test_the_score_is_a_hundred_times_the_cosine_of_two_embeddings(clip, folder, images):
    expected = [100 * cosine_by_hand(i.permute(1, 2, 0).numpy(), p, folder) for i, p in zip(images, PROMPTS)]
    match = clip.match(images, PROMPTS)
    assert match.dtype == torch.float64 and match.tolist() == pytest.approx(expected, abs=1e-3)
    assert len({round(value, 2) for value in expected}) == 3
    score = ClipScore()
    for part in (slice(0, 2), slice(2, 3)):
        score.update(Batch(images[part], match=clip.match(images[part], PROMPTS[part])))
    assert score.compute() == {"clip_score": pytest.approx(max(np.mean(expected), 0), abs=1e-3)}


def test_the_mean_is_clamped_and_not_each_image(images):
    score = ClipScore()
    score.update(Batch(images, match=torch.tensor([30.0, -10.0, 10.0])))
    assert score.compute() == {"clip_score": 10.0}
    score.update(Batch(images, match=torch.tensor([-90.0, -90.0, 0.0])))
    assert score.compute() == {"clip_score": 0.0}


def test_a_long_prompt_is_truncated_to_the_context(clip, images):
    long = "abcdefghijklmnopqrstuvwxyz " * 9
    assert torch.equal(clip.match(images[:1], [long]), clip.match(images[:1], [long + "and more"]))


def test_loading_returns_name_and_hash_and_prints_nothing(clip, folder, capfd):
    assert (clip.name, clip.sha256) == ("clip", hash_file(folder / "model.safetensors"))
    load_clip(str(folder))
    assert capfd.readouterr() == ("", "")
    assert not clip.network.training and not any(p.requires_grad for p in clip.network.parameters())


def test_the_error_of_a_missing_clip_names_the_command_to_download_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MissingResource, match="get it with: dmquant fetch clip"):
        load_clip()
    with pytest.raises(MissingResource, match="get it with: hf download org/clip"):
        load_clip("org/clip")
    with pytest.raises(MissingResource, match="'no/such/folder' is no folder here"):
        load_clip("no/such/folder")
    with pytest.raises(MissingResource, match=f"CLIP '{DEFAULT}' cannot be fetched"):
        fetch_clip()


def test_the_error_without_transformers_names_the_command_to_install_it(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(MissingResource, match=r"pip install 'dmquant\[text\]'"):
        load_clip()


@pytest.fixture
def copy(folder, tmp_path):
    """A copy of the folder that a test may damage."""
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def test_a_folder_without_a_complete_clip_is_refused(copy):
    weights, config = copy / "model.safetensors", json.loads((copy / "config.json").read_text())
    tensors = load_file(weights)
    save_file({name: value for name, value in tensors.items() if "visual_projection" not in name}, weights, {"format": "pt"})
    with pytest.raises(DamagedFile, match="1 tensors are missing: visual_projection.weight"):
        load_clip(copy)
    weights.write_bytes(b"nothing")
    with pytest.raises(DamagedFile, match="cannot be loaded as CLIP"):
        load_clip(copy)
    weights.rename(copy / "pytorch_model.bin")
    with pytest.raises(MissingResource, match="pickled weights are not read"):
        load_clip(copy)
    (copy / "config.json").write_text(json.dumps(config | {"model_type": "siglip"}))
    with pytest.raises(InputError, match="type 'siglip', not clip"):
        load_clip(copy)
    (copy / "config.json").write_text("[]")
    with pytest.raises(DamagedFile, match="is no JSON object"):
        load_clip(copy)
    (copy / "config.json").unlink()
    with pytest.raises(InputError, match="holds no CLIP"):
        load_clip(copy)
