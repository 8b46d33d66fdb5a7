"""Microbatches of one step with different rows, each against the whole batch in one process."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import nn

from tests.pipeline.chain import BATCH, CHAIN, MICROBATCHES, TIMEOUT_SECONDS, WIDTH, attempt, chain, data, linear
from tricomm import Mesh, Replicate, Shard, ShardingSpec
from tricomm.launch import Ranks
from tricomm.pipeline import (
    EdgeTensor,
    Executor,
    Schedule,
    eager_one_f_one_b,
    gpipe,
    interleaved_one_f_one_b,
    one_f_one_b,
    zero_bubble,
)

PAIR = CHAIN[:2]


def batch(rows: Sequence[int]) -> dict[str, tuple[torch.Tensor, ...]]:
    """Microbatches with these rows."""
    return {name: torch.cat(values)[: sum(rows)].split(list(rows)) for name, values in data().items()}


def whole(given: dict[str, Sequence[torch.Tensor]], count: int = 4) -> tuple[torch.Tensor, nn.Sequential]:
    """The mean over all rows in one process, and the net with its gradients."""
    net = nn.Sequential(*(linear(index) for index in range(count)))
    loss = nn.functional.mse_loss(net(torch.cat(tuple(given["data"]))), torch.cat(tuple(given["target"])))
    loss.backward()
    return loss.detach(), net


def require_whole(stages, given, *losses: torch.Tensor | None) -> None:
    """The losses and gradients of this rank are those of the whole batch; zeroes the gradients."""
    loss, net = whole(given, len(stages))
    for one in losses:
        if one is not None:
            torch.testing.assert_close(one, loss)
    for stage, layer in zip(stages, net, strict=True):
        if stage.module is not None:
            for found, wanted in zip(stage.module.parameters(), layer.parameters(), strict=True):
                torch.testing.assert_close(found.grad, wanted.grad, rtol=1e-12, atol=1e-14)
            stage.module.zero_grad()


# ---- sizes without a name: the rows of the data tell

FIXED = ((3, 3, 3, 1), (3, 3, 3, 3), (3, 3, 3, 1), (1, 3, 2, 3))


def with_rows(edges, rows: int) -> None:
    """Declare so many rows for what crosses."""
    for tensors in edges.values():
        for name, one in tensors.items():
            shape = (rows, WIDTH)
            tensors[name] = EdgeTensor(replace(one.source, shape=shape), replace(one.destination, shape=shape))


def split_as_it_comes(rank: int, schedule: Schedule) -> None:
    """Steps and evaluations whose microbatches have the declared rows, or fewer, on ranks that are all given all."""
    meshes = CHAIN if schedule.pipeline_ranks == 4 else PAIR * (schedule.stages // 2)
    stages, edges = chain(rank, meshes=meshes)
    with_rows(edges, 3)
    with Executor(schedule, stages, edges, timeout_seconds=TIMEOUT_SECONDS) as executor:
        for rows in FIXED:
            given = batch(rows)
            before = executor.evaluate(given).loss
            require_whole(stages, given, executor.step(given), before)


@pytest.mark.parametrize(
    "schedule",
    [
        gpipe(4, MICROBATCHES),
        one_f_one_b(4, MICROBATCHES),
        eager_one_f_one_b(4, MICROBATCHES, depth=1, split=True),
        zero_bubble(4, MICROBATCHES),
        interleaved_one_f_one_b(2, MICROBATCHES),
    ],
    ids=["gpipe", "1F1B", "eager", "zero bubble", "interleaved"],
)
def test_a_batch_that_does_not_divide_trains_as_a_whole(ranks: Ranks, schedule: Schedule) -> None:
    """10 rows as 3, 3, 3 and 1 over edges that are declared for 3: the gradient of the mean over all rows."""
    ranks.run(split_as_it_comes, schedule)


HALVES = Mesh([0, 1], ("dp",))


def cut_rows(rank: int):
    """The first stage has half of the rows on each of its ranks."""
    stages, edges = chain(rank, meshes=(HALVES, Mesh([2], ("x",))))
    ends = ShardingSpec(HALVES, (Shard(0),), (6, WIDTH), "float64"), ShardingSpec(Mesh([2], ("x",)), (Replicate(),))
    edges[0, 1]["x1"] = EdgeTensor(*ends)
    given = batch((6, 6, 6, 2))
    halves = dict(given)
    if rank in HALVES:
        halves["data"] = tuple(one.chunk(2)[rank] for one in given["data"])
    with Executor(one_f_one_b(2, 4), stages, edges, timeout_seconds=TIMEOUT_SECONDS) as executor:
        loss = executor.step(halves)
    wanted, net = whole(given, 2)
    if rank == 2:
        torch.testing.assert_close(loss, wanted)
    if rank in HALVES:
        mine = [parameter.grad for parameter in stages[0].module.parameters()]
        return mine, [parameter.grad for parameter in net[0].parameters()]
    return None


def test_rows_that_are_cut_over_ranks_follow_too(ranks: Ranks) -> None:
    first, second, *_ = ranks.run(cut_rows)
    for one, other, wanted in zip(first[0], second[0], first[1], strict=True):
        torch.testing.assert_close(one + other, wanted, rtol=1e-12, atol=1e-14)


def refused(rank: int, how: str) -> tuple[str, str]:
    """A step with rows that do not fit each other, then one with rows that do."""
    stages, edges = chain(rank, meshes=PAIR)
    with_rows(edges, 3)
    given = batch((3, 3, 3, 1))
    if how == "inputs":
        given["target"] = batch((3, 3, 1, 3))["target"]
    elif how == "one input":
        given["target"] = batch((3, 3, 3, 3))["target"]
    elif how == "ranks" and rank == 1:
        given = batch((3, 3, 1, 3))
    elif how == "blind" and rank == 1:
        given = batch((3, 3, 3, 3))
    elif how == "cut":
        cut = ShardingSpec(PAIR[0], (Shard(0, segments=[2, 1]),), (3, WIDTH), "float64")
        edges[0, 1]["x1"] = replace(edges[0, 1]["x1"], source=cut)
    with Executor(one_f_one_b(2, 4), stages, edges, timeout_seconds=3.0) as executor:
        outcome = attempt(lambda: executor.step(given))
        if rank < 2:
            assert all(one.grad is None for stage in stages if stage.module for one in stage.module.parameters())
        again = batch((3, 3, 3, 3) if how == "cut" else (3, 2, 3, 3))
        executor.step(again)
        require_whole(stages, again)
    return outcome


@pytest.mark.parametrize(
    ("how", "texts"),
    [
        ("inputs", ["input 'data' have [3, 3, 3, 1] rows and those of 'target' have [3, 3, 1, 3]"] * 2),
        ("one input", ["input 'data' have [3, 3, 3, 1] rows and those of 'target' have [3, 3, 3, 3]"] * 2),
        ("ranks", ["3, 3, 3, 1", "3, 3, 1, 3"]),
        ("blind", ["have 3, 3, 3, 1 rows"] * 2),
        ("cut", ["has [3, 3, 3, 1] rows in its microbatches, and edge 0-1 carries [3, 3, 3, 3] rows in them"] * 2),
    ],
)
def test_rows_that_do_not_fit_are_refused_before_anything_is_computed(ranks: Ranks, how: str, texts) -> None:
    for (kind, text), wanted in zip(ranks.run(refused, how)[:2], texts, strict=True):
        assert kind in ("SpecError", "TransportError")
        assert wanted in text


def other_rows_later(rank: int) -> tuple[str, str]:
    """All know the rows by now, and one rank is given others."""
    stages, edges = chain(rank, meshes=PAIR)
    with_rows(edges, 3)
    with Executor(gpipe(2, 4), stages, edges, timeout_seconds=3.0) as executor:
        for rows in ((3, 3, 3, 1), (3, 3, 1, 3), (3, 3, 3, 3)):
            executor.step(batch(rows))
        for stage in stages:
            if stage.module is not None:
                stage.module.zero_grad()
        outcome = attempt(lambda: executor.step(batch((3, 3, 3, 1) if rank == 0 else (3, 3, 1, 3))))
        for stage in stages:
            if stage.module is not None:
                assert all(one.grad is None for one in stage.module.parameters())
        executor.step(batch((3, 3, 3, 1)))
        require_whole(stages, batch((3, 3, 3, 1)))
    return outcome


def test_rows_that_differ_between_ranks_never_train(ranks: Ranks) -> None:
    """A message of one size is never taken for one of another."""
    for kind, _ in ranks.run(other_rows_later)[:2]:
        assert kind == "TransportError"


# ---- sizes with a name

ROWS = ((3, 3, 3, 1), (2, 2, 2, 2), (1, 4, 2, 3), (3, 3, 3, 1))


def unequal(rank: int, schedule: Schedule) -> None:
    stages, edges = chain(rank)
    for (source, destination), tensors in edges.items():
        ends = [ShardingSpec(CHAIN[stage], (Replicate(),), None, "float64") for stage in (source, destination)]
        tensors[f"x{destination}"] = EdgeTensor(*ends, shape=("rows", WIDTH))
    with Executor(schedule, stages, edges, timeout_seconds=TIMEOUT_SECONDS) as executor:
        for rows in ROWS:
            total = sum(rows)
            given = {name: torch.cat(values)[:total].split(rows) for name, values in data().items()}
            weights = [one / total for one in rows]
            sizes = {"rows": rows} if rank == 0 else None
            for stage in stages:
                if stage.module is not None:
                    stage.module.zero_grad()
            loss = executor.step(given, sizes=sizes, loss_weights=weights)
            again = executor.evaluate(given, sizes=sizes, loss_weights=weights).loss
            net = nn.Sequential(*(linear(index) for index in range(4)))
            whole = nn.functional.mse_loss(net(torch.cat(given["data"])), torch.cat(given["target"]))
            whole.backward()
            if loss is not None:
                torch.testing.assert_close(loss, whole.detach())
                torch.testing.assert_close(again, loss)
            for stage, layer in zip(stages, net, strict=True):
                if stage.module is not None:
                    for found, wanted in zip(stage.module.parameters(), layer.parameters(), strict=True):
                        torch.testing.assert_close(found.grad, wanted.grad, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("depth", [0, 2])
def test_rows_may_differ_from_microbatch_to_microbatch(ranks: Ranks, depth: int) -> None:
    """10 rows as 3, 3, 3 and 1: the gradient of the mean over all rows, also where a ring of buffers is reused."""
    ranks.run(unequal, eager_one_f_one_b(4, MICROBATCHES, depth=depth, split=True))


def wrong_sizes(rank: int) -> tuple[str, str]:
    stages, edges = chain(rank, meshes=CHAIN[:2])
    ends = [ShardingSpec(mesh, (Replicate(),), None, "float64") for mesh in CHAIN[:2]]
    edges[0, 1]["x1"] = EdgeTensor(*ends, shape=("rows", WIDTH))
    with Executor(gpipe(2, MICROBATCHES), stages, edges, timeout_seconds=TIMEOUT_SECONDS) as executor:
        return attempt(lambda: executor.step(data(), sizes={"rows": (BATCH, BATCH)}))


def test_sizes_are_one_for_all_microbatches_or_one_for_each(ranks: Ranks) -> None:
    for kind, text in ranks.run(wrong_sizes)[:2]:
        assert kind in ("SpecError", "TransportError")
        assert "gives 'rows' the sizes [6, 6], and a step has 4 microbatches; give one whole number for all" in text


def one_number(rank: int) -> None:
    """One size for all microbatches is that of a whole one; the others follow the rows of the data."""
    stages, edges = chain(rank)
    for (source, destination), tensors in edges.items():
        ends = [ShardingSpec(CHAIN[stage], (Replicate(),), None, "float64") for stage in (source, destination)]
        tensors[f"x{destination}"] = EdgeTensor(*ends, shape=("rows", WIDTH))
    with Executor(one_f_one_b(4, MICROBATCHES), stages, edges, timeout_seconds=TIMEOUT_SECONDS) as executor:
        for rows in FIXED:
            given = batch(rows)
            own = {name: given[name] for stage in stages if stage.module for name in stage.inputs if name in given}
            before = executor.evaluate(own, sizes={"rows": 3}).loss
            require_whole(stages, given, executor.step(own, sizes={"rows": 3}), before)


def test_one_size_for_all_microbatches_follows_the_rows(ranks: Ranks) -> None:
    ranks.run(one_number)


def against_the_data(rank: int) -> tuple[str, str]:
    stages, edges = chain(rank, meshes=PAIR)
    ends = [ShardingSpec(mesh, (Replicate(),), None, "float64") for mesh in PAIR]
    edges[0, 1]["x1"] = EdgeTensor(*ends, shape=("rows", WIDTH))
    with Executor(gpipe(2, MICROBATCHES), stages, edges, timeout_seconds=TIMEOUT_SECONDS) as executor:
        outcome = attempt(lambda: executor.step(batch((3, 3, 3, 1)), sizes={"rows": (3, 3, 3, 3)}))
    assert all(one.grad is None for stage in stages if stage.module for one in stage.module.parameters())
    return outcome


def test_sizes_that_are_given_for_each_microbatch_must_be_those_of_the_data(ranks: Ranks) -> None:
    for kind, text in ranks.run(against_the_data)[:2]:
        assert kind in ("SpecError", "TransportError")
        assert "has [3, 3, 3, 1] rows in its microbatches, and edge 0-1 carries [3, 3, 3, 3] rows in them" in text
