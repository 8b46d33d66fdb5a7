"""The picture of a plan: valid, with every hop at both its ends at its simulated times; limits are said in words."""

import xml.etree.ElementTree as ET
from collections import Counter, defaultdict
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings

from tests.cases import Case, cases
from tricomm import Broadcast, Mesh, Partial, Plan, PlanError, SendRecv, Shard, ShardingSpec, Topology, cli, make_plan
from tricomm.draw import plan_svg
from tricomm.draw.plan import LEFT, MAX_ARROWS, MAX_RANKS, RIGHT
from tricomm.draw.timed_hops import timed_hops
from tricomm.plan.cost import hop_times

quick = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
SVG = {"svg": "http://www.w3.org/2000/svg"}
WIDTH = 1000


def words_of(picture: ET.Element) -> list[str]:
    return [text.text or "" for text in picture.iterfind(".//svg:text", SVG)]


def bars_of(picture: ET.Element) -> list[ET.Element]:
    """Those that stand for hops: they say what they are."""
    return [box for box in picture.iterfind(".//svg:rect", SVG) if box.find("svg:title", SVG) is not None]


def broadcast(chunk_bytes: int, **topology: float) -> Plan:
    """One rank to two hosts of two."""
    source = ShardingSpec.from_dims(Mesh([0], ("x",)), ["R"], (1000,), "float32")
    destination = ShardingSpec.from_dims(Mesh([[1, 2], [3, 4]], ("host", "device")), ["R"])
    hosts = Topology(("s", "a", "a", "b", "b"), **{"nic_bytes_per_second": 1e6, "latency_seconds": 0.0, **topology})
    return make_plan(source, destination, topology=hosts, strategy=Broadcast(chunk_bytes))


@quick
@given(case=cases())
def test_every_hop_is_drawn_at_both_ends_inside_of_the_picture(case: Case) -> None:
    plan = make_plan(case.source, case.destination, **case.plan_arguments())
    picture = ET.fromstring(plan_svg(plan, title="a <b> & c", width=WIDTH))
    assert "a <b> & c" in words_of(picture)
    hops, _ = timed_hops(plan, plan.topology)
    assert len(hops) == sum(len(move.hops) for move in plan.moves)
    tips = Counter(title.text for title in picture.iterfind(".//svg:rect/svg:title", SVG))
    assert tips == Counter(hop.tip for hop in hops for _ in range(2))
    for bar in bars_of(picture):
        left, right = float(bar.attrib["x"]), float(bar.attrib["x"]) + float(bar.attrib["width"])
        assert left >= LEFT
        assert right <= WIDTH - RIGHT + 2  # a bar has a width that can be seen
        assert 0 <= float(bar.attrib["y"]) <= float(picture.attrib["height"])
    for rank in plan.participants:
        assert f"rank {rank}" in words_of(picture)


@quick
@given(case=cases())
def test_times_are_those_of_the_simulation(case: Case) -> None:
    plan = make_plan(case.source, case.destination, **case.plan_arguments())
    topology, total = plan.topology, 0.0
    for move in plan.moves:
        times = hop_times(move, topology)
        total += max(times.arrival, default=0.0)
        arrivals = {
            (hop.message, hop.chunk, hop.destination): at for hop, at in zip(move.hops, times.arrival, strict=True)
        }
        busy: dict[tuple[str, int], list[tuple[float, float]]] = defaultdict(list)
        for hop, *at in zip(move.hops, *times, strict=True):
            posted, out_begin, out_end, into_begin, into_end, arrival = at
            assert posted - 1e-12 <= min(out_begin, into_begin)
            assert max(out_end, into_end) + topology.latency_seconds <= arrival + 1e-12
            if hop.source != move.messages[hop.message].chain[0]:
                assert arrivals[hop.message, hop.chunk, hop.source] + topology.overhead_seconds <= posted + 1e-12
            if topology.host(hop.source) != topology.host(hop.destination):
                busy["out", topology.nic(hop.source)].append((out_begin, out_end))
                busy["into", topology.nic(hop.destination)].append((into_begin, into_end))
        for spans in busy.values():
            spans.sort()
            assert all(before[1] <= after[0] + 1e-12 for before, after in pairwise(spans))
    assert total == plan.simulated_seconds()


def test_a_bar_is_where_the_hand_puts_it() -> None:
    """4000 bytes at 1 MB/s in two chunks, without overhead: 2 ms each, and the picture ends 1 % behind 4 ms."""
    source = ShardingSpec.from_dims(Mesh([0], ("x",)), ["R"], (1000,), "float32")
    destination = ShardingSpec.from_dims(Mesh([1], ("y",)), ["R"])
    topology = Topology(("a", "b"), 1e6, latency_seconds=0.0, overhead_seconds=0.0)
    plan = make_plan(source, destination, topology=topology, strategy=SendRecv(2000))
    picture = ET.fromstring(plan_svg(plan, width=WIDTH))
    half = (WIDTH - LEFT - RIGHT) / 1.01 / 2
    places = [(float(bar.attrib["x"]), float(bar.attrib["width"])) for bar in bars_of(picture)]
    assert places == [pytest.approx((LEFT + half * chunk, half), abs=0.02) for chunk in (0, 0, 1, 1)]
    assert {"to 1: chunk 0", "from 0: chunk 1", "a", "b", "rank 0", "rank 1"} <= set(words_of(picture))


def test_chunks_of_a_chain_get_paler_and_have_arrows() -> None:
    plan = broadcast(500)
    hops = plan.moves[0].hops
    assert len(hops) == 4 * 8
    text = plan_svg(plan)
    assert text.count("marker-end=") == len(hops)
    opacities = [float(bar.attrib.get("fill-opacity", 1)) for bar in bars_of(ET.fromstring(text))]
    assert len(set(opacities)) == 8
    assert any("numbered" in words for words in words_of(ET.fromstring(text)))
    many = plan_svg(broadcast(4))
    assert "marker-end=" not in many
    assert f"Arrows are left out of pictures of more than {MAX_ARROWS} hops" in many


def test_of_many_ranks_the_first_are_drawn_and_the_picture_says_so() -> None:
    mesh = Mesh(range(100), ("x",))
    plan = make_plan(ShardingSpec(mesh, (Shard(0),), (100, 100), "float32"), ShardingSpec(mesh, (Shard(1),)))
    text = plan_svg(plan)
    picture = ET.fromstring(text)
    assert len([words for words in words_of(picture) if words.startswith("rank ")]) == MAX_RANKS
    assert f"{MAX_RANKS} of 100 ranks are drawn" in text
    assert "are joined to one bar" in text
    assert len(bars_of(picture)) < len(plan.moves[0].hops)
    assert any("hops" in (bar.findtext("svg:title", "", SVG)) for bar in bars_of(picture))


def test_two_moves_follow_each_other() -> None:
    source = ShardingSpec(Mesh([0, 1], ("x",)), (Partial(),), (64, 64), "float32")
    plan = make_plan(source, ShardingSpec(Mesh([2, 3], ("y",)), (Shard(0),)))
    hops, begins = timed_hops(plan, plan.topology)
    first, second = (len(move.hops) for move in plan.moves)
    assert begins == [0.0, max(hop.arrival for hop in hops[:first])]
    assert len(hops) == first + second
    assert min(hop.posting[0] for hop in hops[first:]) == pytest.approx(begins[1])
    assert "the contributions are where their sum is taken" in plan_svg(plan)


def test_what_does_not_travel_and_what_one_rank_knows() -> None:
    spec = ShardingSpec(Mesh([0, 1], ("x",)), (Shard(0),), (8,), "float32")
    assert "Nothing travels between ranks." in plan_svg(make_plan(spec, spec))
    alone = make_plan(spec, ShardingSpec(Mesh([2], ("y",)), (Shard(0),)), rank=2)
    with pytest.raises(PlanError, match="call make_plan without rank"):
        plan_svg(alone)


def test_the_command_writes_the_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "plan.svg"
    words = ["plan", "--shape", "8,4", "--source", "2", "S0 R", "--destination", "2", "R S0", "--devices", "2"]
    cli.main([*words, "--svg", str(path)])
    assert capsys.readouterr().out.startswith("reshard\n")
    assert {"host0", "host1"} <= set(words_of(ET.fromstring(path.read_text())))


def test_nothing_arrives_before_it_has_left() -> None:
    """The README's own command. Links that are free long before are simulated by themselves."""
    source = ShardingSpec.from_dims(Mesh([[0, 1], [2, 3]], ("dp", "tp")), ["S1", "R"], (4096, 1024), "float32")
    destination = ShardingSpec.from_dims(Mesh([4, 5, 6, 7], ("tp",)), ["R", "S0"])
    picture = ET.fromstring(plan_svg(make_plan(source, destination)))
    arrows = [one.attrib for one in picture.iter() if "marker-end" in one.attrib]
    assert arrows
    assert all(float(one["x1"]) <= float(one["x2"]) for one in arrows)


@quick
@given(case=cases())
def test_no_two_hops_are_drawn_to_enter_at_once(case: Case) -> None:
    """Chunks of a round share a link, and all arrive when it has carried all of them; each is drawn by itself."""
    plan = make_plan(case.source, case.destination, **case.plan_arguments())
    topology = plan.topology
    entering: dict[tuple[int, bool, int], list[tuple[float, float]]] = defaultdict(list)
    hops = iter(timed_hops(plan, topology)[0])
    for number, move in enumerate(plan.moves):
        for _, hop in zip(move.hops, hops, strict=False):
            assert hop.into[1] + topology.latency_seconds <= hop.arrival + 1e-12
            at = hop.destination if hop.is_local else topology.nic(hop.destination)
            entering[number, hop.is_local, at].append(hop.into)
    for spans in entering.values():
        assert all(before[1] <= after[0] + 1e-12 for before, after in pairwise(sorted(spans)))
