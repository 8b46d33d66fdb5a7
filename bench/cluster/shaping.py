"""Rates and queues of emulated NICs: the lines for ``tc``, and the kernel's settings that go with them."""

from collections.abc import Sequence
from ipaddress import IPv4Address

MTU_BYTES = 1500
# Ethernet, IPv4, and TCP with time stamps. The shaper counts them in every packet.
ETHERNET_BYTES = 14
HEADER_BYTES = 20 + 32
# How late the shaper's timer may come without loss of rate. On a busy virtual machine that is a millisecond; more
# would let short transfers exceed the rate, since what was not sent in that time is sent at once.
BURST_SECONDS = 2e-3
QUEUE_BYTES = 1_000_000
CONTROL_SHARE = 0.1
BUCKETS = 1024
"""Of flows, each with a queue of its own; a power of two. Hosts of four ranks that all send to all have 48 connections:
among 128 buckets five pairs of them would meet and go at half the others' rate, so that a NIC waits for them."""
LINK_BUCKETS = 128
"""The same of each link, where each peer has one and fewer connections meet."""
# Where classic BPF counts from the header of IP, and what it calls its instructions.
NETWORK_HEADER = 0xFFF00000
LOAD_WORD, LOAD_HALF, TO_X, XOR_X, SHIFT_RIGHT = 0x20, 0x28, 0x07, 0xAC, 0x74
AND, ADD, IF_EQUAL, RETURN, RETURN_A = 0x54, 0x04, 0x15, 0x06, 0x16


def shaping_lines(
    interface: str, bits_per_second: int, peers: Sequence[str] = (), peer_is: str = "dst"
) -> tuple[str, ...]:
    """What limits the traffic that leaves an interface.

    TCP's acknowledgements go ahead of the bulk, for behind a full queue they would slow the other direction down.
    Packets with any payload do not: those of a connection that overtake each other are taken for lost and sent again.
    Connections share the rest packet by packet, as under the queueing that Linux has by default (fq_codel), which this
    kernel may lack: in one queue for all, a message of a few bytes, such as gloo's that a receive is posted, would wait
    for all that other connections have written before it. At these rates that is longer than a pipeline's stage
    computes; at those of a real NIC it would be a thousandth of it.

    Args:
        interface: whose queue is shaped.
        bits_per_second: of the interface; with peers, of each of them.
        peers: addresses that have the rate each for itself, as if there were a link to each.
        peer_is: what a peer's address is in a packet that leaves here, "dst" or "src".
    """
    on = f"dev {interface}"
    lines = [f"qdisc add {on} root handle 1: htb" + ("" if peers else " default 20")]
    buckets = LINK_BUCKETS if peers else BUCKETS
    for number, peer in enumerate(peers or ("",)):
        lines += _link_lines(on, 0x100 * number, bits_per_second, buckets, peer, peer_is)
    return tuple(lines)


def _link_lines(on: str, base: int, bits_per_second: int, count: int, peer: str, peer_is: str) -> list[str]:
    """One link: a class at its rate, with a class for acknowledgements and, for the rest, one for each bucket."""
    burst_bytes = max(MTU_BYTES + ETHERNET_BYTES, round(bits_per_second / 8 * BURST_SECONDS))
    control = round(bits_per_second * CONTROL_SHARE)
    limits = f"ceil {bits_per_second}bit burst {burst_bytes} cburst {burst_bytes} quantum {MTU_BYTES + ETHERNET_BYTES}"
    link, small, *buckets = (f"{base + part:x}" for part in (0x1, 0x10, *range(0x20, 0x20 + count)))
    bucket_rate = (bits_per_second - control) // count
    # IP packets shorter than 64 bytes: headers are 52 of them.
    is_small = " ".join([*([f"match ip {peer_is} {peer}/32"] if peer else []), "match u16 0x0000 0xffc0 at 2"])
    lines = [
        f"class add {on} parent 1: classid 1:{link} htb rate {bits_per_second}bit {limits}",
        f"class add {on} parent 1:{link} classid 1:{small} htb rate {control}bit {limits} prio 0",
        *(
            f"class add {on} parent 1:{link} classid 1:{bucket} htb rate {bucket_rate}bit {limits} prio 1"
            for bucket in buckets
        ),
        *(f"qdisc add {on} parent 1:{leaf} handle {leaf}: bfifo limit {QUEUE_BYTES}" for leaf in (small, *buckets)),
        f"filter add {on} parent 1: protocol ip prio 1 u32 {is_small} flowid 1:{small}",
    ]
    program = _bucket_program(0x10000 + base + 0x20, count, peer, peer_is)
    code = ",".join(" ".join(map(str, instruction)) for instruction in program)
    lines.append(f'filter add {on} parent 1: protocol ip prio 2 bpf bytecode "{len(program)},{code},"')
    return lines


def _bucket_program(first_bucket: int, count: int, peer: str, peer_is: str) -> list[tuple[int, int, int, int]]:
    """Classic BPF that finds the bucket of a packet: by both ports, as one end of a connection may listen for many.

    Args:
        first_bucket: the class of bucket 0.
        count: of buckets.
        peer, peer_is: see ``shaping_lines``; packets of others are left to other filters.

    Returns:
        Instructions: code, how many to leave out if true, if false, operand.
    """
    ports = [
        (LOAD_HALF, 0, 0, NETWORK_HEADER + 20),
        (TO_X, 0, 0, 0),
        (LOAD_HALF, 0, 0, NETWORK_HEADER + 22),
        (XOR_X, 0, 0, 0),
        (SHIFT_RIGHT, 0, 0, 1),  # the lowest bit is the same of all ports that a kernel chooses
        (AND, 0, 0, count - 1),
        (ADD, 0, 0, first_bucket),
        (RETURN_A, 0, 0, 0),
    ]
    if not peer:
        return ports
    address = NETWORK_HEADER + {"src": 12, "dst": 16}[peer_is]
    is_peer = (IF_EQUAL, 0, len(ports), int(IPv4Address(peer)))
    return [(LOAD_WORD, 0, 0, address), is_peer, *ports, (RETURN, 0, 0, 0)]


def kernel_settings() -> dict[str, str]:
    """What to write below /proc/sys in the namespace of a NIC: windows of sockets as Linux has them by default.

    A namespace inherits what its machine was tuned to. Where that is bbr, connections leave a full queue for 200 ms at
    a time to look for a shorter way, and hosts that all send to all lose a seventh of their NICs, whatever library
    sends. Of those that share a queue fairly, reno is the one that every kernel has and allows in a namespace.
    """
    return {
        # IPv6 would only add its own chatter.
        "net/ipv6/conf/all/disable_ipv6": "1",
        "net/ipv6/conf/default/disable_ipv6": "1",
        "net/ipv4/tcp_congestion_control": "reno",
        "net/ipv4/tcp_rmem": "4096 131072 6291456",
        "net/ipv4/tcp_wmem": "4096 16384 4194304",
    }
