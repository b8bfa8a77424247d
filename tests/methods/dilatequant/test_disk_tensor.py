"""Rows of a tensor in a file are the rows that were put in."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dmquant.errors import DamagedFile
from dmquant.methods.dilatequant.disk_tensor import Stack, read_index, write_index


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
@given(places=st.permutations(range(4)), asked=st.lists(st.integers(0, 7), max_size=9))
@settings(max_examples=20)
def test_rows_come_back_in_the_order_asked_for_whatever_the_order_they_were_written_in(dtype, places, asked, tmp_path_factory):
    torch.manual_seed(0)
    tensor = (10 * torch.randn(8, 3, 5)).to(dtype).transpose(1, 2)  # not contiguous
    stack = Stack(tmp_path_factory.mktemp("stack") / "rows", tensor.shape, dtype)
    for place in places:
        stack.write(2 * place, tensor[2 * place : 2 * place + 2])
    rows = stack[torch.tensor(asked, dtype=torch.long)]
    assert rows.dtype == dtype and torch.equal(rows, tensor[asked])
    assert len(stack) == 8 and stack.nbytes == tensor.numel() * tensor.element_size()


def test_what_an_index_names_is_found_again_in_another_process_and_can_be_removed(tmp_path):
    tensors = {"ours": [torch.randn(4, 2), torch.randn(4, 1, 3)], "theirs": []}
    stacks = {
        name: [Stack(tmp_path / f"{name}-{number}", tensor.shape, tensor.dtype) for number, tensor in enumerate(group)]
        for name, group in tensors.items()
    }
    for name, group in tensors.items():
        for stack, tensor in zip(stacks[name], group):
            stack.write(0, tensor)
    write_index(tmp_path / "block.json", stacks)
    found = read_index(tmp_path / "block.json")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(stack[torch.arange(4)], tensor) for stack, tensor in zip(found["ours"], tensors["ours"], strict=True))
    for stack in found["ours"]:
        stack.remove()
    assert [file.name for file in tmp_path.iterdir()] == ["block.json"]


def test_rows_that_a_file_has_lost_are_not_made_up(tmp_path):
    stack = Stack(tmp_path / "rows", (4, 2), torch.float32)
    stack.write(0, torch.randn(2, 2))
    with pytest.raises(DamagedFile, match="has lost rows"):
        stack[torch.tensor([0, 2])]
