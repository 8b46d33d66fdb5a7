"""Rates and queues of emulated NICs: the lines for ``tc``, and the kernel's settings that go with them."""

from collections.abc import Sequence

MTU_BYTES = 1500
# Ethernet, IPv4, and TCP with time stamps. The shaper counts them in every packet.
ETHERNET_BYTES = 14
HEADER_BYTES = 20 + 32
# How late the shaper's timer may come without loss of rate. On a busy virtual machine that is a millisecond; more
# would let short transfers exceed the rate, since what was not sent in that time is sent at once.
BURST_SECONDS = 2e-3
# A switch that never drops: every connection keeps less than SOCKET_SECONDS of its NIC's time under way, so that no
# queue overflows, and connections into one NIC share it evenly. Where packets are dropped they do neither.
QUEUE_BYTES = 16_000_000
SOCKET_SECONDS = 2.6e-3
LEAST_SOCKET_BYTES = 131_072
CONTROL_SHARE = 0.1


def shaping_lines(
    interface: str, bits_per_second: int, peers: Sequence[str] = (), peer_is: str = "dst"
) -> tuple[str, ...]:
    """What limits the traffic that leaves an interface.

    Small packets go ahead of the bulk: TCP's acknowledgements and gloo's announcements of what is ready. Behind a
    full queue they would slow the other direction down.

    Args:
        interface: whose queue is shaped.
        bits_per_second: of the interface; with peers, of each of them.
        peers: addresses that have the rate each for itself, as if there were a link to each.
        peer_is: what a peer's address is in a packet that leaves here, "dst" or "src".
    """
    on = f"dev {interface}"
    lines = [f"qdisc add {on} root handle 1: htb" + ("" if peers else " default 20")]
    for number, peer in enumerate(peers or ("",)):
        lines += _link_lines(on, 0x100 * number, bits_per_second, f"match ip {peer_is} {peer}/32" if peer else "")
    return tuple(lines)


def _link_lines(on: str, base: int, bits_per_second: int, match: str) -> list[str]:
    """One link: a class at its rate, with a class for small packets and one, by default, for the rest."""
    burst_bytes = max(MTU_BYTES + ETHERNET_BYTES, round(bits_per_second / 8 * BURST_SECONDS))
    control = round(bits_per_second * CONTROL_SHARE)
    limits = f"ceil {bits_per_second}bit burst {burst_bytes} cburst {burst_bytes} quantum {MTU_BYTES + ETHERNET_BYTES}"
    link, small, bulk = (f"{base + part:x}" for part in (0x1, 0x10, 0x20))
    # IP packets shorter than 128 bytes.
    is_small = " ".join([*([match] if match else []), "match u16 0x0000 0xff80 at 2"])
    lines = [
        f"class add {on} parent 1: classid 1:{link} htb rate {bits_per_second}bit {limits}",
        f"class add {on} parent 1:{link} classid 1:{small} htb rate {control}bit {limits} prio 0",
        f"class add {on} parent 1:{link} classid 1:{bulk} htb rate {bits_per_second - control}bit {limits} prio 1",
        f"qdisc add {on} parent 1:{small} handle {small}: bfifo limit {QUEUE_BYTES}",
        f"qdisc add {on} parent 1:{bulk} handle {bulk}: bfifo limit {QUEUE_BYTES}",
        f"filter add {on} parent 1: protocol ip prio 1 u32 {is_small} flowid 1:{small}",
    ]
    if match:
        lines.append(f"filter add {on} parent 1: protocol ip prio 2 u32 {match} flowid 1:{bulk}")
    return lines


def kernel_settings(bits_per_second: int) -> dict[str, str]:
    """What to write below /proc/sys in the namespace of a NIC of this rate."""
    socket_bytes = max(LEAST_SOCKET_BYTES, round(bits_per_second / 8 * SOCKET_SECONDS))
    return {
        # IPv6 would only add its own chatter.
        "net/ipv6/conf/all/disable_ipv6": "1",
        "net/ipv6/conf/default/disable_ipv6": "1",
        "net/ipv4/tcp_rmem": f"4096 {socket_bytes} {socket_bytes}",
        "net/ipv4/tcp_wmem": f"4096 {socket_bytes} {socket_bytes}",
        # A network for training has no slow start; here a pause between two measurements would bring it back.
        "net/ipv4/tcp_slow_start_after_idle": "0",
    }
