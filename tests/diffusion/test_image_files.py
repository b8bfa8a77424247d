import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dmquant.diffusion.image_files import hash_images, list_images, load_images, read_images
from dmquant.errors import InputError


def encode(image: Image.Image, form: str = "png") -> bytes:
    content = io.BytesIO()
    image.save(content, form)
    return content.getvalue()


def noise(seed: int = 0, size: tuple[int, int] = (8, 8)) -> Image.Image:
    generator = np.random.default_rng(seed)
    return Image.fromarray(generator.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def write_zip(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def read_one(path: Path, **kwargs) -> torch.Tensor:
    return load_images(list_images(path), **kwargs)[0][0]


def test_a_folder_and_a_zip_of_the_same_pictures_give_the_same_pixels_in_the_same_order(tmp_path):
    members = {f"{label}/{i}.png": encode(noise(i)) for i, label in enumerate(["cat", "dog", "ant"])}
    for name, content in members.items():
        (tmp_path / "folder" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "folder" / name).write_bytes(content)
    archive = write_zip(tmp_path / "set.zip", members)

    plain, files = load_images(list_images(tmp_path / "folder"))
    zipped, _ = load_images(list_images(archive))

    assert [file.label for file in files] == ["ant", "cat", "dog"]
    assert torch.equal(plain, zipped) and hash_images(plain) == hash_images(zipped)


def test_pixels_come_as_they_were_written_channels_first(tmp_path):
    image = noise(size=(5, 7))
    image.save(tmp_path / "a.png")
    assert torch.equal(read_one(tmp_path), torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1))


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "CMYK", "P", "1"])
def test_every_colour_mode_becomes_rgb(tmp_path, mode):
    noise().convert(mode).save(tmp_path / ("a.tif" if mode == "CMYK" else "a.png"))
    pixels = read_one(tmp_path)
    assert pixels.shape == (3, 8, 8) and pixels.dtype == torch.uint8


def test_sixteen_bit_greys_are_scaled_not_clipped(tmp_path):
    Image.fromarray(np.array([[0, 256 * 100, 65535]], dtype=np.uint16)).save(tmp_path / "a.png")
    assert read_one(tmp_path)[0].tolist() == [[0, 100, 255]]


def test_floating_point_pixels_are_refused_because_their_range_is_unknown(tmp_path):
    Image.fromarray(np.full((4, 4), 0.5, dtype=np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(InputError, match="range"):
        read_one(tmp_path)


@settings(max_examples=20, deadline=None)
@given(width=st.integers(1, 40), height=st.integers(1, 40), size=st.integers(1, 24))
def test_any_picture_is_brought_to_the_size_asked_for(tmp_path_factory, width, height, size):
    folder = tmp_path_factory.mktemp("images")
    noise(size=(width, height)).save(folder / "a.png")
    assert read_one(folder, size=size).shape == (3, size, size)


def test_a_size_crops_the_centre_of_the_longer_side(tmp_path):
    image = noise(size=(12, 8))
    image.save(tmp_path / "a.png")
    expected = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)[:, :, 2:10]
    assert torch.equal(read_one(tmp_path, size=8), expected)


def test_different_sizes_need_a_common_one(tmp_path):
    noise(size=(8, 8)).save(tmp_path / "a.png")
    noise(size=(9, 8)).save(tmp_path / "b.png")
    with pytest.raises(InputError, match="different sizes"):
        load_images(list_images(tmp_path))
    assert load_images(list_images(tmp_path), size=8)[0].shape == (2, 3, 8, 8)


def test_one_damaged_file_in_a_hundred_is_skipped_with_a_warning(tmp_path):
    content = encode(noise())
    archive = write_zip(tmp_path / "a.zip", {**{f"{i:03}.png": content for i in range(99)}, "bad.png": content[:40]})
    with pytest.warns(UserWarning, match=r"skipped 1 of 100 .*'bad.png'"):
        assert len(load_images(list_images(archive))[0]) == 99


@pytest.mark.parametrize("content", [b"", b"not a picture", encode(noise())[:-30]])
def test_a_set_with_too_many_damaged_files_is_refused_by_name(tmp_path, content):
    noise().save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(content)
    with pytest.raises(InputError, match="1 of 2 images cannot be read, first 'bad.png'"):
        list(read_images(list_images(tmp_path)))


def test_a_decompression_bomb_is_refused(tmp_path, monkeypatch):
    noise(size=(20, 20)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(InputError, match="bomb"):
        list(read_images(list_images(tmp_path)))


def test_an_archive_member_too_large_for_a_picture_is_not_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr("dmquant.diffusion.image_files.MAX_MEMBER_BYTES", 10)
    archive = write_zip(tmp_path / "a.zip", {"a.png": encode(noise())})
    with pytest.raises(InputError, match="bytes unpacked"):
        list(read_images(list_images(archive)))


def test_what_stands_beside_the_pictures_is_left_alone(tmp_path):
    members = {"a.png": encode(noise()), "__MACOSX/._a.png": b"attributes", "labels.txt": b"1", "空/β 1.PNG": encode(noise(1))}
    assert [file.name for file in list_images(write_zip(tmp_path / "a.zip", members))] == ["a.png", "空/β 1.PNG"]


def test_a_place_without_images_is_named(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.zip").write_text("no archive")
    for name, message in [("empty", "no images"), ("nowhere", "does not exist"), ("text.zip", "neither a folder nor a zip")]:
        with pytest.raises(InputError, match=message):
            list_images(tmp_path / name)


def test_an_empty_text_is_not_the_working_folder():
    with pytest.raises(InputError, match="an empty text"):
        list_images("")
