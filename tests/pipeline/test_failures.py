"""Pipelines that fail: at once where somebody waits, in words that name who and why, and others work afterwards."""

import re
import time
from dataclasses import replace

import pytest
from torch import nn

from tests.pipeline.chain import (
    CHAIN,
    MICROBATCHES,
    TIMEOUT_SECONDS,
    WIDTH,
    Faulty,
    attempt,
    chain,
    data,
    layout,
    linear,
    require_trained,
)
from tricomm.launch import Ranks
from tricomm.pipeline import eager_one_f_one_b, gpipe, one_f_one_b
from tricomm.pipeline.run.edges.tensor import EdgeTensor
from tricomm.pipeline.run.executor import Executor
from tricomm.transport.coordination.attendance import CallEpoch, Note, find_mismatch


def stage_that_raises(rank: int, victim: int, in_backward: bool, split: bool) -> tuple[str, str, float]:
    def make(index: int) -> nn.Module:
        return Faulty(linear(1), in_backward) if index == victim else linear(index)

    stages, edges = chain(rank, make)
    schedule = eager_one_f_one_b(4, MICROBATCHES, depth=1, split=split)
    executor = Executor(schedule, stages, edges, timeout_seconds=TIMEOUT_SECONDS)
    began = time.monotonic()
    kind, text = attempt(lambda: executor.step(data()))
    seconds = time.monotonic() - began
    require_trained(rank)
    return kind, text, seconds


@pytest.mark.parametrize(
    ("victim", "in_backward", "split", "action"),
    [
        (0, False, False, "0F2"),
        (2, False, True, "2F2"),
        (0, True, False, "0B2"),
        (2, True, False, "2B2"),
        (0, True, True, "0W2"),  # a first stage has no input to give a gradient to
        (2, True, True, "2I1"),  # the hook runs in 2W0 too, as its tensor leads to a parameter
    ],
)
def test_a_stage_that_raises_is_named_by_all_others(ranks: Ranks, victim, in_backward, split, action) -> None:
    """At once by those that wait for it. Those that were done hear of it in their next call: see test_trust."""
    outcomes = ranks.run(stage_that_raises, victim, in_backward, split)
    blame = f"rank {victim} failed in {action}: RuntimeError: out of paper"
    for rank, (kind, text, seconds) in enumerate(outcomes[:4]):
        if rank == victim:
            assert (kind, text) == ("RuntimeError", "out of paper")
        elif kind == "returned":
            assert in_backward
            assert rank > victim
        else:
            assert kind == "TransportError"
            assert text == blame
        assert seconds < TIMEOUT_SECONDS / 2
    assert [kind for kind, *_ in outcomes[4:]] == ["returned"] * 4


def bad_data(rank: int) -> tuple[str, str]:
    stages, edges = chain(rank)
    executor = Executor(gpipe(4, MICROBATCHES), stages, edges, timeout_seconds=TIMEOUT_SECONDS)
    given = data()
    if rank == 3:
        given["target"].pop()
    outcome = attempt(lambda: executor.step(given))
    require_trained(rank)
    return outcome


def test_missing_data_are_an_error_everywhere_before_anything_is_sent(ranks: Ranks) -> None:
    outcomes = ranks.run(bad_data)
    text = "input 'target' of stage 3 has 3 elements (Tensor) in the step's data on rank 3, and the schedule has 4 "
    assert outcomes[3][0] == "SpecError"
    for kind, found in outcomes[:3]:
        assert kind == "TransportError"
        assert text in found


def different_schedules(rank: int) -> tuple[str, str]:
    stages, edges = chain(rank)
    schedule = gpipe(4, MICROBATCHES) if rank == 2 else one_f_one_b(4, MICROBATCHES)
    outcome = attempt(lambda: Executor(schedule, stages, edges, timeout_seconds=TIMEOUT_SECONDS))
    require_trained(rank)
    return outcome


def test_ranks_with_different_schedules_do_not_begin(ranks: Ranks) -> None:
    for kind, text in ranks.run(different_schedules)[:4]:
        assert kind == "TransportError"
        assert "rank 2 disagrees with rank 0 about the schedule" in text


def refused_by_one(rank: int) -> tuple[str, str]:
    stages, edges = chain(rank)
    if rank == 1:
        stages[1] = replace(stages[1], module=None)
    outcome = attempt(lambda: Executor(gpipe(4, MICROBATCHES), stages, edges, timeout_seconds=TIMEOUT_SECONDS))
    require_trained(rank)
    return outcome


def test_a_rank_that_cannot_make_its_executor_tells_the_others(ranks: Ranks) -> None:
    outcomes = ranks.run(refused_by_one)
    text = "stage 1 has no module on a rank of its mesh (x=1: rank 1); pass module=..."
    assert outcomes[1] == ("SpecError", text)
    for rank in (0, 2, 3):
        assert outcomes[rank] == ("TransportError", f"rank 1 refused the call: SpecError: {text}")


def wrong_output(rank: int) -> tuple[str, str]:
    """A tensor that is not what its edge declares: the stage that gives it gets the error."""
    stages, edges = chain(rank, lambda index: nn.Linear(WIDTH, WIDTH + (index == 1)).double())
    executor = Executor(gpipe(4, MICROBATCHES), stages, edges, timeout_seconds=TIMEOUT_SECONDS)
    outcome = attempt(lambda: executor.step(data()))
    require_trained(rank)
    return outcome


def test_an_output_of_another_shape_is_refused(ranks: Ranks) -> None:
    outcomes = ranks.run(wrong_output)
    assert outcomes[1][0] == "SpecError"
    assert (
        "edge pipeline 1-2 forward, microbatch 0: the tensor of rank 1 has shape (6, 5), and its spec gives it (6, 4)"
        in outcomes[1][1]
    )
    for rank in (0, 2, 3):
        assert outcomes[rank][0] == "TransportError"
        assert "the tensor of rank 1 has shape (6, 5)" in outcomes[rank][1]


def sizes_that_are_wrong(rank: int, how: str) -> tuple[str, str]:
    stages, edges = chain(rank)
    for (source, destination), tensors in edges.items():
        ends = [replace(layout(CHAIN[stage]), shape=None) for stage in (source, destination)]
        tensors[f"x{destination}"] = EdgeTensor(*ends, shape=("batch", WIDTH))
    executor = Executor(gpipe(4, MICROBATCHES), stages, edges, name=how, timeout_seconds=TIMEOUT_SECONDS)
    given = {"none": None, "other": {"length": 6}}[how]
    outcome = attempt(lambda: executor.step(data(), sizes=given))
    require_trained(rank)
    return outcome


@pytest.mark.parametrize(
    ("how", "text"),
    [
        ("none", "sizes=None on rank 0, where the edges have sizes named ('batch',); pass a number for each"),
        ("other", "sizes={'length': 6} on rank 0, where the edges have sizes named ('batch',)"),
    ],
)
def test_sizes_are_checked_by_their_text(ranks: Ranks, how: str, text: str) -> None:
    outcomes = ranks.run(sizes_that_are_wrong, how)
    for rank, (kind, found) in enumerate(outcomes[:4]):
        assert kind == ("TransportError" if rank else "SpecError")
        assert text in found


def unneeded_sizes(rank: int) -> tuple[str, str]:
    stages, edges = chain(rank)
    executor = Executor(gpipe(4, MICROBATCHES), stages, edges, timeout_seconds=TIMEOUT_SECONDS)
    return attempt(lambda: executor.step(data(), sizes={"batch": 6}))


def test_sizes_that_no_edge_names_are_refused(ranks: Ranks) -> None:
    for kind, text in ranks.run(unneeded_sizes)[:4]:
        assert kind in ("SpecError", "TransportError")
        assert "sizes={'batch': 6}, and no edge has a size with a name; leave them out" in text


def test_long_texts_that_differ_are_shown_where_they_do() -> None:
    def notes(text: str) -> Note:
        return Note(CallEpoch("ranks", 1), ((0, 2, 1),), "", "call 1 of x", text, fields={"the schedule": text})

    same, after = "0F0 0F1 " * 100, " 0B0" * 100
    found = find_mismatch({0: notes(f"{same}0B0{after}"), 1: notes(f"{same}0F2{after}"), 2: notes(same)}, [0, 1, 2])
    assert found is not None
    assert re.search(r"rank 0 says \.\.\. [^,]*0F1 0B0[^,]* \.\.\., rank 1 says \.\.\. [^,]*0F1 0F2", found[0])
    assert len(found[0]) < 600
    shorter = find_mismatch({0: notes(f"{same}0B0"), 2: notes(same)}, [0, 2])
    assert shorter is not None
    assert re.search(r"rank 0 says \.\.\. [^,]*0F1 0B0, rank 2 says \.\.\. [^,]*0F1 ;", shorter[0])


def last_stays_away(rank: int) -> tuple[str, str]:
    stages, edges = chain(rank)
    executor = Executor(one_f_one_b(4, MICROBATCHES), stages, edges, timeout_seconds=4.0)
    executor.step(data())
    outcome = ("", "") if rank == 3 else attempt(lambda: executor.step(data()))
    if rank == 3:
        time.sleep(5.0)
    executor.close()
    return outcome


def test_a_rank_that_stays_away_is_named_also_by_those_that_wait_for_others(ranks: Ranks) -> None:
    for kind, text in ranks.run(last_stays_away)[:3]:
        assert kind == "TransportError"
        assert "rank 3 gave no sign of life" in text


class Slow(nn.Module):
    """Computes for longer than the timeout, once."""

    def __init__(self, seed: int, call: int) -> None:
        super().__init__()
        self.layer, self.call, self.calls = linear(seed), call, 0

    def forward(self, x):
        self.calls += 1
        if self.calls == self.call:
            time.sleep(9.0)
        return self.layer(x)


def slow_compute(rank: int, victim: int) -> tuple[str, str]:
    """Its last forward of the second step; the receive of the first gradient has been posted by then."""
    stages, edges = chain(rank, lambda index: Slow(index, 2 * MICROBATCHES) if index == victim else linear(index))
    with Executor(gpipe(4, MICROBATCHES), stages, edges, timeout_seconds=5.0) as executor:
        executor.step(data())
        return attempt(lambda: executor.step(data()))


@pytest.mark.parametrize("victim", [0, 2])
def test_a_module_that_computes_past_the_timeout_is_named_and_nobody_else(ranks: Ranks, victim: int) -> None:
    """Also by itself: what it had posted meanwhile waited for ranks that waited for it."""
    for kind, text in ranks.run(slow_compute, victim)[:4]:
        assert kind == "TransportError"
        assert text.startswith(f"rank {victim} is alive but did not send or receive within the timeout"), text
        assert f"rank {victim} is in the computation of {victim}F3 of executor 'pipeline'" in text
