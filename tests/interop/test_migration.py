"""What the notes for users of other libraries say does what it says: our lines of each are carried out."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DeviceMesh, DTensor, Shard

import tricomm
import tricomm.pipeline
from tests.oracle import pick, require_equal
from tricomm import Mesh, ShardingSpec
from tricomm.launch import Ranks

README = (Path(tricomm.__file__).parent / "examples" / "README.md").read_text()
OURS = re.compile(r"(\w+ = )?(tricomm|mover|link)\b")
FULL = torch.arange(42.0).reshape(7, 6)
FIRST, SECOND = (0, 1), (2, 3, 4)
ROWS = ShardingSpec(Mesh(FIRST, ("x",)), (tricomm.Shard(0),), FULL.shape, "float32")
COLUMNS = ShardingSpec(Mesh(SECOND, ("y",)), (tricomm.Shard(1),), FULL.shape, "float32")


def lines_of(peer: str) -> list[str]:
    """Our lines of the code that follows the name of a peer."""
    block = re.search(rf"^\*\*[^\n]*{re.escape(peer)}.*?^```python\n(.*?)^```$", README, re.S | re.M)
    assert block is not None, peer
    return [line for line in block[1].splitlines() if OURS.match(line)]


class Model:
    """What has nothing but tensors."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self.state_dict = lambda: tensors


def from_dtensor(rank: int, lines: list[str]) -> None:
    mesh, other_mesh = (DeviceMesh("cpu", list(ranks), _init_backend=False) for ranks in (FIRST, SECOND))
    held, elsewhere = lines
    x = None
    if rank in FIRST:
        x = DTensor.from_local(
            pick(FULL, ROWS, rank), mesh, [Shard(0)], run_check=False, shape=FULL.shape, stride=(6, 1)
        )
    names: dict[str, Any] = {"tricomm": tricomm, "Shard": Shard, "mesh": mesh, "other_mesh": other_mesh, "x": x}
    names |= {"shape": FULL.shape, "dtype": FULL.dtype}
    exec(held if rank in FIRST else elsewhere, names)
    if rank in SECOND:
        assert names["y"].placements == (Shard(1),)
        require_equal(names["y"].to_local(), pick(FULL, COLUMNS, rank), f"rank {rank}")
    else:
        assert names["y"].to_local().shape == (0,)


def from_m2n(rank: int, lines: list[str]) -> None:
    a, b = (DeviceMesh("cpu", list(ranks), _init_backend=False, _rank=rank) for ranks in (FIRST, SECOND))
    names: dict[str, Any] = {"tricomm": tricomm, "a": a, "b": b, "p": [Shard(0)], "q": [Shard(1)]}
    names |= {"shape": FULL.shape, "dtype": FULL.dtype}
    one_call, made_once, called = lines
    for call in ([one_call], [made_once, called]):
        names["src"] = pick(FULL, ROWS, rank) if rank in FIRST else None
        names["dst"] = torch.zeros_like(pick(FULL, COLUMNS, rank)) if rank in SECOND else None
        for line in call:
            exec(line, names)
        if rank in SECOND:
            require_equal(names["dst"], pick(FULL, COLUMNS, rank), f"rank {rank}")


def from_swap(rank: int, lines: list[str]) -> None:
    made_once, on_the_trainer, on_the_servers = lines
    names: dict[str, Any] = {"tricomm": tricomm}
    names |= {"src_layouts": {"w": ROWS, "v": ROWS}, "dst_layouts": {"w": COLUMNS, "v": COLUMNS}}
    exec(made_once, names)
    if rank in FIRST:
        names["src_model"] = Model({"w": pick(FULL, ROWS, rank), "v": pick(2 * FULL, ROWS, rank)})
        exec(on_the_trainer, names)
    else:
        names["weights"] = {name: torch.zeros_like(pick(FULL, COLUMNS, rank)) for name in ("w", "v")}
        exec(on_the_servers, names)
        require_equal(names["weights"]["w"], pick(FULL, COLUMNS, rank), f"rank {rank}")
        require_equal(names["weights"]["v"], pick(2 * FULL, COLUMNS, rank), f"rank {rank}")


def from_bridge(rank: int, lines: list[str]) -> None:
    made, connected, sent, received = lines
    names: dict[str, Any] = {"tricomm": tricomm, "EdgeTensor": tricomm.pipeline.EdgeTensor}
    names |= {"source": ROWS, "destination": COLUMNS}
    exec(made, names)
    exec(connected, names)
    if rank in FIRST:
        names["hidden"] = pick(FULL, ROWS, rank)
        exec(sent, names)
        require_equal(eval("link.recv_gradient(0).wait()", names), pick(3 * FULL, ROWS, rank), f"rank {rank}")
    else:
        exec(received, names)
        require_equal(names["hidden"], pick(FULL, COLUMNS, rank), f"rank {rank}")
        exec("link.send_gradient(3 * hidden, 0)", names)
    names["link"].flush()
    names["link"].close()


def from_jax(rank: int, lines: list[str]) -> None:
    (line,) = lines
    names: dict[str, Any] = {"tricomm": tricomm, "ShardingSpec": ShardingSpec, "source": ROWS, "mesh": COLUMNS.mesh}
    names["x"] = pick(FULL, ROWS, rank) if rank in FIRST else None
    exec(line, names)
    if rank in SECOND:
        require_equal(names["y"], FULL.chunk(len(SECOND))[rank - 2], f"rank {rank}")


def carry_out(rank: int, function: Any, lines: list[str]) -> None:
    if rank in (*FIRST, *SECOND):
        function(rank, lines)


@pytest.mark.parametrize(
    ("peer", "function"),
    [
        ("DTensor.redistribute", from_dtensor),
        ("nccl_m2n", from_m2n),
        ("swap_model_weights", from_swap),
        ("BridgeCommunicator", from_bridge),
        ("jax.device_put", from_jax),
    ],
)
def test_our_lines_do_what_a_peers_do(ranks: Ranks, peer: str, function: Any) -> None:
    ranks.run(carry_out, function, lines_of(peer))
