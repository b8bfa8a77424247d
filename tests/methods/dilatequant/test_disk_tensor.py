"""A tensor on disk returns the rows that were written."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dmquant.errors import DamagedFile
from dmquant.methods.dilatequant.disk_tensor import DiskTensor, read_index, write_index


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
@given(starts=st.permutations(range(4)), asked=st.lists(st.integers(0, 7), max_size=9))
@settings(max_examples=20)
def test_rows_are_returned_in_the_order_of_the_index_whatever_the_order_of_writing(dtype, starts, asked, tmp_path_factory):
    torch.manual_seed(0)
    tensor = (10 * torch.randn(8, 3, 5)).to(dtype).transpose(1, 2)  # not contiguous
    stored = DiskTensor(tmp_path_factory.mktemp("stack") / "rows", tensor.shape, dtype)
    for start in starts:
        stored.write(2 * start, tensor[2 * start : 2 * start + 2])
    rows = stored[torch.tensor(asked, dtype=torch.long)]
    assert rows.dtype == dtype and torch.equal(rows, tensor[asked])
    assert len(stored) == 8 and stored.nbytes == tensor.numel() * tensor.element_size()


def test_an_index_opens_the_tensors_again_and_they_can_be_removed(tmp_path):
    tensors = {"ours": [torch.randn(4, 2), torch.randn(4, 1, 3)], "theirs": []}
    on_disk = {
        name: [DiskTensor(tmp_path / f"{name}-{number}", tensor.shape, tensor.dtype) for number, tensor in enumerate(group)]
        for name, group in tensors.items()
    }
    for name, group in tensors.items():
        for stored, tensor in zip(on_disk[name], group):
            stored.write(0, tensor)
    write_index(tmp_path / "block.json", on_disk)
    found = read_index(tmp_path / "block.json")
    assert found.keys() == tensors.keys()
    pairs = zip(found["ours"], tensors["ours"], strict=True)
    assert all(torch.equal(stored[torch.arange(4)], tensor) for stored, tensor in pairs)
    for stored in found["ours"]:
        stored.remove()
    assert [file.name for file in tmp_path.iterdir()] == ["block.json"]


def test_reading_rows_that_are_missing_in_the_file_fails(tmp_path):
    stored = DiskTensor(tmp_path / "rows", (4, 2), torch.float32)
    stored.write(0, torch.randn(2, 2))
    with pytest.raises(DamagedFile, match="has lost rows"):
        stored[torch.tensor([0, 2])]
