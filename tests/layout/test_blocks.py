"""Layouts of trimmed tensors and of blocks, by their definition."""

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

import tricomm
from tricomm import (
    ArgumentError,
    Hooks,
    LocalTransport,
    Mesh,
    Partial,
    Replicate,
    Resharder,
    Shard,
    ShardingSpec,
    SpecError,
    make_plan,
)

TP = Mesh([0, 1, 2], ("tp",))


def test_a_vocabulary_goes_to_ranks_that_hold_it_padded() -> None:
    """130 rows, of which the ranks of a server have 64 each; what pads the last one stays as it is."""
    padded = ShardingSpec(TP, (Shard(0),), (192, 4), "float32")
    trained = ShardingSpec(Mesh([3, 4], ("dp",)), (Shard(0),), (130, 4), "float32")
    embed = torch.arange(130.0 * 4).reshape(130, 4)
    plan = make_plan(trained, padded.trimmed((130, 4)))
    assert plan.wire_nbytes == plan.minimum_nbytes == embed.nbytes
    moved = LocalTransport().run(plan, {rank: tricomm.local_shard(embed, trained, rank) for rank in (3, 4)})
    for rank in range(3):
        assert torch.equal(moved[rank], embed[64 * rank : 64 * rank + 64])
    back = make_plan(padded.trimmed((130, 4)), trained)
    assert torch.equal(LocalTransport().run(back, moved)[3], embed[:65])


def blocked(size: int, block: int) -> torch.Tensor:
    """The number of the block of each place."""
    return torch.arange(size) // block


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_blocks_are_shared_out_as_elements_are(data: st.DataObject) -> None:
    rows, columns, first, second = (data.draw(st.integers(1, 12)) for _ in range(4))
    block = (data.draw(st.integers(1, 4)), data.draw(st.integers(1, 4)))
    mesh = Mesh([[4 * i + j for j in range(second)] for i in range(first)] if second <= 4 else [[0]], ("a", "b"))
    placements = [data.draw(st.sampled_from([Shard(0), Shard(1), Replicate()])) for _ in range(2)]
    spec = ShardingSpec(mesh, placements, (rows, columns), "int64", data.draw(st.sampled_from([None, ("b", "a")])))
    found = spec.on_blocks(block)
    coarse = ShardingSpec(mesh, placements, (-(-rows // block[0]), -(-columns // block[1])), axis_order=spec.axis_order)
    for rank in mesh.ranks:
        for dim, size in enumerate((rows, columns)):
            held = torch.zeros(size, dtype=torch.bool)
            for start, stop in found.holding(rank)[dim]:
                held[start:stop] = True
            blocks = torch.zeros(coarse.global_shape[dim], dtype=torch.bool)
            for start, stop in coarse.holding(rank)[dim]:
                blocks[start:stop] = True
            assert torch.equal(held, blocks[blocked(size, block[dim])])
        Hooks(blocks={"w": block}).check_blocks([("w", found)], rank)


def test_a_layout_whose_cuts_are_on_blocks_stays_what_it_is() -> None:
    spec = ShardingSpec(TP, (Shard(1, segments=(384, 768)),), (256, 1152), "bfloat16")
    assert spec.on_blocks((128, 128)) is spec


@pytest.mark.parametrize(
    ("spec", "blocks", "text"),
    [
        (
            ShardingSpec(TP, (Shard(0, segments=(130, 126)),), (256, 256)),
            (128, 128),
            "no whole number of blocks of 128",
        ),
        (
            ShardingSpec(TP, (Partial(),), (256, 256)),
            (128, 128),
            "cuts nothing that could fall on blocks; reduce",
        ),
        (ShardingSpec.explicit({0: [[(0, 4)]]}, (4,)), (2,), "explicit holdings say their cuts themselves"),
        (ShardingSpec(TP, (Shard(0),), (256, 256)), (128,), r"blocks=\(128,\) is no size .* for each of 2 dims; write"),
        (ShardingSpec(TP, (Shard(0),), (256,)), (0,), r"blocks=\(0,\) is no size of a block"),
    ],
)
def test_what_cannot_be_cut_on_blocks_is_refused(spec: ShardingSpec, blocks: tuple[int, ...], text: str) -> None:
    with pytest.raises(SpecError, match=text):
        spec.on_blocks(blocks)


def test_what_is_trimmed_lies_inside() -> None:
    padded = ShardingSpec(TP, (Shard(0),), (192, 4))
    for shape in ((193, 4), (4,)):
        with pytest.raises(SpecError, match=r"does not fit into the padded \(192, 4\); give the sizes"):
            padded.trimmed(shape)


def test_hooks_refuse_layouts_that_cut_their_blocks() -> None:
    rows = ShardingSpec(TP, (Shard(0),), (256, 256), "float32")
    hooks = Hooks(blocks={"l.{l}.w": (128, 128)}, l=range(2))
    hooks.check_blocks([("l.0.w", rows), ("l.1.w", rows)], rank=7)  # which holds none of them
    with pytest.raises(SpecError, match=r"'l.0.w' on rank 1 is cut at 86 of dim 0, .* \.on_blocks\(\(128, 128\)\)"):
        hooks.check_blocks([("l.0.w", rows), ("l.1.w", rows)], rank=1)
    with pytest.raises(SpecError, match=r"names 'l.1.w', which no side has; name its tensors"):
        hooks.check_blocks([("l.0.w", rows.on_blocks((128, 128)))], rank=1)
    with pytest.raises(ArgumentError, match=r"blocks=3 is no mapping; write blocks="):
        Hooks(blocks=3)  # type: ignore[arg-type]


def test_a_resharder_looks_at_the_blocks_of_its_hooks() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        half = {"w": ShardingSpec.explicit({0: [[(0, 4)]]}, (8,), "float32")}
        with Resharder(half, half, hooks=Hooks(blocks={"w": (4,)})) as mover:
            assert mover({"w": torch.ones(4)})["w"].sum() == 4
        with pytest.raises(SpecError, match=r"'w' on rank 0 is cut at 4 of dim 0, inside of a block of \(3,\)"):
            Resharder(half, half, hooks=Hooks(blocks={"w": (3,)}))
    finally:
        dist.destroy_process_group()
