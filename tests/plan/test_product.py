"""Moves by formulas: the parts that ranks work out alone are those of the whole, which is proved, level and fast."""

import random
from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from bench.planner.drawn import drawn
from bench.planner.quality import FORMULAS, SEARCH, measured
from tests.oracle import pick, require_equal, source_and_result
from tricomm import LocalTransport, Mesh, Partial, Plan, Replicate, Shard, ShardingSpec, Topology, make_plan
from tricomm.layout.columns import IntervalLists
from tricomm.layout.placement import Placement
from tricomm.plan.product.move import ProductMove
from tricomm.plan.product.pieces import cut_lists
from tricomm.plan.product.sharing import Sharing
from tricomm.plan.routes.chunks import RouteContext

ALL = Replicate()


def goes_by_formulas(plan: Plan) -> bool:
    context = RouteContext(plan.topology, 1, 1 << 28)
    (move,) = plan.moves
    return ProductMove.of(move.stacks[0].source, move.stacks[0].destination, 0, context, plan.participants) is not None


def what_passes(plan: Plan, rank: int) -> Iterator[tuple[bool, int, int, int, object]]:
    """Each send and receive of a rank: (is a send, round, peer, elements, boxes)."""
    for program in plan.for_rank(rank):
        for step in program.rounds:
            for is_send, transfers in ((True, step.sends), (False, step.receives)):
                for transfer in transfers:
                    yield is_send, step.number, transfer.peer, transfer.nbytes, transfer.regions


@pytest.mark.parametrize("seed", range(60))
def test_every_rank_works_out_its_part_of_the_whole(seed: int) -> None:
    move = drawn(seed)
    source, destination, topology = move.source, move.destination, move.topology
    whole = make_plan(source, destination, topology=topology, strategy=FORMULAS)
    assert goes_by_formulas(whole)
    whole.verify()
    assert whole.wire_nbytes == whole.minimum_nbytes
    for rank in whole.participants:
        alone = make_plan(source, destination, topology=topology, strategy=FORMULAS, rank=rank)
        assert alone.rank == rank
        assert alone.digest() == whole.digest()
        assert list(what_passes(alone, rank)) == list(what_passes(whole, rank))


def held_so(spec: ShardingSpec) -> ShardingSpec:
    """The same layout, told rank by rank."""
    return ShardingSpec.explicit({rank: spec.holding(rank) for rank in spec.mesh.ranks}, spec.global_shape, spec.dtype)


@pytest.mark.parametrize("seed", range(1, 60, 3))
def test_holdings_that_are_a_grid_are_planned_as_mesh_axes_are(seed: int) -> None:
    move = drawn(seed)
    source, destination = held_so(move.source), held_so(move.destination.resolved(move.source))
    whole = make_plan(source, destination, topology=move.topology, strategy=FORMULAS)
    whole.verify()
    if goes_by_formulas(whole):  # ranks without elements are parts of no dim
        by_axes = make_plan(move.source, move.destination, topology=move.topology, strategy=FORMULAS)
        assert whole.simulated_seconds() == pytest.approx(by_axes.simulated_seconds(), rel=0.03)
        for rank in whole.participants:
            alone = make_plan(source, destination, topology=move.topology, strategy=FORMULAS, rank=rank)
            assert list(what_passes(alone, rank)) == list(what_passes(whole, rank))
    shards, expected = source_and_result(source, destination)
    for rank, shard in LocalTransport().run(whole, shards).items():
        if rank in destination.mesh:
            require_equal(shard, pick(expected, destination, rank), f"rank {rank}")


def test_a_padded_vocabulary_that_is_trimmed_is_handed_on_by_its_receivers() -> None:
    """Two holders of each part of it, padded so that servers cut it elsewhere, and four servers."""
    trainers = Mesh(np.arange(16).reshape(2, 8).tolist(), ("dp", "tp"))
    servers = Mesh(np.arange(16, 48).reshape(4, 8).tolist(), ("dp", "tp"))
    padded = ShardingSpec(trainers, (ALL, Shard(0)), (129024, 1024), "bfloat16")
    vocabulary = padded.trimmed((128256, 1024))
    hosts = tuple(f"host{rank // 8}" for rank in range(48))
    plan = make_plan(vocabulary, ShardingSpec(servers, (ALL, Shard(0))), topology=Topology(hosts, nics_per_host=8))
    assert goes_by_formulas(plan)
    plan.verify()
    out, into = nic_nbytes(plan, plan.topology)
    assert sum(out[plan.topology.nic(rank)] for rank in range(16)) == 128256 * 1024 * 2
    assert max(into.values()) == 16032 * 1024 * 2


@pytest.mark.parametrize("seed", range(0, 60, 3))
def test_it_moves_what_it_says(seed: int) -> None:
    move = drawn(seed)
    source, destination, topology = move.source, move.destination, move.topology
    shards, expected = source_and_result(source, destination.resolved(source))
    plan = make_plan(source, destination, topology=topology, strategy=FORMULAS)
    result = LocalTransport().run(plan, shards)
    for rank in destination.mesh.ranks:
        require_equal(result[rank], pick(expected, destination.resolved(source), rank), f"rank {rank}")


def nic_nbytes(plan: Plan, topology: Topology) -> tuple[Counter[int], Counter[int]]:
    """Bytes that each NIC sends, and that each receives."""
    out: Counter[int] = Counter()
    into: Counter[int] = Counter()
    for move in plan.moves:
        for message in move.messages:
            nbytes = message.nbytes
            for sender, receiver in zip(message.chain[:-1], message.chain[1:], strict=True):
                if topology.host(sender) != topology.host(receiver):
                    out[topology.nic(sender)] += nbytes
                    into[topology.nic(receiver)] += nbytes
    return out, into


def test_it_is_about_as_fast_as_the_best_that_search_finds() -> None:
    found = measured(range(60))
    ratios = [one.ratio for one in found]
    assert np.median(ratios) <= 1.0
    assert max(ratios) <= 1.03
    assert sum(one.is_less_level for one in found) <= 1


def factors(dice: random.Random, count: int) -> list[int]:
    """Extents of one to three mesh axes whose product is ``count``."""
    found = []
    while count > 1 and len(found) < 2 and dice.random() < 0.8:
        found.append(dice.choice([factor for factor in range(2, count + 1) if count % factor == 0]))
        count //= found[-1]
    found += [count] if count > 1 or not found else []
    dice.shuffle(found)
    return found


def drawn_apart(seed: int) -> tuple[ShardingSpec, ShardingSpec, Topology]:
    """Product layouts on hosts that are alike, uneven and nested, with replicas on a side at least."""
    dice = random.Random(seed)
    while True:
        devices = dice.choice((1, 2, 4))
        shape = (dice.choice((10, 64, 257)), dice.choice((6, 96, 129)))
        specs: list[ShardingSpec] = []
        first = 0
        for _ in range(2):
            extents = factors(dice, devices * dice.choice((1, 2, 3, 4)))
            names = tuple(f"axis{index}" for index in range(len(extents)))
            count = int(np.prod(extents))
            mesh = Mesh(np.arange(first, first + count).reshape(extents).tolist(), names)
            segments = Shard(0, segments=(shape[0] - 4, 4))
            placements = [dice.choice((ALL, ALL, Shard(0), Shard(1), segments)) for _ in extents]
            order = dice.sample(names, len(names))
            specs.append(ShardingSpec(mesh, tuple(placements), shape, "int32", tuple(order)))
            first += count
        nics = dice.choice((1, devices))
        rate = dice.choice((12.5e9, 25e6))
        hosts = tuple(f"host{rank // devices}" for rank in range(first))
        topology = Topology(hosts, nics_per_host=nics, nic_bytes_per_second=rate)
        source, destination = specs[0], specs[1].resolved(specs[0])
        context = RouteContext(topology, 1, 1 << 28)
        if ProductMove.of(source, destination, 0, context, range(first)) is not None:
            return specs[0], specs[1], topology


def test_on_hosts_of_their_own_it_is_as_fast_as_the_best_that_search_finds() -> None:
    ratios, levels = [], []
    for seed in range(60):
        source, destination, topology = drawn_apart(seed)
        formulas, search = (
            make_plan(source, destination, topology=topology, strategy=strategy) for strategy in (FORMULAS, SEARCH)
        )
        ratios.append(formulas.simulated_seconds() / search.simulated_seconds())
        busiest = [max(max(side.values()) for side in nic_nbytes(plan, topology)) for plan in (formulas, search)]
        levels.append(busiest[0] / busiest[1])
    assert np.median(ratios) <= 1.0
    assert np.quantile(ratios, 0.95) <= 1.01
    assert max(ratios) <= 1.03
    assert np.quantile(levels, 0.9) <= 1.05


def tensor_parallel(ranks: int) -> tuple[ShardingSpec, ShardingSpec]:
    """FSDP to replicas of tensor parallelism 8, rows that no mesh divides."""
    shape = (50257, 12288)
    source = ShardingSpec(Mesh(range(ranks), ("fsdp",)), (Shard(0),), shape, "bfloat16")
    replicas = Mesh(np.arange(ranks, 2 * ranks).reshape(-1, 8).tolist(), ("dp", "tp"))
    return source, ShardingSpec(replicas, (ALL, Shard(1)))


def test_a_rank_of_a_thousand_knows_its_own_part_only() -> None:
    source, destination = tensor_parallel(1024)
    topology = Topology(tuple(f"host{rank // 8}" for rank in range(2048)), nics_per_host=8)
    plan = make_plan(source, destination, topology=topology, rank=1500)
    (program,) = plan.for_rank(1500)
    received = sum(transfer.nbytes for step in program.rounds for transfer in step.receives)
    assert received == 50257 * 1536 * 2
    assert len(plan.moves[0].messages) <= 1024
    assert len(plan.moves[0].tasks) <= 1024


def test_ranks_share_what_their_tile_needs_where_senders_would_be_too_slow() -> None:
    one = ShardingSpec(Mesh([0], ("x",)), (ALL,), (4096, 4096), "float32")
    many = ShardingSpec(Mesh(range(1, 65), ("dp",)), (ALL,))
    plan, searched = make_plan(one, many), make_plan(one, many, strategy=SEARCH)
    out, into = nic_nbytes(plan, plan.topology)
    assert max(out.values()) <= 4096 * 4096 * 4
    assert set(into.values()) == {4096 * 4096 * 4}
    assert plan.simulated_seconds() <= 1.03 * searched.simulated_seconds()
    plan.verify()


@pytest.mark.parametrize("experts", [4, 32])
def test_ties_of_many_tensors_do_not_all_fall_on_the_same_holders(experts: int) -> None:
    """Each expert is on four ranks and goes to one, whose NIC is the slowest whichever of the four it hears from."""
    sources, destinations = {}, {}
    for expert in range(experts):
        holders = Mesh(range(4 * expert, 4 * expert + 4), ("dp",))
        sources[f"expert{expert}"] = ShardingSpec(holders, (ALL,), (64, 1 << 20), "bfloat16")
        destinations[f"expert{expert}"] = ShardingSpec(Mesh([4 * experts + expert], ("ep",)), (ALL,))
    hosts = tuple(f"host{rank // 8}" for rank in range(5 * experts))
    topology = Topology(hosts, nics_per_host=8)
    plan = make_plan(sources, destinations, topology=topology, strategy=FORMULAS)
    out, into = nic_nbytes(plan, topology)
    assert max(out.values()) <= 1.05 * sum(out.values()) / (4 * experts)
    assert set(into.values()) == {128 << 20}
    assert plan.simulated_seconds() <= 1.05 * plan.lower_bound_seconds()
    plan.verify()


def test_small_tensors_of_a_set_are_not_cut_to_be_level() -> None:
    holders, receivers = Mesh(range(64), ("dp",)), Mesh(range(64, 66), ("ep",))
    names = ("gate", "norm")
    sources = {name: ShardingSpec(holders, (ALL,), (64, at + 1), "bfloat16") for at, name in enumerate(names)}
    plan = make_plan(sources, dict.fromkeys(names, ShardingSpec(receivers, (Shard(0),))))
    assert len(plan.moves[0].messages) <= 2 * len(names)


def test_a_holder_gives_a_piece_to_each_of_few_hosts_where_that_saves_a_hop() -> None:
    shape = (64, 2048)
    two = ShardingSpec(Mesh([0, 1], ("x",)), (ALL,), shape, "float32")
    four = ShardingSpec(Mesh(range(2, 6), ("y",)), (ALL,), shape)
    topology = Topology(tuple("aabbcc"))
    plan, searched = (make_plan(two, four, topology=topology, strategy=way) for way in (FORMULAS, SEARCH))
    messages = plan.moves[0].messages
    assert any((message.parents or ()).count(0) > 1 for message in messages)
    assert plan.simulated_seconds() <= 1.03 * searched.simulated_seconds()
    plan.verify()


# Seeds of layouts at which formulas were slower than the search by 3 to 25 %, or off a bound that it reaches.
FEWER_SENDERS = [419, 1074, 1088, 1170, 1259, 1274, 1459, 1491]
ENTRIES = [191, 198, 1222, 1257, 1380, 2162, 2469, 2498]
TURNS = [1219, 2067]
NICS = [391]
RAGGED_RINGS = [365, 2058]
# Cells that stay whole go to whoever has least to do, though some of a tile's cells are not sent at all.
ALLOTTED = [47, 3097, 3169, 3173, 3681, 5367]
WRONG_ESTIMATES = [3252]
CHUNKS = [3015, 3018, 3094, 3271]
ENTRIES_OF_SHARED_HOSTS = [2056]
# Formulas were as fast, but loaded the busiest NIC more.
LEVEL = [146, 179, 212, 269, 292, 331, 379, 1024, 1073, 1076, 3270, 3458]
COPIES_ON_A_HOST = [1338]
# All cells but one or two stay whole, and those are cut for holders whose NICs would else send less than others.
LEVELLED = [305, 439, 2055, 4475, 6769, 6775, 6787]
# Senders give messages to all hosts, but for those which would post more than others.
BY_LOAD = [2395]
# Chains come last to hosts that have holders; as many senders as a host has NICs; who posts most has no long message.
BESIDE_HOLDERS = [6313, 6826, 6912]
# Tiles are unequal, so as many equal parts of each as a host has NICs; or pieces enter where least was heard.
OF_EACH_CELL = [6630, 8421]


MENDED = FEWER_SENDERS + ENTRIES + COPIES_ON_A_HOST + TURNS + NICS + RAGGED_RINGS + LEVEL
MENDED += (
    OF_EACH_CELL + BESIDE_HOLDERS + BY_LOAD + LEVELLED + ALLOTTED + WRONG_ESTIMATES + CHUNKS + ENTRIES_OF_SHARED_HOSTS
)


@pytest.mark.parametrize("seed", MENDED)
def test_it_is_as_good_as_search_where_it_once_was_not(seed: int) -> None:
    (found,) = measured([seed])
    assert not found.is_worse
    assert not found.is_less_level


@pytest.mark.parametrize("seed", OF_EACH_CELL + BESIDE_HOLDERS + BY_LOAD + LEVELLED)
def test_each_rank_finds_its_part_where_loads_of_all_say_who_sends(seed: int) -> None:
    move = drawn(seed)
    whole, *alone = (
        make_plan(move.source, move.destination, topology=move.topology, strategy=FORMULAS, rank=rank)
        for rank in (None, *sorted({*move.source.mesh.ranks, *move.destination.mesh.ranks}))
    )
    for plan in alone:
        assert plan.rank is not None
        assert list(what_passes(plan, plan.rank)) == list(what_passes(whole, plan.rank))


def test_replicas_behind_a_shared_host_hear_from_holders_of_all_hosts() -> None:
    """Of 16 holders five are on hosts that have receivers, too; the other receivers need not all hear from those."""
    shape = (64, 2048)
    sixteen = ShardingSpec(Mesh(range(16), ("x",)), (ALL,), shape, "float32")
    tiles = ShardingSpec(Mesh(np.arange(11, 23).reshape(3, 4).tolist(), ("dp", "tp")), (ALL, Shard(0)), shape)
    topology = Topology(tuple(f"host{rank // 4}" for rank in range(24)))
    plan = make_plan(sixteen, tiles, topology=topology, strategy=FORMULAS)
    plan.verify()
    out, _ = nic_nbytes(plan, topology)
    assert max(out.values()) <= 2 * 16 * 2048 * 4  # seven tiles from four NICs


def test_small_messages_are_cut_where_nics_are_slow() -> None:
    """Through a chain of two hosts at 25 MB/s a message of 8 KiB is worth several chunks, which fill the chain."""
    shape = (4096, 6)
    three = ShardingSpec(Mesh(range(4), ("x",)), (Shard(1),), shape, "int32")
    four = ShardingSpec(Mesh(range(4, 8), ("y",)), (ALL,), shape)
    topology = Topology(tuple("aabbccdd"), nic_bytes_per_second=25e6, nics_per_host=2)
    plan = make_plan(three, four, topology=topology, strategy=FORMULAS)
    assert plan.simulated_seconds() <= 1.1 * plan.lower_bound_seconds()


def test_a_sliver_at_the_end_of_a_tile_is_sent_by_its_last_holder() -> None:
    """The last of 32 parts is one row, less than a hundredth of what each of five holders sends."""
    shape = (993, 4096)
    five = ShardingSpec(Mesh(range(5), ("x",)), (ALL,), shape, "float32")
    rows = ShardingSpec(Mesh(range(5, 37), ("y",)), (Shard(0),), shape)
    plan = make_plan(five, rows)
    assert goes_by_formulas(plan)
    plan.verify()
    for rank in (0, 4, 36):
        assert list(what_passes(make_plan(five, rows, rank=rank), rank)) == list(what_passes(plan, rank))
    move = ProductMove.of(five, rows.resolved(five), 0, RouteContext(plan.topology, 1, 1 << 28), range(37))
    assert move is not None
    pieces = move.cutting.pieces(1, Sharing(senders=5, shares=1), None)
    assert pieces.senders[pieces.tiles == 31].tolist() == [4]


@pytest.mark.parametrize("rank", [0, 1, 4, 6, 15])
def test_nics_send_the_same_where_they_have_unequally_many_holders(rank: int) -> None:
    shape = (60, 1024)
    five = ShardingSpec(Mesh(range(5), ("x",)), (ALL,), shape, "float32")
    tiles = ShardingSpec(Mesh(range(6, 16), ("y",)), (Shard(0),), shape)
    topology = Topology(tuple("aabbccddeeffgghh"), nic_bytes_per_second=25e6)
    plan = make_plan(five, tiles, topology=topology, strategy=FORMULAS)
    out, _ = nic_nbytes(plan, topology)
    assert max(out.values()) <= 1.05 * 60 * 1024 * 4 / 3
    plan.verify()
    alone = make_plan(five, tiles, topology=topology, strategy=FORMULAS, rank=rank)
    assert list(what_passes(alone, rank)) == list(what_passes(plan, rank))


def test_no_more_holders_send_than_keep_the_receivers_busy() -> None:
    shape = (10, 2048)
    twelve = ShardingSpec(Mesh(range(12), ("x",)), (ALL,), shape, "float32")
    four = ShardingSpec(Mesh(range(12, 16), ("y",)), (ALL,), shape)
    topology = Topology(tuple("aaaabbbbccccdddd"), nic_bytes_per_second=25e6, nics_per_host=4)
    plan = make_plan(twelve, four, topology=topology, strategy=FORMULAS)
    senders = {message.chain[0] for message in plan.moves[0].messages}
    assert len(senders) == 4
    assert {message.chain[1] for message in plan.moves[0].messages} == {12, 13, 14, 15}


@pytest.mark.parametrize(
    "change",
    ["no grid", "overlapping parts", "unequal NICs", "nothing", "no dims", "no replicas"],
)
def test_what_formulas_do_not_cover_is_searched(change: str) -> None:
    shape: tuple[int, ...] = {"nothing": (0, 4), "no dims": ()}.get(change, (8, 4))
    cut: Placement = ALL if change == "no dims" else Shard(0)
    first = ShardingSpec(Mesh([[0, 1], [2, 3]], ("dp", "tp")), (ALL, cut), shape, "float32")
    second = ShardingSpec(Mesh([[4, 5], [6, 7]], ("dp", "tp")), (ALL, cut), shape)
    if change == "no replicas":
        first = ShardingSpec(Mesh(range(4), ("x",)), (cut,), shape, "float32")
        second = ShardingSpec(Mesh(range(4, 8), ("x",)), (cut,), shape)
    if change == "no grid":  # three ranks hold the first rows, one the others
        held = {rank: first.holding(rank if rank == 3 else 0) for rank in range(4)}
        first = ShardingSpec.explicit(held, shape, "float32")
    if change == "overlapping parts":
        rows = (((0, 5),), ((3, 8),))
        first = ShardingSpec.explicit({rank: (rows[rank % 2], ((0, 4),)) for rank in range(4)}, shape, "float32")
    rates = dict(zip("abcd", (1e9, 2e9, 1e9, 1e9), strict=True)) if change == "unequal NICs" else 1e9
    plan = make_plan(first, second, topology=Topology(tuple("aabbccdd"), rates), strategy=FORMULAS)
    assert not goes_by_formulas(plan)
    plan.verify()


def test_lists_are_cut_by_place() -> None:
    lists = IntervalLists.of([((0, 4), (8, 12)), ((4, 8),)])
    rows = np.array([0, 1, 0, 1])
    cut = np.array([True, False, True, True])
    found, column = cut_lists(lists, rows, cut, np.array([2, 0, 5, 1]), np.array([6, 4, 8, 3]))
    assert [found[int(row)] for row in column] == [((2, 4), (8, 10)), ((4, 8),), ((9, 12),), ((5, 7),)]


def test_a_cast_and_a_reduction_go_by_formulas_too() -> None:
    sums = ShardingSpec(Mesh(range(4), ("x",)), (Partial("sum"),), (64, 6), "float32")
    halves = ShardingSpec(Mesh([[4, 5], [6, 7]], ("dp", "tp")), (ALL, Shard(0)), dtype="bfloat16")
    plan = make_plan(sums, halves, strategy=FORMULAS)
    shards = {rank: torch.full((64, 6), float(rank)) for rank in range(4)}
    for rank, shard in LocalTransport().run(plan, shards).items():
        assert rank < 4 or torch.equal(shard, torch.full((32, 6), 6.0, dtype=torch.bfloat16))


def test_a_trimmed_vocabulary_shares_messages_with_what_is_cut_by_axes() -> None:
    """Its holdings are told rank by rank, and each of its rows has one holder all the same."""
    first, second = Mesh([0, 1], ("tp",)), Mesh(range(2, 6), ("tp",))
    here = {0: (((0, 6),), ((0, 8),)), 1: (((6, 10),), ((0, 8),))}
    there = {2 + at: (((3 * at, min(3 * at + 3, 10)),), ((0, 8),)) for at in range(4)}
    embed = ShardingSpec.explicit(here, (10, 8), "float32"), ShardingSpec.explicit(there, (10, 8), "float32")
    other = ShardingSpec(first, (Shard(0),), (8, 8), "float32"), ShardingSpec(second, (Shard(0),), (8, 8), "float32")
    sides = [{"embed": embed[side], "other": other[side]} for side in (0, 1)]
    plan = make_plan(*sides)
    plan.verify()
    (move,) = plan.moves
    pairs = [message.chain for message in move.messages]
    assert len(pairs) == len(set(pairs))
    assert {(0, 2), (0, 3), (1, 4), (1, 5)} <= set(pairs)
    for rank in range(6):
        alone = make_plan(*sides, rank=rank)
        assert alone.rank == rank
        found = {(message.chain, message.chunks[0]) for message in alone.moves[0].messages}
        assert found == {(message.chain, message.chunks[0]) for message in move.messages if rank in message.chain}
