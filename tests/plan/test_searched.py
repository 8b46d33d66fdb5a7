"""Plans that formulas cannot make: they say what they cost, are refused where that is too much, and can be kept."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest

from tricomm import (
    Auto,
    Broadcast,
    GlobalAllGather,
    LocalAllGather,
    Mesh,
    PlanError,
    Replicate,
    SendRecv,
    Shard,
    ShardingSpec,
    Topology,
    make_plan,
)
from tricomm.plan import planner
from tricomm.plan.routes import searched
from tricomm.plan.routes.strategies import Strategy

ALL = Replicate()
SHAPE = (36, 36)


def irregular() -> tuple[ShardingSpec, ShardingSpec]:
    """Rows held twice, but for the first, held thrice, and the last, held once, to columns needed twice."""
    rows = ShardingSpec(Mesh([range(18), range(18, 36)], ("dp", "x")), (ALL, Shard(0)), SHAPE, "float32")
    source = ShardingSpec.explicit({rank: rows.holding(rank % 35) for rank in range(36)}, SHAPE, "float32")
    return source, ShardingSpec(Mesh([range(36, 54), range(54, 72)], ("dp", "x")), (ALL, Shard(1)), SHAPE)


def test_a_long_search_says_what_it_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(searched, "WORTH_SAYING", 100)
    with pytest.warns(UserWarning, match=r"searched for among 648 deliveries .* planned by formulas"):
        make_plan(*irregular(), strategy=Auto(search_up_to=31))


def test_what_was_found_without_a_folder_is_kept_when_there_is_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("tricomm.plan.planner.WORTH_SAYING", 100)
    plan = make_plan(*irregular(), strategy=Auto(search_up_to=28))
    kept = make_plan(*irregular(), strategy=Auto(search_up_to=28, cache=str(tmp_path / "plans")))
    assert len(list((tmp_path / "plans").iterdir())) == 1
    assert kept.digest() == plan.digest()


def test_a_search_without_end_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(searched, "MOST_DELIVERIES", 100)
    with pytest.raises(PlanError, match="at most 100 are; layouts that are grids of parts"):
        make_plan(*irregular(), strategy=Auto(search_up_to=30))


def test_what_was_found_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tricomm.plan.planner.WORTH_SAYING", 100)
    strategy = Auto(search_up_to=29, cache=str(tmp_path / "plans"))
    plans = []
    for _ in range(2):
        planner._make_plan.cache_clear()
        plans.append(make_plan(*irregular(), strategy=strategy))
    assert len(list((tmp_path / "plans").iterdir())) == 1
    assert plans[0].digest() == plans[1].digest() == make_plan(*irregular(), strategy=Auto(29)).digest()
    assert plans[0].moves[0].messages == plans[1].moves[0].messages
    assert plans[0].moves[0].hops == plans[1].moves[0].hops
    plans[1].verify()


class Touches:
    """What makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        ("cut short", ""),
        ("a pickle", ""),
        ("pickled columns", "allow_pickle=False"),
        ("another order of hops", "do not have the digest"),
        ("version", "its format is 0, and this tricomm reads 2"),
        ("key", "it is of another plan"),
    ],
)
def test_what_was_changed_is_not_read(
    damage: str, reason: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("tricomm.plan.planner.WORTH_SAYING", 100)
    strategy = Auto(search_up_to=28, cache=str(tmp_path / "plans"))
    planner._make_plan.cache_clear()
    make_plan(*irregular(), strategy=strategy)
    (kept,) = (tmp_path / "plans").iterdir()
    with np.load(kept, allow_pickle=False) as file:
        header, arrays = json.loads(file["header"].tobytes()), {name: file[name] for name in file.files}
    evil = Touches(tmp_path / "ran")
    if damage == "cut short":
        kept.write_bytes(kept.read_bytes()[:-30])
    elif damage == "a pickle":
        kept.write_bytes(pickle.dumps(evil))
    else:
        if damage == "pickled columns":
            arrays["chains"] = np.array([evil], object)
        elif damage == "another order of hops":
            arrays["hops"] = arrays["hops"][::-1]
        else:
            header[damage] = 0
        arrays["header"] = np.frombuffer(json.dumps(header).encode(), np.uint8)
        with kept.open("wb") as changed:
            np.savez(changed, **arrays)
    planner._make_plan.cache_clear()
    with pytest.raises(PlanError, match=rf"cannot be read .*{reason}.* delete it"):
        make_plan(*irregular(), strategy=strategy)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("strategy", [SendRecv(), SendRecv(4096), Broadcast(), Broadcast(4096), GlobalAllGather()])
def test_a_strategy_by_name_goes_by_formulas_too(strategy: Strategy) -> None:
    source = ShardingSpec(Mesh([range(16), range(16, 32)], ("dp", "x")), (ALL, Shard(0)), (4096, 64), "float32")
    destination = ShardingSpec(Mesh([range(40, 48), range(48, 56)], ("dp", "tp")), (ALL, Shard(1)))
    topology = Topology(tuple(f"host{rank // 4}" for rank in range(56)), nics_per_host=4)
    whole = make_plan(source, destination, topology=topology, strategy=strategy)
    whole.verify()
    assert whole.wire_nbytes == whole.minimum_nbytes
    assert whole.moves[0].strategies == (strategy,)
    alone = make_plan(source, destination, topology=topology, strategy=strategy, rank=41)
    assert len(alone.moves[0].messages) < len(whole.moves[0].messages)
    assert [[len(step.receives) for step in program.rounds] for program in alone.for_rank(41)] == [
        [len(step.receives) for step in program.rounds] for program in whole.for_rank(41)
    ]


def test_a_strategy_without_formulas_is_searched() -> None:
    source = ShardingSpec(Mesh(range(20), ("x",)), (ALL,), (64,), "float32")
    destination = ShardingSpec(Mesh(range(20, 40), ("x",)), (ALL,))
    plan = make_plan(source, destination, strategy=LocalAllGather())
    plan.verify()
    assert plan.moves[0].strategies == (LocalAllGather(),)
