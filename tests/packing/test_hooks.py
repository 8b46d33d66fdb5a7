"""Hooks are called once for each module and call, on the ranks that hold some of it, and what they raise is told."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DeviceMesh, distribute_tensor
from torch.distributed.tensor import Replicate as DTensorReplicate
from torch.distributed.tensor import Shard as DTensorShard

from tests.cases import RANKS
from tricomm import ArgumentError, Hooks, Mesh, Replicate, Resharder, Shard, ShardingSpec, SpecError, TransportError
from tricomm.launch import Ranks
from tricomm.rules import Rules, cat, source

TRAINER, SERVER = Mesh([0, 1], ("dp",)), Mesh([2, 3], ("tp",))
LAYERS = 2
SCALED = ("up", "down")


def layouts() -> tuple[dict[str, ShardingSpec], dict[str, ShardingSpec], Rules]:
    """Codes of eight bits and their scales, and a norm; the server has both codes of a layer as one tensor."""
    trained: dict[str, ShardingSpec] = {}
    served: dict[str, ShardingSpec] = {}
    for layer in range(LAYERS):
        for name in SCALED:
            trained[f"l.{layer}.{name}"] = ShardingSpec(TRAINER, (Shard(0),), (8, 4), "int8")
            trained[f"l.{layer}.{name}.scale"] = ShardingSpec(TRAINER, (Shard(0),), (8,), "float32")
            served[f"layer{layer}.{name}.scale"] = ShardingSpec(SERVER, (Replicate(),))
        served[f"layer{layer}.both"] = ShardingSpec(SERVER, (Shard(1),))
    trained["norm"] = ShardingSpec(TRAINER, (Replicate(),), (3,), "float32")
    served["norm"] = ShardingSpec(SERVER, (Replicate(),))
    rules = Rules(
        {
            "layer{l}.both": cat([source("l.{l}.up"), source("l.{l}.down")]),
            **{f"layer{{l}}.{name}.scale": source(f"l.{{l}}.{name}.scale") for name in SCALED},
        },
        l=range(LAYERS),
    )
    return trained, served, rules + Rules({"norm": source("norm")})


def weight(rank: int, layer: int, name: str, version: int) -> torch.Tensor:
    """Four rows of a weight, whose largest is another in each."""
    return (torch.arange(16.0).view(4, 4) + 1) * (1 + rank + 2 * layer + 4 * len(name) + version)


def quantized(module: str, tensors: dict[str, Any]) -> dict[str, torch.Tensor]:
    """A weight as codes and a scale per row."""
    (given,) = tensors.values()
    scale = given.abs().amax(1) / 127
    return {module: (given / scale[:, None]).round().to(torch.int8), f"{module}.scale": scale}


def of_version(rank: int, version: int) -> dict[str, torch.Tensor] | None:
    """What a trainer gives: weights that nobody has quantized."""
    if rank > 1:
        return None
    given = {f"l.{layer}.{name}": weight(rank, layer, name, version) for layer in range(LAYERS) for name in SCALED}
    return given | {"norm": torch.full((3,), float(version))}


def push(rank: int) -> list[Any]:
    """Three versions: in one call, in parts, and started."""
    if rank > 3:
        return []
    trained, served, rules = layouts()
    heard: list[Any] = []

    def before(module: str, tensors: dict[str, Any]) -> dict[str, torch.Tensor]:
        heard.append(("before", module, sorted(tensors)))
        return quantized(module, tensors)

    def after(module: str, tensors: dict[str, Any]) -> None:
        heard.append(("after", module, {name: tensor.clone() for name, tensor in sorted(tensors.items())}))

    modules: dict[str, Any] = {"layer{l}": after, "": after}
    hooks = Hooks(
        before={f"l.{{l}}.{name}": before for name in SCALED} if rank < 2 else None,
        after=modules if rank > 1 else None,
        l=range(LAYERS),
    )
    with Resharder(trained, served, rules=rules, hooks=hooks) as mover:
        moved = mover(of_version(rank, 1))
        heard.append(("returned", sorted(moved)))
        assert mover.stats.tensors == (len(trained) if rank < 2 else len(served))
        for layer in range(LAYERS):
            chosen = [name for name in served if name.startswith(f"layer{layer}.")]
            for some in (chosen[:1], chosen[1:]):
                heard.append(("some", sorted(mover(of_version(rank, 2), only=some))))
        heard.append(("some", sorted(mover(of_version(rank, 2), only=["norm"]))))
        mover.start(of_version(rank, 3)).wait()
    return heard


def test_a_weight_becomes_codes_and_scales_and_modules_are_told_once(ranks: Ranks) -> None:
    results = ranks.run(push)
    for rank in (0, 1):
        names = [f"l.{layer}.{name}" for name in SCALED for layer in range(LAYERS)]
        every = [("before", name, [name]) for name in names]
        assert [one for one in results[rank] if one[0] == "before"][: len(names)] == every
    for rank in (2, 3):
        found = [one for one in results[rank] if one[0] == "after"]
        modules = ["layer0", "layer1", ""]
        assert [module for _, module, _ in found] == modules * 3, "once for each version, when it is whole"
        for version in range(3):
            for layer in range(LAYERS):
                require_codes(found[3 * version + layer][2], rank - 2, layer, version + 1)
            assert found[3 * version + 2][2]["norm"].tolist() == [float(version + 1)] * 3
            assert len(found[3 * version + 2][2]) == 3 * LAYERS + 1
        kinds = [one[0] for one in results[rank]]
        of_parts = ["some", "after", "some"] * LAYERS + ["after", "some"]
        assert kinds == ["after", "after", "after", "returned", *of_parts, "after", "after", "after"]


def require_codes(tensors: dict[str, torch.Tensor], column: int, layer: int, version: int) -> None:
    """What a server has of a layer is what trainers make of their weights."""
    codes, scales = [], []
    for name in SCALED:
        made = [quantized("w", {"w": weight(rank, layer, name, version)}) for rank in (0, 1)]
        codes.append(torch.cat([one["w"] for one in made]))
        scales.append(torch.cat([one["w.scale"] for one in made]))
    both = torch.cat(codes)[:, 2 * column : 2 * column + 2]
    assert sorted(tensors) == sorted([f"layer{layer}.both", *(f"layer{layer}.{name}.scale" for name in SCALED)])
    assert torch.equal(tensors[f"layer{layer}.both"], both)
    for name, scale in zip(SCALED, scales, strict=True):
        assert torch.equal(tensors[f"layer{layer}.{name}.scale"], scale)


def failing(rank: int) -> list[str]:
    """A hook of rank 1 raises before the first call, one of rank 2 after the second; the third is whole."""
    if rank > 3:
        return []
    calls = 0

    def before(module: str, tensors: dict[str, Any]) -> dict[str, torch.Tensor]:
        if rank == 1 and calls == 0:
            raise ValueError("rank 1 cannot quantize")
        return tensors

    def after(module: str, tensors: dict[str, Any]) -> None:
        if rank == 2 and calls == 1:
            raise ValueError("rank 2 cannot shuffle")

    rows, columns = ShardingSpec(TRAINER, (Shard(0),), (8, 4), "float32"), ShardingSpec(SERVER, (Shard(1),))
    hooks = Hooks(before={"w": before}, after={"w": after})
    mover = Resharder({"w": rows}, {"w": columns}, hooks=hooks, timeout_seconds=20)
    said = []
    for calls in range(3):
        try:
            moved = mover({"w": torch.full((4, 4), float(calls))} if rank < 2 else None)
            said.append("" if rank < 2 else str(float(moved["w"][0, 0])))
        except (ValueError, TransportError) as error:
            said.append(str(error))
    mover.close()
    return said


def test_what_a_hook_raises_is_told_where_others_wait_for_it(ranks: Ranks) -> None:
    results = ranks.run(failing)
    assert all("rank 1 cannot quantize" in results[rank][0] for rank in range(4))
    assert [results[rank][1:] for rank in (0, 1, 3)] == [["", ""], ["", ""], ["1.0", "2.0"]]
    assert results[2][1:] == ["rank 2 cannot shuffle", "2.0"]


def reentrant(rank: int) -> list[str]:
    """Hooks of rank 2 that call their own Resharder."""
    if rank > 3:
        return []
    rows, columns = ShardingSpec(TRAINER, (Shard(0),), (8, 4), "float32"), ShardingSpec(SERVER, (Shard(1),))
    names = ("v", "w")
    again: list[Callable[[Resharder], Any]] = [
        lambda mover: mover(),
        lambda mover: mover.start(),
        lambda mover: mover(only=["v"]),
    ]
    said: list[str] = []

    def after(module: str, tensors: dict[str, Any]) -> None:
        if rank == 2:
            try:
                again[len(said)](mover)
            except SpecError as error:
                said.append(str(error))

    mover = Resharder(dict.fromkeys(names, rows), dict.fromkeys(names, columns), hooks=Hooks(after={"": after}))
    given = dict.fromkeys(names, torch.ones(4, 4)) if rank < 2 else None
    for _ in range(2):
        mover(given)
    mover.start(given).wait()
    mover.close()
    return said


def test_a_hook_does_not_call_its_own_resharder(ranks: Ranks) -> None:
    said = ranks.run(reentrant)[2]
    assert len(said) == 3
    assert all("the hook of '' calls the Resharder that it is a hook of" in text for text in said)


def of_dtensors(rank: int, size: int) -> list[str]:
    """A call of DTensors, which are taken for their shards."""
    mesh = DeviceMesh("cpu", list(range(size)))
    rows = distribute_tensor(torch.ones(2 * size, 3), mesh, [DTensorShard(0)])
    place = distribute_tensor(torch.zeros(2 * size, 3), mesh, [DTensorReplicate()])
    heard: list[str] = []

    def before(module: str, tensors: dict[str, Any]) -> dict[str, Any]:
        heard.append(f"before {module}")
        return {module: 2 * tensors[module]}

    def after(module: str, tensors: dict[str, Any]) -> None:
        heard.append(f"after {module}: {float(tensors[module].sum())}")

    hooks = Hooks(before={"w": before}, after={"w": after})
    mover = Resharder({"w": rows}, {"w": place}, hooks=hooks)
    mover({"w": rows}, out={"w": place})
    mover.start({"w": rows}, out={"w": place}).wait()
    mover.close()
    return heard


def test_hooks_of_dtensors_are_called_once_too(ranks: Ranks) -> None:
    total = float(2 * 2 * RANKS * 3)
    for heard in ranks.run(of_dtensors, RANKS):
        assert heard == ["before w", f"after w: {total}"] * 2


NAMES = ["l.0.w", "l.1.w", "norm"]


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: Hooks(before=[print]), ArgumentError, "is no mapping"),  # type: ignore[arg-type]
        (lambda: Hooks(after={"w": 3}), ArgumentError, "is no function"),  # type: ignore[dict-item]
        (lambda: Hooks(after={"l.{l}": print}), SpecError, "index 'l' has no values"),
        (
            lambda: Hooks(after={"l.{l}": print}, l=range(3)).bind(NAMES, NAMES, NAMES, NAMES),
            SpecError,
            "'l.2' is for no",
        ),
        (lambda: Hooks(after={"l.0.": print}).bind(NAMES, NAMES, NAMES, NAMES), SpecError, "such as 'l.0.w'"),
        (
            lambda: Hooks(before={"l.0": print, "l.0.w": print}).bind(NAMES, NAMES, NAMES, NAMES),  # type: ignore[dict-item]
            SpecError,
            "'l.0.w' is of two hooks",
        ),
        (
            lambda: (
                Hooks(before={"norm": lambda *_: {"l.0.w": 1}}).bind(NAMES, NAMES, NAMES, NAMES).before({"norm": 1})
            ),
            SpecError,
            "returned ['l.0.w']; of this module, this rank sends ['norm']",
        ),
        (
            lambda: Hooks(after={"norm": lambda *_: 1}).bind(NAMES, NAMES, NAMES, NAMES).after({"norm": 1}),  # type: ignore
            ArgumentError,
            "returned int",
        ),
    ],
)
def test_hooks_that_mean_nothing_are_refused(make: Callable[[], Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error) as caught:
        make()
    assert text in str(caught.value)


def test_a_rank_without_the_module_is_left_alone() -> None:
    calls: list[str] = []
    hooks = Hooks(before={"l.0": lambda module, _: calls.append(module) or {}}).bind(NAMES, NAMES, ["norm"], NAMES)
    given = {"norm": 1, "l.0.w": 2}
    assert hooks.before(given) == given, "what this rank has not to send is left to whoever checks it"
    assert calls == []
