"""Sets of tensors: random names, dtypes, layouts and orders, moved at once and compared one by one."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tricomm
from tests.cases import MOST_CHUNKS, RANKS, Case, cases, of_random_draws
from tests.oracle import as_written_by, filled, pick, require_equal, source_and_result
from tests.transport.test_properties import TRANSPORTS, restrided
from tricomm import (
    LocalTransport,
    Mesh,
    Partial,
    Plan,
    Replicate,
    Resharder,
    SendRecv,
    Shard,
    ShardingSpec,
    SpecError,
    Topology,
    TransportError,
    make_plan,
)
from tricomm.launch import Ranks
from tricomm.layout.dtype import ITEMSIZE
from tricomm.options import DEFAULT_STAGING_BYTES
from tricomm.transport.local import LocalEndpoint, LocalNetwork
from tricomm.transport.runtime import PlanExecution

quick = of_random_draws("TRICOMM_FUZZ_MANY", 150)
EXAMPLES = quick.max_examples
Set = dict[str, Case]


@st.composite
def sets(draw: Any) -> Set:
    """1 to 5 layouts, some of them of several tensors, in any order."""
    found = [(draw(cases()), draw(st.sampled_from([1, 1, 2, 3]))) for _ in range(draw(st.integers(1, 5)))]
    names = [f"kind{kind}.{number}" for kind, (_, count) in enumerate(found) for number in range(count)]
    every = [case for case, count in found for _ in range(count)]
    order = draw(st.permutations(range(len(every))))
    return {names[index]: every[index] for index in order}


def arguments(chosen: Set) -> dict[str, Any]:
    """How all of a set are moved: as its first one, with staging for several, and chunks not too small for all."""
    first = next(iter(chosen.values())).plan_arguments()
    strategy = first["strategy"]
    if getattr(strategy, "chunk_bytes", None) is not None:
        nbytes = sum(math.prod(case.source.shape) * ITEMSIZE[case.source.dtype] for case in chosen.values())
        strategy = replace(strategy, chunk_bytes=max(strategy.chunk_bytes, nbytes // MOST_CHUNKS))
    return {**first, "strategy": strategy, "staging_bytes": DEFAULT_STAGING_BYTES}


def sides(chosen: Set) -> tuple[dict[str, ShardingSpec], dict[str, ShardingSpec]]:
    """Names stand in another order at the destination."""
    return (
        {name: case.source for name, case in chosen.items()},
        {name: chosen[name].destination for name in reversed(chosen)},
    )


def shards_of(chosen: Set) -> tuple[dict[int, dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    """({rank: {name: shard}}, {name: the whole result}); equal layouts have other elements."""
    given: dict[int, dict[str, torch.Tensor]] = {rank: {} for rank in range(RANKS)}
    wholes: dict[str, torch.Tensor] = {}
    for number, (name, case) in enumerate(chosen.items()):
        shards, wholes[name] = source_and_result(case.source, case.destination)
        if not case.source.partial_axes:
            whole = rolled(filled(case.source, case.destination), number)
            wholes[name] = whole.to(wholes[name].dtype)
            shards = {rank: pick(whole, case.source, rank) for rank in shards}
        for rank, shard in shards.items():
            given[rank][name] = restrided(shard, case.strides)
    return given, wholes


def rolled(whole: torch.Tensor, by: int) -> torch.Tensor:
    """The same elements, each as many places further."""
    flat = whole.contiguous().reshape(-1).view(torch.uint8)
    return flat.roll(by * whole.element_size()).view(whole.dtype).reshape(whole.shape)


def check(rank: int, chosen: Set, wholes: Mapping[str, torch.Tensor], output: Mapping[str, torch.Tensor]) -> None:
    held = [name for name, case in chosen.items() if rank in case.destination.mesh]
    assert sorted(output) == sorted(held)
    for name in held:
        require_equal(output[name], pick(wholes[name], chosen[name].destination, rank), f"{name} on rank {rank}")


@quick
@given(chosen=sets(), transport=st.sampled_from(TRANSPORTS))
def test_any_set_of_tensors(chosen: Set, transport: LocalTransport) -> None:
    plan = make_plan(*sides(chosen), **arguments(chosen))
    plan.verify()
    given_shards, wholes = shards_of(chosen)
    before = {rank: {name: shard.clone() for name, shard in held.items()} for rank, held in given_shards.items()}
    outputs, sent = transport.run_counted(plan, {rank: held for rank, held in given_shards.items() if held})
    for rank in range(RANKS):
        check(rank, chosen, wholes, outputs.get(rank, {}))
        for name, shard in before[rank].items():
            require_equal(given_shards[rank][name], shard, f"source {name} of rank {rank}")
    assert sum(sent.values()) == plan.wire_nbytes == plan.minimum_nbytes
    str(plan)


@quick
@given(chosen=sets())
def test_a_rank_alone_finds_its_part(chosen: Set) -> None:
    whole = make_plan(*sides(chosen), **arguments(chosen))
    for rank in whole.participants:
        alone = make_plan(*(as_written_by(rank, side) for side in sides(chosen)), **arguments(chosen), rank=rank)
        assert alone.digest() == whole.digest()
        assert [what_passes(program) for program in alone.for_rank(rank)] == [
            what_passes(program) for program in whole.for_rank(rank)
        ]


def what_passes(program: Any) -> list[Any]:
    return [
        (step.number, is_send, transfer.peer, transfer.nbytes, transfer.regions)
        for step in program.rounds
        for is_send, transfers in ((True, step.sends), (False, step.receives))
        for transfer in transfers
    ]


def empty(like: torch.Tensor) -> torch.Tensor:
    """Zeros of any dtype, also of those that torch cannot fill."""
    nbytes = like.numel() * like.element_size()
    return torch.zeros(nbytes, dtype=torch.uint8).view(like.dtype).reshape(like.shape)


def run_set(rank: int, chosen: Set, api: str, transport: str) -> None:
    """Move a set on this rank and compare."""
    given_shards, wholes = shards_of(chosen)
    source, destination = (as_written_by(rank, side) for side in sides(chosen))
    options = {**arguments(chosen), "timeout_seconds": 30.0, "transport": transport}
    out = None
    if api == "out":
        held = [name for name, case in chosen.items() if rank in case.destination.mesh]
        out = {
            name: restrided(empty(pick(wholes[name], chosen[name].destination, rank)), chosen[name].strides)
            for name in held
        }
    if api == "reshard":
        output = tricomm.reshard(given_shards[rank], source, destination, **options)
    elif api == "async":
        output = tricomm.reshard_async(given_shards[rank], source, destination, **options).wait()
    else:
        output = Resharder(source, destination, **options)(given_shards[rank], out=out)
    check(rank, chosen, wholes, output)
    assert out is None or all(output[name].data_ptr() == tensor.data_ptr() for name, tensor in out.items())


@settings(quick, max_examples=max(EXAMPLES // 5, 1))
@given(
    chosen=sets(),
    api=st.sampled_from(["reshard", "async", "kept", "out"]),
    transport=st.sampled_from(["network", "auto"]),
)
def test_any_set_over_gloo(ranks: Ranks, chosen: Set, api: str, transport: str) -> None:
    ranks.run(run_set, chosen, api, transport)


# ---- what sharing messages is for

PAIR = [Mesh([0], ("x",)), Mesh([1], ("x",))]


def one_to_one(shape: tuple[int, ...], dtype: str = "float32") -> tuple[ShardingSpec, ShardingSpec]:
    first = ShardingSpec(PAIR[0], (Replicate(),), shape, dtype)
    return first, ShardingSpec(PAIR[1], (Replicate(),), shape, dtype)


@pytest.mark.parametrize("kinds", [1, 3, 100])
@pytest.mark.parametrize("chunk_bytes", [1 << 10, 1 << 14, None])
def test_a_thousand_tiny_tensors_share_messages(kinds: int, chunk_bytes: int | None) -> None:
    """Of one shape or of many, of three dtypes."""
    dtypes = ("float32", "bfloat16", "int8")
    pairs = {f"w{n}": one_to_one((2, 3 + n % kinds), dtypes[n % 3]) for n in range(1000)}
    plan = planned(pairs, strategy=SendRecv(chunk_bytes))
    tensors = {
        name: torch.arange(source.shape[0] * source.shape[1]).reshape(source.shape).to(getattr(torch, source.dtype))
        for name, (source, _) in pairs.items()
    }
    outputs, traffic = LocalTransport().run_observed(plan, {0: tensors})
    nbytes = sum(tensor.nbytes for tensor in tensors.values())
    assert traffic[0, 1].nbytes == nbytes
    assert traffic[0, 1].messages <= nbytes // (chunk_bytes or (8 << 20)) + 1
    for name, tensor in tensors.items():
        assert torch.equal(outputs[1][name], tensor)


@pytest.mark.parametrize("kinds", [1, 3, 100])
@pytest.mark.parametrize("staging_bytes", [300, 1000, 2000, 3000, 12345, 50000, 65536])
def test_tiny_tensors_take_no_more_messages_than_staging_asks_for(kinds: int, staging_bytes: int) -> None:
    """Ten chunks at a time, of which one may be an eighth larger than the others: so cut, their bytes say how many."""
    dtypes = ("float32", "bfloat16", "int8")
    pairs = {f"w{n}": one_to_one((2, 3 + n % kinds), dtypes[n % 3]) for n in range(1000)}
    plan = planned(pairs, staging_bytes=staging_bytes)
    (message,) = (message for move in plan.moves for message in move.messages)
    assert len(message.chunks) <= plan.wire_nbytes // (staging_bytes // 10 * 8 // 9) + 1
    assert max(map(message.chunk_nbytes, range(len(message.chunks)))) <= staging_bytes // 10


def planned(pairs: Mapping[str, tuple[ShardingSpec, ShardingSpec]], **options: Any) -> Plan:
    return make_plan(
        {name: source for name, (source, _) in pairs.items()},
        {name: destination for name, (_, destination) in pairs.items()},
        **options,
    )


def test_what_tiny_tensors_need_is_sent_by_all_that_hold_it() -> None:
    """Each alone would come from the first holder; together the NICs send alike."""
    holders = Mesh([0, 1, 2, 3], ("dp",))
    pairs = {
        f"w{n}": (
            ShardingSpec(holders, (Replicate(),), (5 + n,), "float32"),
            ShardingSpec(Mesh([4 + n % 8], ("x",)), (Replicate(),)),
        )
        for n in range(40)
    }
    plan = planned(pairs)
    sending, _ = plan.nic_seconds()
    assert sending[:4].max() <= 1.05 * sending[:4].mean()


@pytest.mark.parametrize("staging_bytes", [1 << 16, 1 << 18, 1 << 20])
def test_staging_stays_within_its_budget(staging_bytes: int) -> None:
    rows, columns = Mesh([0, 1], ("x",)), Mesh([2, 3], ("x",))
    pairs = {
        f"w{n}": (
            ShardingSpec(rows, (Shard(0),), (64 + n % 3, 512), "float32"),
            ShardingSpec(columns, (Shard(1),), dtype="bfloat16" if n % 2 else None),
        )
        for n in range(12)
    }
    plan = planned(pairs, staging_bytes=staging_bytes)
    most = 0
    for rank in range(4):
        asked: list[int] = []
        endpoint = LocalEndpoint(LocalNetwork(False, (4, 4)), rank)
        execution = PlanExecution(plan, rank, torch.device("cpu"))
        tensors = [
            [
                torch.zeros(spec.local_shape(rank), dtype=getattr(torch, spec.dtype))
                for spec in specs
                if rank in spec.mesh
            ]
            for specs in ([item.source for item in plan.items], [item.destination for item in plan.items])
        ]

        def staging(nbytes: int, asked: list[int] = asked) -> torch.Tensor:
            asked.append(nbytes)
            return torch.empty(nbytes, dtype=torch.uint8)

        held = execution._holdings
        execution._bind(0, held.sources(tensors[0]), held.destinations(tensors[1]), staging, endpoint)
        most = max(most, *asked)
    assert 0 < most <= staging_bytes


def test_partial_tensors_and_others_move_together() -> None:
    contributions = ShardingSpec(Mesh([0, 1], ("dp",)), (Partial(),), (4, 6), "float32")
    rows = ShardingSpec(Mesh([0, 1], ("dp",)), (Shard(0),), (4, 6), "float32")
    there = ShardingSpec(Mesh([2], ("x",)), (Replicate(),))
    plan = planned({"a": (contributions, there), "b": (rows, there), "c": (contributions, there)})
    plan.verify()
    shard = torch.ones(2, 6)
    given = {rank: {"a": torch.full((4, 6), 1.0 + rank), "b": shard, "c": torch.full((4, 6), 5.0)} for rank in (0, 1)}
    outputs = LocalTransport().run(plan, given)
    assert [float(outputs[2][name].unique()) for name in "abc"] == [3.0, 1.0, 10.0]


def test_hosts_forward_sets_of_tensors() -> None:
    """One to six: what goes along a chain of hosts has parts of all tensors in each message."""
    one, many = Mesh([0], ("x",)), Mesh([[1, 2], [3, 4], [5, 6]], ("host", "device"))
    topology = Topology(("a", "b", "b", "c", "c", "d", "d"), nic_bytes_per_second=1e8)
    pairs = {
        f"w{n}": (
            ShardingSpec(one, (Replicate(),), (256, 300 + n), "bfloat16"),
            ShardingSpec(many, (Replicate(), Replicate())),
        )
        for n in range(20)
    }
    plan = planned(pairs, topology=topology)
    plan.verify()
    assert plan.simulated_seconds() <= 1.1 * plan.lower_bound_seconds()
    assert (
        max(len({part.stack for chunk in message.chunks for part in chunk}) for message in plan.moves[0].messages) > 1
    )


# ---- refusals between ranks

ROWS = ShardingSpec(Mesh([0, 1], ("x",)), (Shard(0),), (8, 4), "float32")
COLUMNS = ShardingSpec(Mesh([2, 3], ("x",)), (Shard(1),))


def other_names(rank: int) -> str:
    """Rank 3 calls with another name for one of the tensors."""
    if rank > 3:
        return ""
    names = ("wq", "wx") if rank == 3 else ("wq", "wk")
    try:
        tensors = {name: torch.zeros(4, 4) for name in names} if rank < 2 else None
        tricomm.reshard(tensors, dict.fromkeys(names, ROWS), dict.fromkeys(names, COLUMNS), timeout_seconds=20)
    except TransportError as error:
        return str(error)
    return "nothing was said"


def test_names_are_compared_between_ranks(ranks: Ranks) -> None:
    for text in ranks.run(other_names)[:4]:
        assert "wk" in text or "wx" in text, text


def wrong_once(rank: int) -> list[str]:
    """Rank 1 leaves a tensor out in its first call; the second is right."""
    if rank > 3:
        return ["", ""]
    mover = Resharder(
        dict.fromkeys(("wq", "wk"), ROWS), dict.fromkeys(("wq", "wk"), COLUMNS), timeout_seconds=20, confirm=True
    )
    told = []
    for call in range(2):
        tensors = {name: torch.full((4, 4), 1.0 + call) for name in ("wq", "wk")}
        if rank == 1 and call == 0:
            del tensors["wk"]
        try:
            output = mover(tensors if rank < 2 else None)
            told.append(str({name: float(tensor.unique()) for name, tensor in output.items()}))
        except (SpecError, TransportError) as error:
            told.append(f"{type(error).__name__}: {error}")
    return told


def test_a_missing_tensor_is_told_by_name_and_the_next_call_works(ranks: Ranks) -> None:
    answers = ranks.run(wrong_once)[:4]
    assert answers[1][0].startswith("SpecError")
    assert all("'wk'" in first for first, _ in answers)
    assert [second for _, second in answers] == ["{}", "{}", *["{'wk': 2.0, 'wq': 2.0}"] * 2]
