"""Hops that take turns on a NIC: the order that is found, what it gains, and that ranks keep to it."""

import re
import time
from itertools import pairwise

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from tests.pipeline.chain import CHAIN, MICROBATCHES, TIMEOUT_SECONDS, attempt, chain, data, require_trained
from tests.pipeline.costs.test_simulate import require_valid
from tests.pipeline.schedule.test_schedule import quick, schedules
from tricomm import Mesh, PlanError, Replicate, ShardingSpec
from tricomm.launch import Ranks
from tricomm.pipeline import (
    Channel,
    Costs,
    EdgeTensor,
    Executor,
    Limits,
    Link,
    PerDirectionFifo,
    Queues,
    Schedule,
    StageCost,
    Timeline,
    TransferCost,
    check,
    eager_one_f_one_b,
    in_turn,
    one_f_one_b,
    simulate,
    tune,
    with_communication,
)
from tricomm.pipeline.run.edges.directed_link import ReceiveHandle
from tricomm.pipeline.tune.evaluate import Simulator

TURNS = Queues.PER_DIRECTION


def one_nic_each(hop: float, stages: int = 4) -> Costs:
    """F = I = W = 1, and hosts with a NIC each; the inputs of the first stage need no gradient."""
    costs = Costs((StageCost(1, 0, 2), *[StageCost(1, 1, 1)] * (stages - 1)))
    for stage in range(stages - 1):
        for channel in (Channel(stage, stage + 1), Channel(stage + 1, stage)):
            cost = TransferCost(hop).sharing(f"host {channel.sender}", f"host {channel.receiver}")
            costs = costs.with_transfers([channel], cost)
    return costs


def require_turns(timeline: Timeline) -> None:
    """What a pipeline rank sends does not overlap, nor what it receives."""
    place = timeline.schedule.pipeline_rank_of
    for end in (0, 1):
        for pipeline_rank in range(timeline.schedule.pipeline_ranks):
            row = [one for one in timeline.transfers if place(one.channel[end]) == pipeline_rank]
            row.sort(key=lambda one: (one.begin, one.end))
            assert all(first.end <= second.begin for first, second in pairwise(row))


@quick
@given(schedules(), st.data())
def test_an_order_that_was_found_can_be_kept(schedule: Schedule, data: st.DataObject) -> None:
    """No ranks wait for each other, and on the clock it is as good as where whatever is ready goes first."""
    numbers, positive = st.sampled_from([0.0, 0.5, 1.0, 2.0, 3.25]), st.sampled_from([0.5, 1.0, 2.0])
    stages = [StageCost(data.draw(positive), data.draw(numbers), data.draw(numbers)) for _ in range(schedule.stages)]
    costs = Costs(tuple(stages))
    for channel in schedule.channels:
        costs = costs.with_transfers([channel], TransferCost(data.draw(numbers), data.draw(numbers)))
    turned = in_turn(schedule, costs, trials=data.draw(st.sampled_from([0, 10])))
    check(turned, TURNS)
    assert turned.compute_only() == schedule.compute_only()
    timeline = simulate(turned, costs, queues=TURNS)
    require_valid(timeline)
    require_turns(timeline)
    assert timeline.makespan_seconds <= Simulator(costs).ideal(schedule, TURNS).makespan_seconds + 1e-9


def test_turns_on_a_full_nic_reach_the_bound_of_the_wire() -> None:
    """The NIC of stage 2 sends 16 messages of 2 from 7 on without a pause; after the last one, a gradient, stage 1
    computes 1, a hop takes 2, and stage 0 computes 2. Nothing can be shorter.
    """
    costs = one_nic_each(2)
    schedule = eager_one_f_one_b(4, 8, depth=2, split=True)
    bound = 7 + 16 * 2 + 1 + 2 + 2
    as_ready = simulate(in_turn(schedule, costs), costs, queues=TURNS)
    improved = simulate(in_turn(schedule, costs, trials=100), costs, queues=TURNS)
    assert improved.makespan_seconds == bound
    assert as_ready.makespan_seconds == bound + 2
    assert simulate(schedule, costs).makespan_seconds > bound + 1  # all that share a NIC slow each other down


def test_the_tuner_lets_hops_take_turns_where_that_is_faster() -> None:
    shared = tune(lambda _: one_nic_each(1.5), [8])
    assert shared.best.queues is TURNS
    assert "hops in turn" in str(shared)
    assert shared.best.receives_ahead is None
    check(shared.best.schedule, TURNS)
    require_turns(shared.timeline)
    assert shared.timeline.makespan_seconds == shared.best.makespan_seconds == 36
    assert re.search(r"a microbatch keep host \d (in|out) for 3 s and the slowest stage computes 3 s", str(shared))
    at_once = [one for one in shared.compared if one.queues is Queues.PER_CHANNEL]
    assert min(one.makespan_seconds for one in at_once) > 1.03 * 36
    links = tune(lambda _: Costs.uniform(4, 1, 1, 1, 1.5), [8])
    assert all(one.queues is Queues.PER_CHANNEL for one in links.compared)


def test_turns_keep_to_limits() -> None:
    """The fastest forms hold too much; the others are looked at too."""
    tuned = tune(lambda _: one_nic_each(1.5), [8], limits=Limits(activations=5))
    assert {one.queues for one in tuned.compared} == {TURNS, Queues.PER_CHANNEL}
    assert max(one.activations for one in tuned.compared) <= 5


def test_orders_that_were_not_made_for_turns_are_refused() -> None:
    """With the receive of the gradient standing before that of the activation which it depends on, nothing moves."""
    schedule = Schedule.parse(
        [
            "0F0 0SEND_F0 0RECV_B0 0B0",
            "1RECV_B0 1RECV_F0 1F0 1SEND_F0 1B0 1SEND_B0",
            "2RECV_F0 2F0 2B0 2SEND_B0",
        ]
    )
    check(schedule)
    with pytest.raises(
        PlanError, match=r"with queues one per pipeline rank and direction: .*take a queue per directed edge"
    ):
        check(schedule, TURNS)
    check(with_communication(one_f_one_b(3, 4)), TURNS)


# ---- on ranks

SHAPE = (3, 5)


def link_between(source: int, destination: int, turns: PerDirectionFifo | None) -> Link:
    specs = [ShardingSpec(Mesh([rank], ("x",)), (Replicate(),), SHAPE, "float32") for rank in (source, destination)]
    name = f"{source} to {destination}, {'in turn' if turns else 'at once'}"
    return Link(name, [EdgeTensor(*specs)], microbatches=1, turns=turns, timeout_seconds=TIMEOUT_SECONDS)


def arrives(handle: ReceiveHandle, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not handle.done() and time.monotonic() < deadline:
        time.sleep(0.01)
    return handle.done()


def two_senders(rank: int, takes_turns: bool) -> bool | None:
    """Rank 2 receives from 0 and then from 1, which sends first: whether 1's message has arrived before 0 sends."""
    turns = PerDirectionFifo() if takes_turns else None
    store, key = dist.group.WORLD.get_group_store(), f"two senders {takes_turns}"
    links = {source: link_between(source, 2, turns) for source in (0, 1) if rank in (source, 2)}
    for link in links.values():
        link.connect()
    early = None
    if rank == 1:
        links[1].send(torch.ones(SHAPE), 0)
    elif rank == 2:
        first, second = links[0].recv(0), links[1].recv(0)
        early = arrives(second, 0.5 if takes_turns else TIMEOUT_SECONDS)
        store.set(key, "looked")
        assert (first.wait()[0, 0], second.wait()[0, 0]) == (0, 1)
    elif rank == 0:
        store.wait([key])
        links[0].send(torch.zeros(SHAPE), 0)
    for link in links.values():
        link.flush()
        link.close()
    return early


@pytest.mark.parametrize("takes_turns", [True, False])
def test_a_receive_waits_for_its_turn(ranks: Ranks, takes_turns: bool) -> None:
    assert ranks.run(two_senders, takes_turns)[2] is not takes_turns


def two_receivers(rank: int, takes_turns: bool) -> bool | None:
    """Rank 0 sends to 1 and then to 2: whether 2 has its message before 1 takes its own."""
    turns = PerDirectionFifo() if takes_turns else None
    store, key = dist.group.WORLD.get_group_store(), f"two receivers {takes_turns}"
    links = {to: link_between(0, to, turns) for to in (1, 2) if rank in (0, to)}
    for link in links.values():
        link.connect()
    early = None
    if rank == 0:
        links[1].send(torch.ones(SHAPE), 0)
        links[2].send(torch.full(SHAPE, 2.0), 0)
    elif rank == 2:
        handle = links[2].recv(0)
        early = arrives(handle, 0.5 if takes_turns else TIMEOUT_SECONDS)
        store.set(key, "looked")
        assert handle.wait()[0, 0] == 2
    elif rank == 1:
        store.wait([key])
        assert links[1].recv(0).wait()[0, 0] == 1
    for link in links.values():
        link.flush()
        link.close()
    return early


@pytest.mark.parametrize("takes_turns", [True, False])
def test_a_send_waits_for_its_turn(ranks: Ranks, takes_turns: bool) -> None:
    assert ranks.run(two_receivers, takes_turns)[2] is not takes_turns


class Broken(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(4, 4).double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("out of paper")


def failing(rank: int) -> tuple[str, str, float]:
    """A stage raises while transfers of others wait for their turn; afterwards the same ranks can train."""
    stages, edges = chain(rank, lambda index: Broken() if index == 2 else torch.nn.Linear(4, 4).double())
    schedule = in_turn(eager_one_f_one_b(4, MICROBATCHES), one_nic_each(2))
    executor = Executor(schedule, stages, edges, queues=TURNS, timeout_seconds=TIMEOUT_SECONDS)
    began = time.monotonic()
    kind, text = attempt(lambda: executor.step(data()))
    seconds = time.monotonic() - began
    require_trained(rank)
    return kind, text, seconds


def test_a_failure_frees_those_that_wait_for_their_turn(ranks: Ranks) -> None:
    outcomes = ranks.run(failing)
    for rank in range(len(CHAIN)):
        kind, text, seconds = outcomes[rank]
        assert seconds < TIMEOUT_SECONDS / 2
        assert kind == ("RuntimeError" if rank == 2 else "TransportError")
        assert rank == 2 or "rank 2 failed in 2F0: RuntimeError: out of paper" in text


def other_queues(rank: int, queues: tuple[Queues, ...]) -> tuple[str, str]:
    stages, edges = chain(rank)
    schedule = with_communication(one_f_one_b(4, MICROBATCHES))
    own = queues[rank % len(queues)]
    return attempt(lambda: Executor(schedule, stages, edges, queues=own, timeout_seconds=TIMEOUT_SECONDS))


def test_all_ranks_take_turns_or_none(ranks: Ranks) -> None:
    for kind, text in ranks.run(other_queues, (TURNS, Queues.PER_CHANNEL))[: len(CHAIN)]:
        assert kind == "TransportError"
        assert "queues" in text
        assert "PER_DIRECTION" in text


def test_queues_of_other_systems_are_refused(ranks: Ranks) -> None:
    for kind, text in ranks.run(other_queues, (Queues.PER_PAIR,))[: len(CHAIN)]:
        assert kind == "PlanError"
        assert "queues=Queues.PER_PAIR describes other systems; transfers of tricomm have queues PER_CHANNEL" in text


def confirmed_by_a_link(rank: int, takes_turns: bool, confirm: bool | None) -> bool | None:
    if rank > 1:
        return None
    specs = [ShardingSpec(Mesh([one], ("dp",)), (Replicate(),), (2,), "float32") for one in (0, 1)]
    turns = PerDirectionFifo() if takes_turns else None
    link = Link("a turn's end", [EdgeTensor(*specs)], microbatches=1, fifo=turns, confirm=confirm)
    return link.forward.resharders[0].confirm


def test_a_turn_in_host_memory_ends_when_the_bytes_are_there_and_not_when_the_kernel_has_them(ranks: Ranks) -> None:
    for takes_turns, confirm, confirms in ((True, None, True), (False, None, False), (True, False, False)):
        found = ranks.run(confirmed_by_a_link, takes_turns, confirm)
        assert found[:2] == [confirms] * 2, (takes_turns, confirm)
