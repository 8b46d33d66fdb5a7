"""The emulated cluster of the benchmarks: what it would do, which needs neither root nor programs."""

import argparse
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from bench.cluster import network, shaping
from bench.cluster.calibrate import Sampler, payload_bytes_per_second, ring
from bench.cluster.cli import main, parse_hosts, parse_nic, parse_nics
from bench.cluster.cluster import Cluster
from bench.cluster.flows import Flow
from bench.cluster.network import ClusterError, Host, Nic
from bench.cluster.shaping import BUCKETS, NETWORK_HEADER, kernel_settings

ROOT = Path(__file__).resolve().parents[2]
FAST, SLOW = Nic.symmetric(400e6), Nic(200_000_000, 100_000_000)


def test_ranks_count_through_hosts_and_take_nics_in_turn() -> None:
    cluster = Cluster([Host(3, (FAST, SLOW)), Host(1, (SLOW,))])
    assert [(seat.host, seat.local_rank, seat.port.index) for seat in cluster.seats] == [
        (0, 0, 0),
        (0, 1, 1),
        (0, 2, 0),
        (1, 0, 0),
    ]
    assert cluster.host_names == ("host0", "host0", "host0", "host1")
    assert [cluster.rank_of(port) for port in cluster.ports] == [0, 1, 3]
    assert cluster.environment(cluster.seats[1]) == {
        "RANK": "1",
        "WORLD_SIZE": "4",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "3",
        "GROUP_RANK": "0",
        "MASTER_ADDR": "10.78.0.1",
        "MASTER_PORT": "29500",
        "GLOO_SOCKET_IFNAME": "nic0",
    }


def test_names_tell_the_owner_and_differ() -> None:
    names = [Cluster([Host(1, (FAST,))]).ports[0].namespace for _ in range(2)]
    assert names[0] != names[1]
    assert names[0].startswith(f"tricomm-{os.getpid()}-")
    assert names[0].endswith("-host0-nic0")


def test_an_owner_is_a_process_that_started_then() -> None:
    name = network.new_name()
    assert network.owner_lives(f"{name}-switch")
    pid, ticks = name.split("-")[1:3]
    assert not network.owner_lives(f"tricomm-{pid}-{int(ticks) + 1}-abcd-switch")
    assert network.owner_lives("tricomm-of-somebody-else"), "not a name of ours, so not ours to remove"


def test_a_nic_is_shaped_in_both_directions_and_small_packets_go_first() -> None:
    ports = network.ports_of("name", [Host(1, (SLOW,)), Host(1, (FAST,))])
    sends, receives = network.shaping_commands("name", ports[0], ports)
    assert (sends.program, sends.namespace) == ("tc", "name-host0-nic0")
    assert sends.lines[1:4] == (
        "class add dev nic0 parent 1: classid 1:1 htb rate 200000000bit ceil 200000000bit burst 50000 cburst 50000 "
        "quantum 1514",
        "class add dev nic0 parent 1:1 classid 1:10 htb rate 20000000bit ceil 200000000bit burst 50000 cburst 50000 "
        "quantum 1514 prio 0",
        "class add dev nic0 parent 1:1 classid 1:20 htb rate 175781bit ceil 200000000bit burst 50000 "
        "cburst 50000 quantum 1514 prio 1",
    )
    assert filters_of(sends)[0] == "1 u32 match u16 0x0000 0xffc0 at 2 flowid 1:10"
    assert receives.namespace == "name-switch"
    assert "dev d0n0 parent 1: classid 1:1 htb rate 100000000bit" in receives.lines[1]


def test_links_have_the_rate_each() -> None:
    ports = network.ports_of("name", [Host(2, (FAST, FAST), has_links=True), *[Host(1, (FAST,), has_links=True)] * 2])
    sends, receives = network.shaping_commands("name", ports[0], ports)
    peers = ("10.77.0.2", "10.77.0.3")  # not the host's own other NIC
    for batch, side in ((sends, "dst"), (receives, "src")):
        assert sum("htb rate 400000000bit" in line for line in batch.lines) == len(peers)
        assert [line for line in filters_of(batch) if line.startswith("1 ")] == [
            f"1 u32 match ip {side} {peers[0]}/32 match u16 0x0000 0xffc0 at 2 flowid 1:10",
            f"1 u32 match ip {side} {peers[1]}/32 match u16 0x0000 0xffc0 at 2 flowid 1:110",
        ]
        for peer, buckets in zip(peers, (range(0x20, 0xA0), range(0x120, 0x1A0)), strict=True):
            address = int.from_bytes(bytes(map(int, peer.split("."))), "big")
            found = [bucket_of(batch, address, side, 40000, port) for port in range(50000, 50256, 2)]
            assert sorted(found) == list(buckets)


def test_nics_do_not_take_over_how_the_machine_is_tuned() -> None:
    settings = kernel_settings()
    assert settings["net/ipv4/tcp_congestion_control"] == "reno"
    assert {"net/ipv4/tcp_rmem", "net/ipv4/tcp_wmem"} <= settings.keys()


def test_connections_that_were_made_one_after_the_other_have_buckets_of_their_own() -> None:
    ports = network.ports_of("name", [Host(1, (FAST,)), Host(1, (FAST,))])
    sends, _ = network.shaping_commands("name", ports[0], ports)
    classes = {int(line.split("classid 1:")[1].split()[0], 16) for line in sends.lines if line.endswith("prio 1")}
    for listener in (30001, 45678):
        there = [bucket_of(sends, 0, "dst", listener, port) for port in range(40000, 40000 + 2 * BUCKETS, 2)]
        back = [bucket_of(sends, 0, "dst", port, listener) for port in range(40000, 40000 + 2 * BUCKETS, 2)]
        assert set(there) == set(back) == classes
        assert len(classes) == len(there) == BUCKETS


def bucket_of(batch: network.Batch, peer: int, peer_is: str, source: int, destination: int) -> int:
    """The class that the programs of a batch give a packet; 0 for none."""
    at = {NETWORK_HEADER + 12: 0, NETWORK_HEADER + 16: 0, NETWORK_HEADER + 20: source, NETWORK_HEADER + 22: destination}
    at[NETWORK_HEADER + {"src": 12, "dst": 16}[peer_is]] = peer
    for line in filters_of(batch):
        if line.startswith("2 "):
            program = [tuple(map(int, one.split())) for one in line.split('"')[1].rstrip(",").split(",")[1:]]
            found = returned_by(program, at)
            if found:
                return found - 0x10000
    return 0


def returned_by(program: Sequence[tuple[int, ...]], at: Mapping[int, int]) -> int:
    """What a program in classic BPF returns for a packet."""
    a = x = place = 0
    while True:
        code, if_true, if_false, operand = program[place]
        place += 1
        if code in (shaping.LOAD_WORD, shaping.LOAD_HALF):
            a = at[operand]
        elif code == shaping.TO_X:
            x = a
        elif code == shaping.IF_EQUAL:
            place += if_true if a == operand else if_false
        elif code in (shaping.RETURN, shaping.RETURN_A):
            return a if code == shaping.RETURN_A else operand
        else:
            a = {
                shaping.XOR_X: a ^ x,
                shaping.SHIFT_RIGHT: a >> operand,
                shaping.AND: a & operand,
                shaping.ADD: a + operand,
            }[code]


def filters_of(batch: network.Batch) -> list[str]:
    return [line.split(" prio ")[1] for line in batch.lines if line.startswith("filter")]


def test_all_of_the_network_is_in_namespaces_of_ours() -> None:
    ports = network.ports_of("name", [Host(2, (FAST, SLOW)), Host(1, (FAST,))])
    assert network.namespace_commands("name", ports).lines == (
        "netns add name-switch",
        "netns add name-host0-nic0",
        "netns add name-host0-nic1",
        "netns add name-host1-nic0",
    )
    switch = network.switch_commands("name", ports)
    assert switch.namespace == "name-switch"
    assert [line for line in switch.lines if "name d0n1" in line] == [
        "link add name d0n1 mtu 1500 type veth peer name nic0 mtu 1500 netns name-host0-nic1"
    ]


def test_devices_of_one_host_do_not_meet_over_their_nics() -> None:
    ports = network.ports_of("name", [Host(2, (FAST, FAST)), Host(2, (FAST, FAST))])
    routes = [line for line in network.port_commands(ports[1], ports).lines if line.startswith("route")]
    assert routes == ["route add 10.77.0.1/32 dev back0 src 10.77.1.1"]


def test_the_ring_uses_every_nic_at_the_rate_of_the_slower_end() -> None:
    cluster = Cluster([Host(2, (FAST, FAST)), Host(1, (SLOW,))])
    hops = ring(cluster, seconds=1.0)
    payload = 1448 / 1514 / 8
    assert [hop.name for hop in hops] == ["host 0 -> host 1, NIC 0", "host 1 -> host 0, NIC 0"]
    assert [hop.flow for hop in hops] == [Flow(0, 2, round(100e6 * payload)), Flow(2, 0, round(200e6 * payload))]
    assert payload_bytes_per_second(cluster.ports[0], cluster.ports[1]) == pytest.approx(400e6 * payload)


def test_a_bad_calibration_is_refused_and_a_disturbed_one_repeated() -> None:
    with pytest.raises(ClusterError, match=r"one hop .* 0\.900 of expected.*Stop other programs.*a lower rate"):
        Sampler(repeats=3, attempts=2).measure("one hop", 0.05, 100.0, lambda: 90.0)
    samples = iter([50.0, 60.0, 100.0, 100.0, 101.0, 99.0])
    assert Sampler(repeats=3, attempts=2).measure("one hop", 0.05, 100.0, lambda: next(samples)).ratio == 1.0


@pytest.mark.parametrize(
    ("text", "nic"),
    [
        ("400mbit", FAST),
        ("200mbit/100mbit", SLOW),
        ("1.5gbit", Nic.symmetric(1.5e9)),
        ("64000kbit", Nic(*[64000000] * 2)),
    ],
)
def test_rates_are_read(text: str, nic: Nic) -> None:
    assert parse_nic(text) == nic
    assert parse_nics(f"{text},400mbit") == [nic, FAST]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("400", "'400' is no rate; write a number and kbit, mbit or gbit"),
        ("400MB", "'400MB' is no rate"),
        ("1mbit/1mbit/1mbit", "has 3 rates; a NIC has one, or SEND/RECEIVE"),
        ("1kbit", "send_bits_per_second=1000 must be an integer of at least 1000000"),
    ],
)
def test_bad_rates_are_refused(text: str, message: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=message):
        parse_nic(text)


def test_bad_shapes_are_refused() -> None:
    assert parse_hosts(2, 2, [FAST, SLOW], rails=2) == [Host(2, (FAST,) * 2), Host(2, (SLOW,) * 2)]
    with pytest.raises(ValueError, match="--nic has 2 rates for 3 hosts; give one for all, or one for each"):
        parse_hosts(3, 1, [FAST, SLOW], rails=1)
    with pytest.raises(ValueError, match="--hosts 0 must be above 0"):
        parse_hosts(0, 1, [FAST], rails=1)
    with pytest.raises(ValueError, match="--rails 0 must be above 0"):
        parse_hosts(1, 1, [FAST], rails=0)
    with pytest.raises(ValueError, match="devices=0 must be an integer above 0"):
        Host(0, (FAST,))
    with pytest.raises(ValueError, match="2 NICs; every NIC needs a device"):
        Host(1, (FAST, FAST))
    with pytest.raises(ValueError, match="0 hosts; a cluster has 1 to 250"):
        Cluster([])


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert main(["run", "--hosts", "2", "--", "true"]) == 1
    assert "needs root, and this is user 1000; run as root" in capsys.readouterr().err
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ClusterError, match="the program 'ip' is missing; install it: apt-get install iproute2"):
        Cluster.uniform(2, 1, 400e6).__enter__()
