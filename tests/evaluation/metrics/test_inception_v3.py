import math

import pytest
import torch

from dmquant.evaluation.metrics.inception_v3 import InceptionV3, resize_tf1


def resize_by_definition(image: torch.Tensor, size: int) -> torch.Tensor:
    """TensorFlow 1, resize_bilinear without align_corners: source = target * in / out, no half-pixel centres."""
    channels, height, width = image.shape
    result = torch.empty(channels, size, size, dtype=image.dtype)
    for row in range(size):
        for column in range(size):
            y, x = row * height / size, column * width / size
            top, left = math.floor(y), math.floor(x)
            bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
            above = image[:, top, left] * (1 - (x - left)) + image[:, top, right] * (x - left)
            below = image[:, bottom, left] * (1 - (x - left)) + image[:, bottom, right] * (x - left)
            result[:, row, column] = above * (1 - (y - top)) + below * (y - top)
    return result


@pytest.mark.parametrize("height, width, size", [(5, 5, 13), (4, 9, 7), (16, 11, 6), (1, 1, 5), (8, 8, 8)])
def test_the_resize_is_that_of_tensorflow_1(height, width, size):
    image = torch.rand(2, 3, height, width, dtype=torch.float64) * 255
    expected = torch.stack([resize_by_definition(one, size) for one in image])
    assert torch.allclose(resize_tf1(image, size), expected, rtol=0, atol=1e-9)


def test_the_resize_is_not_that_of_torch():
    image = torch.rand(1, 3, 8, 8)
    assert not torch.allclose(resize_tf1(image, 16), torch.nn.functional.interpolate(image, (16, 16), mode="bilinear"), atol=1e-2)


@pytest.fixture(scope="module")
def shapes() -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in InceptionV3().state_dict().items()}


def test_it_has_the_parameters_of_torchvision_without_auxiliary_classifier_at_1008_classes(shapes):
    # 27,161,264 of the published model, less 3,326,696 of AuxLogits, plus 8 classes of 2,048 weights and a bias
    count = sum(math.prod(shape) for name, shape in shapes.items() if name.endswith(("weight", "bias")))
    assert count == 27_161_264 - 3_326_696 + 8 * 2049


@pytest.mark.parametrize(
    "name, shape",
    [
        ("Conv2d_1a_3x3.conv.weight", (32, 3, 3, 3)),
        ("Conv2d_4a_3x3.bn.running_var", (192,)),
        ("Mixed_5b.branch1x1.conv.weight", (64, 192, 1, 1)),
        ("Mixed_5b.branch5x5_2.conv.weight", (64, 48, 5, 5)),
        ("Mixed_5d.branch_pool.conv.weight", (64, 288, 1, 1)),
        ("Mixed_6a.branch3x3dbl_3.conv.weight", (96, 96, 3, 3)),
        ("Mixed_6c.branch7x7dbl_4.conv.weight", (160, 160, 7, 1)),
        ("Mixed_6e.branch7x7_2.conv.weight", (192, 192, 1, 7)),
        ("Mixed_7a.branch7x7x3_4.conv.weight", (192, 192, 3, 3)),
        ("Mixed_7b.branch3x3dbl_3b.conv.weight", (384, 384, 3, 1)),
        ("Mixed_7c.branch3x3_2a.bn.weight", (384,)),
        ("fc.weight", (1008, 2048)),
        ("fc.bias", (1008,)),
    ],
)
def test_its_tensors_are_named_and_shaped_as_in_the_pytorch_fid_file(shapes, name, shape):
    assert shapes[name] == shape


def test_average_pools_exclude_the_padding_and_the_last_block_has_a_maximum_pool():
    with torch.device("meta"):
        network = InceptionV3()
    ones = torch.ones(1, 1, 4, 4)
    averaging = [name for name, block in network.named_children() if isinstance(getattr(block, "pool", None), torch.nn.AvgPool2d)]
    assert averaging == ["Mixed_5b", "Mixed_5c", "Mixed_5d", "Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e", "Mixed_7b"]
    assert all(torch.equal(network.get_submodule(name).pool(ones), ones) for name in averaging)
    assert torch.equal(network.Mixed_7c.pool(ones - 2), ones - 2) and isinstance(network.Mixed_7c.pool, torch.nn.MaxPool2d)


def test_spatial_features_are_those_of_adm_and_logits_have_no_bias():
    torch.manual_seed(0)
    network = InceptionV3().eval()
    network.fc.bias.data.fill_(1e6)
    branch = []
    network.Mixed_6d.branch1x1.register_forward_hook(lambda layer, inputs, output: branch.append(output))
    images = torch.randint(0, 256, (2, 3, 40, 30), dtype=torch.uint8)

    with torch.no_grad():
        features, spatial, logits = network.read(images)
        assert torch.equal(network(images), features)

    assert features.shape == (2, 2048) and spatial.shape == (2, 2023) == (2, network.num_spatial) and logits.shape == (2, 1008)
    # "mixed_6/conv" is the 1x1 branch; position (row 3, column 5), channel 6
    assert torch.equal(spatial[:, (3 * 17 + 5) * 7 + 6], branch[0][:, 6, 3, 5])
    assert torch.allclose(logits, features @ network.fc.weight.T) and logits.abs().max() < 1e6
