"""The tuner against proven optima and its own words; the solver's set-up; pictures of timelines."""

import contextlib
import io
import json
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest

from bench.pipeline import solver
from bench.pipeline.solver import _tick, solve
from tricomm import PlanError
from tricomm.cli import main
from tricomm.draw import timeline_perfetto, timeline_svg
from tricomm.pipeline import (
    Channel,
    Costs,
    Kind,
    Limits,
    StageCost,
    TransferCost,
    Workload,
    check,
    eager_one_f_one_b,
    interleaved_one_f_one_b,
    one_f_one_b,
    simulate,
    tune,
    with_communication,
    write_csv,
)
from tricomm.pipeline.costs.exposure import exposure_of
from tricomm.pipeline.tune.greedy import PREFERENCES, list_schedule

# Least makespans for F = I = W = 1, proven by CP-SAT in ortools 9.15 (python -m bench.pipeline.exact): stages,
# microbatches, most activations, and the optimum for a hop of each of these.
HOPS = (0, 0.5, 1, 2)
PROVEN = {
    (4, 8, 4): (27, 33, 39, 51),
    (4, 8, 7): (27, 28.5, 30, 42),
    (4, 16, 4): (51, 57, 71, 93),
    (4, 16, 7): (51, 52.5, 54, 66),
    (8, 16, 8): (55, 69, 83, 111),
    (8, 16, 15): (55, 58.5, 62, 90),
}


@pytest.mark.parametrize(("stages", "microbatches", "activations"), [(4, 8, 4), (4, 8, 7), (4, 16, 7)])
def test_tuned_schedules_are_as_good_as_proven_optima(stages: int, microbatches: int, activations: int) -> None:
    """Within 2 % of the shortest schedule that exists, though receives are posted just a few actions ahead.

    The benchmark goes through the whole table.
    """
    for hop, optimum in zip(HOPS, PROVEN[stages, microbatches, activations], strict=True):
        costs = Costs.uniform(stages, 1, 1, 1, hop)
        tuned = tune(lambda _, costs=costs: costs, [microbatches], limits=Limits(activations=activations))  # type: ignore[misc]
        assert optimum <= tuned.best.makespan_seconds <= 1.02 * optimum
        assert max(peak.activations for peak in tuned.timeline.peaks()) <= activations
        assert tuned.timeline.makespan_seconds == tuned.best.makespan_seconds
        check(tuned.best.schedule)


@pytest.mark.parametrize("hop", [1, 2])
def test_list_schedules_find_what_alternation_cannot(hop: int) -> None:
    """With room for S activations only, bursts beat 1F1B by 6 % and 14 % of S = 8."""
    costs = Costs.uniform(8, 1, 1, 1, hop)
    best = min(simulate(list_schedule(costs, 16, [8] * 8, one), costs).makespan_seconds for one in PREFERENCES)
    assert best == PROVEN[8, 16, 8][HOPS.index(hop)]
    assert simulate(one_f_one_b(8, 16, split=True), costs).makespan_seconds > 1.06 * best


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("memory", [[1, 1, 1], [3, 2, 1], [5, 5, 5]])
def test_list_schedules_keep_to_their_limit(memory: list[int], split: bool) -> None:
    costs = Costs(
        (StageCost(1, 2, 0.5), StageCost(2, 1, 1), StageCost(0.5, 0, 3)),
        {Channel(0, 1): TransferCost(0.5, 0.25), Channel(2, 0): TransferCost(2.0)},
    )
    for preference in PREFERENCES:
        schedule = list_schedule(costs, 7, memory, preference, split=split, edges=[(0, 1), (1, 2), (0, 2)])
        check(with_communication(schedule))
        assert schedule.microbatches == 7
        assert schedule.is_split == split
        peaks = simulate(schedule, costs).peaks()
        assert all(peak.activations <= limit for peak, limit in zip(peaks, memory, strict=True))


def test_moves_of_single_actions_shorten_what_no_regular_schedule_fits() -> None:
    """Uneven stages and room for two activations: 29 by any regular schedule, 28 proven by CP-SAT."""
    costs = Costs((StageCost(1, 2, 2), StageCost(2, 2, 2)), {Channel(0, 1): TransferCost(2.0, 0.5)})
    limits = Limits(activations=2)
    assert tune(lambda _: costs, [4], limits=limits).best.makespan_seconds == 29
    tuned = tune(lambda _: costs, [4], limits=limits, trials=100)
    assert tuned.best.makespan_seconds == 28
    assert tuned.best.activations <= 2
    check(tuned.best.schedule)


def test_fewer_bytes_than_memory_are_asked_for() -> None:
    costs = Costs((StageCost(1, 1, 1, 100),) * 4, (), TransferCost(1.0, nbytes=10))
    free = tune(lambda _: costs, [8])
    tight = tune(lambda _: costs, [8], limits=Limits(nbytes=500))
    assert tight.best.makespan_seconds > free.best.makespan_seconds
    assert tight.best.nbytes <= 500 < free.best.nbytes
    assert max(peak.nbytes for peak in tight.timeline.peaks()) == tight.best.nbytes
    assert "does not fit: " in str(tight)
    with pytest.raises(PlanError, match=r"no schedule fits Limits\(activations=None, nbytes=99\): the least that one"):
        tune(lambda _: costs, [8], limits=Limits(nbytes=99))
    with pytest.raises(PlanError, match="microbatches is empty"):
        tune(lambda _: costs, [])


def test_the_number_of_microbatches_balances_fill_against_overhead_and_latency() -> None:
    """Without overhead more are better; each message's latency and each action's overhead set an end to that."""
    stages = (StageCost(16, 16, 16),) * 3
    channels = [Channel(*pair) for stage in range(2) for pair in ((stage, stage + 1), (stage + 1, stage))]
    choices = [2, 4, 8]

    def chosen(latency: float, overhead: float) -> int:
        hops = dict.fromkeys(channels, TransferCost(8.0, latency))
        return tune(Workload(stages, hops, overhead).costs, choices, limits=Limits(activations=4)).best.microbatches

    assert chosen(0.0, 0.0) == 8
    assert chosen(0.0, 2.0) == 4
    assert chosen(6.0, 0.0) == 4


def test_a_workload_is_the_batch_whatever_it_is_split_into() -> None:
    workload = Workload((StageCost(8, 4, 2, 100),), {Channel(0, 1): TransferCost(4.0, 0.5, 30)}, 0.25)
    costs = workload.costs(4)
    assert costs.stages == (StageCost(2.25, 1.25, 0.75, 25),)
    assert costs.transfer(Channel(0, 1)) == TransferCost(1.0, 0.5, 8)
    again = Workload.measured(costs, 4, (Channel(0, 1),))
    assert again.costs(4) == costs
    with pytest.raises(PlanError, match="overhead_seconds=-1 must be a finite number from 0"):
        Workload(workload.stages, {}, -1)
    with pytest.raises(PlanError, match="microbatches=0 must be at least 1"):
        workload.costs(0)


def verdict_of(costs: Costs, microbatches: int = 12, limits: Limits = Limits(), **options: Any) -> dict[str, str]:  # noqa: B008
    tuned = tune(lambda _: costs, [microbatches], limits=limits, **options)
    assert all(text in str(tuned) for text in ("chosen: ", *(one.reason for one in tuned.exposures)))
    return {str(one.channel): one.reason for one in tuned.exposures}


def test_what_stays_exposed_is_named_with_its_reason() -> None:
    assert set(verdict_of(Costs.uniform(2, 1, 1, 1, 1)).values()) == {""}
    slow = Costs.uniform(2, 1, 1, 1).with_transfers([Channel(0, 1)], TransferCost(5.0))
    found = verdict_of(slow)
    assert found["1>0"] == ""
    assert (
        "keeps its link for 5 s and the slowest stage computes 3 s a microbatch, so no schedule hides it"
        in found["0>1"]
    )
    shared = Costs.uniform(2, 1, 1, 1, TransferCost(2.5).sharing("a", "a"))
    full = "transfers of a microbatch keep a out for 5 s and the slowest stage computes 3 s, so the NIC sets the pace"
    assert any(full in reason for reason in verdict_of(shared).values())
    crowded = Costs.uniform(2, 1, 1, 1, TransferCost(1.25).sharing("a", "a"))
    together = simulate(with_communication(eager_one_f_one_b(2, 8, depth=1)), crowded)
    reasons = [exposure_of(channel, together, 1, False).reason for channel in together.schedule.channels]
    assert any(
        "it shares a NIC and takes" in reason and "instead of 1.25 s; use more NICs" in reason for reason in reasons
    )
    limited = verdict_of(Costs.uniform(4, 1, 1, 1, 2.5), limits=Limits(activations=4))
    assert any("wants a warm-up that the memory limit has no room for" in reason for reason in limited.values())
    far = Costs.uniform(3, 1, 1, 1, TransferCost(latency_seconds=9))
    assert any("a deeper warm-up was no faster" in reason for reason in verdict_of(far, 20).values())
    few = verdict_of(Costs.uniform(3, 1, 1, 1, 3), 6)
    assert "depth 2 hides 3.5 s of a hop in a steady state, and would hide 3 s, but 6 microbatches hardly" in few["0>1"]


def test_the_solver_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(solver, "find_spec", lambda name: None)
    with pytest.raises(
        PlanError, match=r"needs OR-tools, which is not installed; run pip install \"tricomm\[solver\]\""
    ):
        solve(Costs.uniform(2, 1, 1, 1), 2, memory=2)


def test_the_solver_counts_in_ticks_that_all_times_share() -> None:
    assert _tick(Costs.uniform(2, 1, 1, 1, 0.5)) == 0.5
    assert _tick(Costs.uniform(2, 0.3, 0.2, 0.7, 0.1)) == pytest.approx(0.1)
    assert _tick(Costs.uniform(2, 1, 1, 1, 2**0.5)) == pytest.approx(2**0.5 / 1024)


def test_a_picture_has_a_box_for_each_action_and_transfer() -> None:
    schedule = with_communication(eager_one_f_one_b(3, 4, split=True, edges=[(0, 1), (1, 2), (0, 2)]))
    timeline = simulate(schedule, Costs.uniform(3, 1, 1, 1, 0.5))
    picture = ET.fromstring(timeline_svg(timeline, title="a <b> & c"))
    namespace = {"svg": "http://www.w3.org/2000/svg"}
    tips = Counter(title.text for title in picture.iterfind(".//svg:title", namespace))
    actions = [str(action) for action in schedule.actions() if action.is_compute]
    transfers = [f"{one.channel} {one.microbatch}" for one in timeline.transfers]
    assert tips == Counter([*actions, *transfers])
    assert picture.find("svg:text", namespace).text == "a <b> & c"  # type: ignore[union-attr]
    right = int(picture.get("width", "0"))
    for box in picture.iterfind(".//svg:rect", namespace):
        assert 0 <= float(box.get("x", "0")) <= float(box.get("x", "0")) + float(box.get("width", "0")) <= right
    halved = timeline_svg(timeline, until_seconds=2 * timeline.makespan_seconds)
    width = re.compile(r'width="([\d.]+)" height="26" fill="#f4f4f4"')
    whole = width.findall(timeline_svg(timeline))[0]
    assert float(width.findall(halved)[0]) == pytest.approx(float(whole) / 2, abs=0.1)


def test_a_trace_shows_each_span_once_and_joins_both_ends() -> None:
    schedule = with_communication(interleaved_one_f_one_b(2, 4))
    timeline = simulate(schedule, Costs.uniform(4, 1, 1, 1, 0.5))
    events = json.loads(timeline_perfetto(timeline))["traceEvents"]
    computed = {(one["pid"], one["name"]): one for one in events if one.get("cat") == "compute"}
    for pipeline_rank, spans in enumerate(timeline.compute):
        for span in spans:
            event = computed[pipeline_rank, str(span.action)]
            assert (event["ts"], event["dur"]) == (span.begin * 1e6, (span.end - span.begin) * 1e6)
    assert len(computed) == sum(map(len, timeline.compute))
    starts = {one["id"]: one for one in events if one["ph"] == "s"}
    ends = {one["id"]: one for one in events if one["ph"] == "f"}
    assert len(starts) == len(timeline.transfers) == len(ends)
    for number, one in enumerate(timeline.transfers):
        assert starts[number]["pid"] == schedule.pipeline_rank_of(one.channel.sender)
        assert ends[number]["pid"] == schedule.pipeline_rank_of(one.channel.receiver)
    # Slices of one thread follow each other: Perfetto draws no others.
    tracks: dict[tuple[int, int], list[tuple[float, float]]] = {}
    for event in events:
        if event["ph"] == "X":
            tracks.setdefault((event["pid"], event["tid"]), []).append((event["ts"], event["ts"] + event["dur"]))
    for slices in tracks.values():
        slices.sort()
        assert all(first[1] <= second[0] + 1e-6 for first, second in pairwise(slices))
    counts = [one["args"]["held"] for one in events if one["ph"] == "C" and one["pid"] == 0]
    assert max(counts) == timeline.peaks()[0].activations
    assert counts[-1] == 0
    assert {action.kind for action in schedule.actions()} >= {Kind.FORWARD, Kind.BACKWARD}


def run_command(*words: str) -> str:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        main(["simulate", *words])
    return printed.getvalue()


def test_the_command_prints_a_grid_and_figures_and_writes_files(tmp_path: Path) -> None:
    svg, trace, table = (tmp_path / name for name in ("a.svg", "a.json", "a.csv"))
    words = ("--stages", "2", "--microbatches", "4", "--seconds", "1,1,1", "--hop", "0.5")
    text = run_command("--schedule", "1f1b", *words, "--svg", str(svg), "--perfetto", str(trace))
    assert text.startswith("0: 0F0 0F1 0B0 0F2 0B1 0F3 0B2 0B3\n1: 1F0 1B0 1F1 1B1 1F2 1B2 1F3 1B3\n\n17 s, bubble ")
    assert ET.fromstring(svg.read_text()).tag.endswith("svg")
    assert json.loads(trace.read_text())["traceEvents"]
    tuned = run_command(*words)
    assert tuned.startswith("chosen: ")
    table.write_text(write_csv(one_f_one_b(2, 4)))
    assert run_command("--schedule", str(table), *words[4:]) == text
    assert "hops in turn" in run_command("--stages", "4", "--hop", "1.5", "--one-nic")
    shared = run_command("--schedule", "1f1b", "--stages", "3", *words[2:], "--one-nic")
    assert float(shared.split("\n\n")[1].split()[0]) > 17
    for name in ("gpipe", "eager", "zero-bubble"):
        assert run_command("--schedule", name, *words).startswith("0: 0F0 0F1 ")


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--seconds", "1,x"], "--seconds '1,x' is not three numbers; write F, I and W as 1,1,1"),
        (["--seconds", "1,1"], "is not three numbers"),
        (["--schedule", "fast"], "--schedule 'fast' is no schedule and no file; write tuned, gpipe"),
        (["--stages", "0"], "stages=0 must be from 1"),
    ],
)
def test_a_wrong_command_says_why(words: list[str], why: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        run_command(*words)
    assert caught.value.code == 2
    assert why in capsys.readouterr().err


def test_one_stage_has_nothing_to_hide_and_is_tuned_all_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    main(["simulate", "--stages", "1", "--microbatches", "4"])
    assert "chosen" in capsys.readouterr().out
