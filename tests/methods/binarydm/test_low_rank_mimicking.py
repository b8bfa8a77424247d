import copy

import pytest
import torch

from dmquant.diffusion.blocks import find_blocks
from dmquant.diffusion.pipeline import find_target
from dmquant.methods.binarydm.low_rank_mimicking import (
    LowRankMimicking,
    PrincipalSubspaces,
    capture_features,
    find_subspaces,
    flatten_channels,
    principal_directions,
)
from dmquant.training.objectives import Distillation


def test_principal_directions_are_orthonormal_and_span_the_largest_variance():
    generator = torch.Generator().manual_seed(0)
    directions = torch.linalg.qr(torch.randn(8, 2, generator=generator, dtype=torch.float64))[0]
    rows = torch.randn(500, 2, generator=generator, dtype=torch.float64) @ (torch.tensor([[5.0], [3.0]]).double() * directions.T)
    rows += 0.01 * torch.randn(500, 8, generator=generator, dtype=torch.float64)
    basis = principal_directions(rows.T @ rows, 4).double()
    assert basis.shape == (8, 2) and torch.allclose(basis.T @ basis, torch.eye(2).double(), atol=1e-6)
    assert torch.allclose(basis @ (basis.T @ directions), directions, atol=1e-2)
    energy = (rows @ basis).square().sum(0)
    assert energy[0] > energy[1] > 0.99 * (rows.square().sum() - energy[0])


def test_image_and_token_features_are_flattened_to_the_same_rows_of_channels():
    image = torch.arange(2 * 3 * 4 * 5.0).view(2, 3, 4, 5)
    assert torch.equal(flatten_channels(image)[7], image[0, :, 1, 2])
    assert torch.equal(flatten_channels(image.flatten(2).transpose(1, 2)), flatten_channels(image))


def test_the_distance_is_the_mean_over_blocks_of_the_mean_square_of_projected_differences():
    one, two = torch.eye(6)[:, :2], torch.eye(4)[:, 1:2]
    ours = [torch.randn(2, 6, 3, 3), torch.randn(2, 5, 4)]
    theirs = [torch.randn(2, 6, 3, 3), torch.randn(2, 5, 4)]
    by_hand = ((ours[0] - theirs[0])[:, :2].square().mean() + (ours[1] - theirs[1])[..., 1].square().mean()) / 2
    assert torch.allclose(PrincipalSubspaces([one, two])(ours, theirs), by_hand)


def mimicking(pipeline, samples, weight):
    teacher = find_target(pipeline).denoiser
    student, blocks = copy.deepcopy(teacher), find_blocks(teacher)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.mul_(1.01)
    subspaces = find_subspaces(teacher, blocks, samples, compression=4, batch=5)
    parts = {"blocks": blocks, "student": student, "teacher": teacher}
    return student, LowRankMimicking(Distillation(samples, torch.ones(len(samples))), subspaces, **parts, weight=weight)


def loss(objective, student):
    how = {"generator": torch.Generator().manual_seed(0), "device": torch.device("cpu")}
    return objective.loss(student, 4, step=0, **how)


def test_subspaces_have_a_quarter_of_the_dimensions_of_every_block(pipeline, samples):
    teacher = find_target(pipeline).denoiser
    blocks = find_blocks(teacher)
    subspaces = find_subspaces(teacher, blocks, samples, compression=4, batch=5)
    with capture_features(teacher, blocks) as features, torch.no_grad():
        samples.call(teacher)
    widths = [features[block.name].shape[1] for block in blocks]
    assert [tuple(basis.shape) for basis in subspaces.buffers()] == [(width, round(width / 4)) for width in widths]
    assert not list(subspaces.parameters())
    assert all(not module._forward_hooks for module in teacher.modules())


def test_the_loss_is_that_of_the_objective_plus_the_weighted_distance_on_the_same_batch(pipeline, samples):
    losses = []
    for weight in (0, 1, 2):
        student, objective = mimicking(pipeline, samples, weight)
        losses.append(loss(objective, student).item())
    assert losses[1] > losses[0]
    assert losses[2] - losses[1] == pytest.approx(losses[1] - losses[0], rel=1e-4)
    teacher = find_target(pipeline).denoiser
    _, itself = mimicking(pipeline, samples, 1)
    itself._student = teacher
    assert loss(itself, teacher).item() < 1e-10  # the distance of the teacher from itself is zero


def test_gradients_reach_the_student_and_never_the_teacher(pipeline, samples):
    student, objective = mimicking(pipeline, samples, 1)
    loss(objective, student).backward()
    assert student.conv_in.weight.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in find_target(pipeline).denoiser.parameters())


def test_the_bases_are_restored_from_a_state_dict(pipeline, samples):
    _, one = mimicking(pipeline, samples, 1)
    _, two = mimicking(pipeline, samples[:4], 1)
    state = {name: value.clone() for name, value in one.state_dict().items()}
    assert any(not torch.equal(value, two.state_dict()[name]) for name, value in state.items())
    two.load_state_dict(state)
    assert all(torch.equal(value, two.state_dict()[name]) for name, value in state.items())
