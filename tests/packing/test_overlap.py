"""Whether tensors share memory, against the addresses of all their elements."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tricomm import Mesh, Shard, ShardingSpec, SpecError, make_plan
from tricomm.packing.overlap import has_shared_elements, share_memory
from tricomm.packing.tensor_checker import TensorChecker

quick = settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
DTYPES = st.sampled_from([torch.uint8, torch.int32])


def places(tensor: torch.Tensor) -> list[int]:
    """THE DEFINITION: the address of every byte of every element."""
    if not tensor.numel():
        return []
    index = torch.tensor(tensor.data_ptr())
    for extent, stride in zip(tensor.shape, tensor.stride(), strict=True):
        index = index.unsqueeze(-1) + torch.arange(extent) * stride * tensor.element_size()
    return (index.reshape(-1, 1) + torch.arange(tensor.element_size())).flatten().tolist()


@st.composite
def views(draw, buffer: torch.Tensor) -> torch.Tensor:
    """Any strided view that lies in the buffer."""
    dims = draw(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 9)), max_size=4))
    words = buffer.view(draw(DTYPES))
    shape = [extent for extent, _ in dims]
    strides = [stride for _, stride in dims]
    reach = sum((extent - 1) * stride for extent, stride in dims) if 0 not in shape else 0
    offset = draw(st.integers(0, 40))
    return words[: offset + reach + 1].as_strided(shape, strides, offset)


BUFFER = torch.zeros(1024, dtype=torch.uint8)


@quick
@given(first=views(BUFFER), second=views(BUFFER))
def test_two_tensors_share_memory_where_an_element_of_both_has_a_byte_in_common(first, second) -> None:
    assert share_memory(first, second) == bool(set(places(first)) & set(places(second)))


@quick
@given(tensor=views(BUFFER))
def test_a_tensor_overlaps_itself_where_two_elements_have_one_place(tensor) -> None:
    found = places(tensor)
    assert has_shared_elements(tensor) == (len(set(found)) < len(found))


def test_interleaved_columns_and_rows() -> None:
    buffer = torch.zeros(6, 8, 4)
    assert not share_memory(buffer[:, :4], buffer[:, 4:])
    assert not share_memory(buffer[::2], buffer[1::2])
    assert not share_memory(buffer[:, ::2, 1:], buffer[:, 1::2])
    assert share_memory(buffer[::2], buffer[::3])
    assert share_memory(buffer, buffer[5, 7, 3:])
    assert not share_memory(buffer, torch.zeros(6, 8, 4))


def test_a_search_that_is_too_long_is_taken_for_an_overlap(monkeypatch) -> None:
    from tricomm.packing import overlap

    monkeypatch.setattr(overlap, "MAX_WORK", 1)
    buffer = torch.zeros(4096)
    first = buffer.as_strided((9, 9, 9), (15, 21, 35), 0)
    second = buffer.as_strided((9, 9, 9), (30, 42, 70), 1)
    assert share_memory(first, second)


def test_out_may_lie_between_the_columns_of_the_source() -> None:
    spec = ShardingSpec(Mesh([0], ("x",)), (Shard(0),), (6, 4), "float32")
    checker = TensorChecker(make_plan(spec, spec), 0, torch.device("cpu"))
    buffer = torch.zeros(6, 8)
    assert checker.check(buffer[:, :4], buffer[:, 4:])
    with pytest.raises(SpecError, match="shares memory with its source"):
        checker.check(buffer[:, :4], buffer[:, 3:7])
