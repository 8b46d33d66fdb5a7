"""Schedules as values: text that parses back, generators by definition, torch's CSV, and a proof that finds faults."""

from dataclasses import replace
from itertools import pairwise, permutations
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.pipelining import schedules as torch_schedules

from tricomm import PlanError
from tricomm.pipeline import (
    Action,
    Channel,
    Edge,
    Kind,
    Queues,
    Schedule,
    check,
    eager_one_f_one_b,
    gpipe,
    interleaved_one_f_one_b,
    one_f_one_b,
    read_csv,
    receive_ring,
    warmed_up,
    with_communication,
    write_csv,
    zero_bubble,
)
from tricomm.pipeline.schedule.actions import receive, send
from tricomm.pipeline.schedule.communication import with_synchronous_communication

quick = settings(max_examples=60, deadline=None, derandomize=True)


def texts(schedule: Schedule) -> list[str]:
    return [" ".join(map(str, actions)) for actions in schedule.lists]


@st.composite
def schedules(draw: st.DrawFn) -> Schedule:
    """Every generator, with skip edges where it has them."""
    stages, microbatches = draw(st.integers(1, 6)), draw(st.integers(1, 9))
    skips = [(first, last) for first in range(stages) for last in range(first + 2, stages)]
    edges = [(stage, stage + 1) for stage in range(stages - 1)]
    edges += draw(st.lists(st.sampled_from(skips), max_size=3)) if skips else []
    kind = draw(st.sampled_from(["warmed up", "eager", "zero bubble", "interleaved"]))
    if kind == "interleaved":
        rounds = draw(st.integers(1, 3))
        groups = draw(st.integers(1, 3))
        count = microbatches if microbatches <= stages else stages * groups
        return interleaved_one_f_one_b(stages, count, stages_per_rank=rounds)
    if kind == "zero bubble":
        return zero_bubble(stages, microbatches, depth=draw(st.integers(0, 2)), edges=edges)
    split = draw(st.booleans())
    delay = draw(st.lists(st.integers(0, 4), min_size=stages, max_size=stages)) if split else 0
    if kind == "eager":
        depth = draw(st.integers(0, 3))
        return eager_one_f_one_b(stages, microbatches, depth=depth, split=split, weight_delay=delay, edges=edges)
    # More forwards first than the next stage has: what any such pipeline needs.
    growth = draw(st.lists(st.integers(0, 3), min_size=stages, max_size=stages))
    warm_up = [stages - stage + sum(growth[stage:]) for stage in range(stages)]
    return warmed_up(microbatches, warm_up, split=split, weight_delay=delay, edges=edges)


def test_actions_are_written_as_torch_writes_them() -> None:
    for text in ("2F0", "2B11", "1I3", "0W2", "3SEND_F1", "1RECV_F0", "1SEND_B0", "1RECV_B0"):
        action = Action.parse(text)
        assert str(action) == text
        assert str(torch_schedules._Action.from_str(text)) == text
        assert eval(repr(action)) == action
    assert Action.parse("3SEND_F1") == Action(3, Kind.SEND_FORWARD, 1, peer=4)
    assert Action.parse("1RECV_B0").channel == Channel(2, 1)


def test_skip_edges_name_their_other_end() -> None:
    for text, channel in {
        "0SEND_F2>3": Channel(0, 3),
        "3RECV_F2<0": Channel(0, 3),
        "3SEND_B2>0": Channel(3, 0),
        "0RECV_B2<3": Channel(3, 0),
    }.items():
        action = Action.parse(text)
        assert str(action) == text
        assert action.channel == channel
        assert channel.edge == Edge(0, 3)
    assert str(Action.parse("0SEND_F2>1")) == "0SEND_F2"


@pytest.mark.parametrize("text", ["", "F0", "2F", "2X0", "2F0>3", "0SEND_F2<3", "3RECV_F2>0", "2f0", "2F0 "])
def test_what_is_no_action_is_refused(text: str) -> None:
    with pytest.raises(PlanError, match=r"is not an action; write stage, kind and microbatch, as 2F0, 1I3"):
        Action.parse(text)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Action(-1, Kind.FORWARD, 0), "counted from 0"),
        (lambda: Action(0, Kind.FORWARD, 0, peer=1), "computes and has no peer, but peer=1; leave it out"),
        (lambda: Action(0, Kind.RECEIVE_FORWARD, 0), "which is not a stage before it; activations go to later"),
        (lambda: Action.parse("3SEND_F0>1"), "which is not a stage after it; activations go to later"),
        (lambda: Schedule.parse(["0F0 0B0", "0F1 0B1"]), "at pipeline ranks 0 and 1; a stage has one pipeline rank"),
        (lambda: Schedule.parse(["0F0 0B0", ""]), "pipeline rank 1 of the schedule has no actions"),
        (lambda: Schedule.parse(["1F0 1B0"]), "no actions of stage 0, and stages are counted from 0"),
        (lambda: Schedule.parse(["0F0 0B0 0F1"]), "stage 0 does 0F1 for microbatch 1; each stage does F and B"),
        (lambda: Schedule.parse(["0F0 0B0 0I0 0W0"]), "stage 0 does 0F0 0B0 0I0 0W0 for microbatch 0"),
        (lambda: Schedule.parse(["0F0 0B0 0F0"]), "stage 0 does 0F0 0B0 0F0 for microbatch 0"),
        (lambda: Schedule.parse(["0F0 0B0", "1F0 1B0"], [(1, 0)]), "edge 1-0 does not join an earlier stage"),
        (lambda: gpipe(0, 3), "stages=0 must be a whole number from 1"),
        (lambda: gpipe(2, 0), "microbatches=0 must be a whole number from 1"),
        (lambda: eager_one_f_one_b(2, 2, depth=-1), "depth=-1 must be at least 0"),
        (lambda: one_f_one_b(2, 2, weight_delay=1), "weight_delay=1 delays weight gradients of backwards; pass split"),
        (lambda: one_f_one_b(2, 2, split=True, weight_delay=(1,)), "or one for each of 2 stages"),
        (lambda: interleaved_one_f_one_b(4, 6), "microbatches=6 is above pipeline_ranks=4 and no multiple of it"),
        (lambda: with_communication(gpipe(2, 2), receives_ahead=-1), "receives_ahead=-1 would post a receive after"),
        (lambda: write_csv(gpipe(3, 1, edges=[(0, 1), (1, 2), (0, 2)])), "torch's schedules know no others"),
    ],
)
def test_errors_name_the_value_the_rule_and_the_remedy(make: Any, message: str) -> None:
    with pytest.raises(PlanError) as caught:
        make()
    assert message in str(caught.value)


def test_the_known_schedules_by_hand() -> None:
    assert texts(gpipe(2, 2)) == ["0F0 0F1 0B0 0B1", "1F0 1F1 1B0 1B1"]
    assert texts(one_f_one_b(2, 3)) == ["0F0 0F1 0B0 0F2 0B1 0B2", "1F0 1B0 1F1 1B1 1F2 1B2"]
    assert texts(eager_one_f_one_b(2, 4))[0] == "0F0 0F1 0F2 0B0 0F3 0B1 0B2 0B3"
    assert texts(one_f_one_b(1, 2, split=True)) == ["0F0 0I0 0W0 0F1 0I1 0W1"]
    assert texts(one_f_one_b(1, 3, split=True, weight_delay=1)) == ["0F0 0I0 0F1 0I1 0W0 0F2 0I2 0W1 0W2"]
    assert texts(interleaved_one_f_one_b(2, 2)) == [
        "0F0 0F1 2F0 2F1 2B0 2B1 0B0 0B1",
        "1F0 1F1 3F0 3B0 3F1 3B1 1B0 1B1",
    ]


@pytest.mark.parametrize("stages", [1, 2, 4, 8])
@pytest.mark.parametrize("depth", [0, 1, 2, 3])
def test_warm_up_is_what_the_paper_says(stages: int, depth: int) -> None:
    """Before the first backward: S - s for 1F1B, 2 (S - s) - 1 for eager 1F1B, at most M."""
    for microbatches in (1, 3, 64):
        schedule = eager_one_f_one_b(stages, microbatches, depth=depth)
        for stage, actions in enumerate(schedule.lists):
            kinds = [action.kind for action in actions]
            expected = (stages - stage) + depth * (stages - 1 - stage)
            assert kinds.index(Kind.BACKWARD) == min(microbatches, expected)


@pytest.mark.parametrize(("pipeline_ranks", "rounds", "microbatches"), [(4, 2, 16), (2, 3, 4), (4, 2, 2), (4, 1, 8)])
def test_interleaving_is_torchs(pipeline_ranks: int, rounds: int, microbatches: int) -> None:
    class Stage:
        is_first = is_last = has_backward = False
        group_size, num_stages, submod, group = pipeline_ranks, pipeline_ranks * rounds, None, None

        def __init__(self, index: int) -> None:
            self.stage_index, self.group_rank = index, 0
            self.stage_index_to_group_rank: dict[int, int] = {}

    stages: Any = [Stage(turn * pipeline_ranks) for turn in range(rounds)]
    theirs = torch_schedules.ScheduleInterleaved1F1B(stages, microbatches).pipeline_order
    ours = interleaved_one_f_one_b(pipeline_ranks, microbatches, stages_per_rank=rounds)
    for pipeline_rank in range(pipeline_ranks):
        named = [str(action) for action in theirs[pipeline_rank] if action is not None]
        assert list(map(str, ours.lists[pipeline_rank])) == named


@quick
@given(schedules(), st.integers(0, 6))
def test_every_generated_schedule_is_proved_and_parses_back(schedule: Schedule, ahead: int) -> None:
    check(schedule)
    lowered = with_communication(schedule, receives_ahead=ahead)
    check(lowered)
    assert lowered.compute_only() == schedule
    assert Schedule.parse(texts(lowered), lowered.edges) == lowered
    if schedule.edges == Schedule(schedule.lists).edges:
        assert read_csv(write_csv(lowered)) == lowered
        assert read_csv(write_csv(schedule)) == schedule


@quick
@given(schedules(), st.integers(0, 4))
def test_sends_and_receives_stand_where_they_should(schedule: Schedule, ahead: int) -> None:
    lowered = with_communication(schedule, receives_ahead=ahead)
    for actions in lowered.lists:
        for before, action in pairwise(actions):
            if action.kind.is_send:
                producer = lowered.producer(action.channel, action.microbatch)
                assert before == producer or (before.kind.is_send and before.microbatch == action.microbatch)
        computed = [action for action in actions if action.is_compute]
        for index, action in enumerate(actions):
            if action.kind.is_receive:
                ahead_of = computed[sum(one.is_compute for one in actions[:index]) :]
                consumers = [action.channel in lowered.inputs(one) for one in ahead_of]
                assert any(
                    consumers[one] and ahead_of[one].microbatch == action.microbatch for one in range(len(consumers))
                )
    if ahead == 0 and schedule.edges == Schedule(schedule.lists).edges:
        for actions in lowered.lists:
            for action, after in pairwise(actions):
                assert not action.kind.is_receive or after.is_compute or after.kind.is_receive


@quick
@given(schedules())
def test_synchronous_sends_and_receives_meet(schedule: Schedule) -> None:
    """Each rank goes on only when what it sends or receives has crossed, for which the other end must stand there."""
    lowered = with_synchronous_communication(schedule)
    assert lowered.compute_only() == schedule
    lists = [list(actions) for actions in lowered.lists]
    crossed, computed, moved = set(), set(), True
    while moved:
        moved = False
        for actions in lists:
            while actions and actions[0].is_compute:
                action = actions.pop(0)
                place = lowered.pipeline_rank_by_stage
                for channel in lowered.inputs(action):
                    if place[channel.sender] != place[channel.receiver]:
                        assert (channel, action.microbatch) in crossed
                computed.add(action)
                moved = True
        for one, other in permutations(lists, 2):
            if one and other and one[0].kind.is_send and other[0].kind.is_receive:
                there, here = (one[0].channel, one[0].microbatch), (other[0].channel, other[0].microbatch)
                if there == here:
                    assert lowered.producer(*here) in computed
                    crossed.add(here)
                    one.pop(0), other.pop(0)
                    moved = True
    assert not any(lists)
    usual = with_communication(schedule)
    for channel in schedule.channels:
        order = [[one.microbatch for one in lowered.actions() if one == receive(channel, one.microbatch)]]
        order += [[one.microbatch for one in lowered.actions() if one == send(channel, one.microbatch)]]
        order += [[one.microbatch for one in usual.actions() if one == send(channel, one.microbatch)]]
        assert order[0] == order[1] == order[2]
        assert receive_ring(lowered, channel) <= receive_ring(usual, channel)


def test_a_channel_receives_in_the_order_in_which_it_sends() -> None:
    """Stage 1 begins with microbatch 1, so the receive of 0, which is sent first, comes before its time."""
    schedule = Schedule.parse(["0F0 0F1 0B0 0B1", "1F1 1B1 1F0 1B0"])
    lowered = with_communication(schedule, receives_ahead=0)
    check(lowered)
    assert texts(lowered)[1] == "1RECV_F0 1RECV_F1 1F1 1B1 1SEND_B1 1F0 1B0 1SEND_B0"
    assert texts(lowered)[0] == "0F0 0SEND_F0 0F1 0SEND_F1 0RECV_B1 0RECV_B0 0B0 0B1"


def test_torch_reads_what_is_written() -> None:
    text = write_csv(with_communication(zero_bubble(4, 6)))
    for row, actions in zip(text.splitlines(), with_communication(zero_bubble(4, 6)).lists, strict=True):
        assert [str(torch_schedules._Action.from_str(cell)) for cell in row.split(",")] == list(map(str, actions))


def test_what_torch_writes_is_read() -> None:
    text = "0UNSHARD,0F0,,0SEND_F0,0RECV_B0,(0F1;0B0)OVERLAP_F_B\n1F0,1B0\n"
    with pytest.raises(PlanError, match="stage 0 does 0F1 for microbatch 1"):
        read_csv(text)
    text = "0UNSHARD,0F0,,(0F1;0B0)OVERLAP_F_B,0B1,0REDUCE_GRAD\n1F0,1B0,1F1,1B1\n"
    assert texts(read_csv(text)) == ["0F0 0F1 0B0 0B1", "1F0 1B0 1F1 1B1"]
    with pytest.raises(PlanError, match="'0X0' is not an action"):
        read_csv("0X0")


GOOD = with_communication(one_f_one_b(3, 3, split=True, edges=[(0, 1), (1, 2), (0, 2)]))


def moved(schedule: Schedule, text: str, before: str) -> Schedule:
    """One action put right before another of its list."""
    action, anchor = Action.parse(text), Action.parse(before)
    pipeline_rank = schedule.pipeline_rank_of(action.stage)
    rest = [one for one in schedule.lists[pipeline_rank] if one != action]
    rest.insert(rest.index(anchor), action)
    return replace(schedule, lists=(*schedule.lists[:pipeline_rank], tuple(rest), *schedule.lists[pipeline_rank + 1 :]))


def without(schedule: Schedule, text: str) -> Schedule:
    return replace(schedule, lists=tuple(tuple(one for one in row if str(one) != text) for row in schedule.lists))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (moved(GOOD, "1I0", "1F0"), "1I0 at pipeline rank 1 comes before 1F0, but a backward needs its forward; put"),
        (moved(GOOD, "1W1", "1I1"), "1W1 at pipeline rank 1 comes before 1I1, but the gradient of weights follows"),
        (moved(GOOD, "0SEND_F1>2", "0F1"), "comes before 0F1, but what is sent must have been computed"),
        (moved(GOOD, "2I0", "2RECV_F0"), "comes before 2F0"),
        (
            moved(GOOD, "2F0", "2RECV_F0<0"),
            "2F0 at pipeline rank 2 comes before 2RECV_F0, but what is received is an input",
        ),
        (without(GOOD, "1SEND_B1"), "1SEND_B1 is missing, so what is at its other end would wait for ever"),
        (without(GOOD, "2RECV_F1<0"), "comes before 2RECV_F1<0, but what is received is an input"),
        (replace(GOOD, edges=((0, 1), (1, 2))), "uses an edge that needs no communication or does not exist"),
        (Schedule.parse(["0F0 0B0 1F0 1B0"]), "0B0 at pipeline rank 0 comes before 1B0, but its result is an input"),
        (Schedule.parse(["0F0 0F1 0B0 0B1", "1F1 1B1 1F0 1B0"]), None),
        (Schedule.parse(["0F0 0B0 0F1 0B1", "1F1 1B1 1F0 1B0"]), "which waits for 0F1"),
        (
            Schedule.parse(
                [
                    "0F0 0SEND_F0 0F1 0SEND_F1 0RECV_B0 0B0 0RECV_B1 0B1",
                    "1RECV_F1 1RECV_F0 1F0 1B0 1SEND_B0 1F1 1B1 1SEND_B1",
                ]
            ),
            "channel 0>1 carries 0SEND_F0 when 1RECV_F1 is due; a channel delivers in the order in which it sends",
        ),
        (
            Schedule.parse(["0F0 0SEND_F0 0SEND_F0 0RECV_B0 0B0", "1RECV_F0 1F0 1B0 1SEND_B0"]),
            "0SEND_F0 stands twice at pipeline rank 0; each action is done once: drop one",
        ),
    ],
)
def test_a_planted_fault_is_found(bad: Schedule, message: str | None) -> None:
    if message is None:
        check(bad)
        return
    with pytest.raises(PlanError) as caught:
        check(bad)
    assert message in str(caught.value)


def test_queues_that_are_shared_deadlock_where_they_do_on_nccl() -> None:
    """What torch's defer_pp_recv gives for 1F1B of two stages hangs when both directions share a communicator."""
    deferred = Schedule.parse(
        [
            "0F0 0SEND_F0 0F1 0SEND_F1 0RECV_B0 0B0 0RECV_B1 0B1",
            "1RECV_F0 1F0 1B0 1SEND_B0 1RECV_F1 1F1 1B1 1SEND_B1",
        ]
    )
    check(deferred)
    for queues in (Queues.PER_PAIR, Queues.PER_PIPELINE_RANK):
        with pytest.raises(PlanError, match=r"1SEND_B0/0RECV_B0, which waits for .*take a queue per directed edge"):
            check(deferred, queues)


def test_compute_that_waits_for_each_hop_can_run_only_with_fused_ones() -> None:
    """Sends and receives that stand together are posted together; receives that come earlier wait for each other."""
    for schedule in (gpipe(3, 5), one_f_one_b(3, 5)):
        check(with_communication(schedule, receives_ahead=0), Queues.BLOCKING)
        with pytest.raises(PlanError, match="queues none, compute waiting for all"):
            check(with_communication(schedule, receives_ahead=1), Queues.BLOCKING)


def test_a_shared_queue_per_position_is_stricter_than_one_per_pair() -> None:
    crossed = Schedule.parse(
        [
            "0F0 0SEND_F0 0SEND_F0>2 0RECV_B0 0RECV_B0<2 0B0",
            "1RECV_F0 1F0 1SEND_F0 1RECV_B0 1B0 1SEND_B0",
            "2RECV_F0 2RECV_F0<0 2F0 2B0 2SEND_B0 2SEND_B0>0",
        ],
        [(0, 1), (1, 2), (0, 2)],
    )
    check(crossed, Queues.PER_PIPELINE_RANK)
    late = moved(crossed, "2SEND_B0>0", "2SEND_B0")
    check(late, Queues.PER_PAIR)
    with pytest.raises(PlanError, match="queues one per pipeline rank"):
        check(late, Queues.PER_PIPELINE_RANK)


def test_the_ring_of_receives_is_as_small_as_it_can_be() -> None:
    """By definition: with that many buffers used in turn, none is posted before the one it replaces is free."""
    for schedule in (
        one_f_one_b(4, 9),
        eager_one_f_one_b(4, 9, split=True, weight_delay=2),
        zero_bubble(3, 8, depth=1),
    ):
        for ahead in (0, 1, 3):
            lowered = with_communication(schedule, receives_ahead=ahead)
            for channel in lowered.channels:
                size = receive_ring(lowered, channel)
                assert fits(lowered, channel, size)
                assert not fits(lowered, channel, size - 1)
    assert receive_ring(with_communication(gpipe(2, 5)), Channel(0, 1)) == 5


def fits(schedule: Schedule, channel: Channel, size: int) -> bool:
    buffers: list[int | None] = [None] * size
    turn = 0
    for action in schedule.lists[schedule.pipeline_rank_of(channel.receiver)]:
        if action.kind.is_receive and action.channel == channel:
            if size == 0 or buffers[turn % size] is not None:
                return False
            buffers[turn % size] = action.microbatch
            turn += 1
        elif action.kind in (Kind.BACKWARD, Kind.WEIGHT_GRADIENT) and action.stage == channel.receiver:
            buffers = [None if held == action.microbatch else held for held in buffers]
    return True
