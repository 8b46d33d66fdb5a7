"""Stats: what moves cost, counted; the same type for a Resharder, a group and a pipeline. Progress: how far one is."""

from dataclasses import dataclass, fields
from typing import Any, NamedTuple


class Progress(NamedTuple):
    """How far one rank is with a call.

    Attributes:
        tensors_done: of those that this rank holds or needs, how many it is done with; by rules, of their pieces.
        tensors: how many it holds or needs.
        nbytes_done: sent and received by it so far.
        nbytes: that it sends and receives in the whole call.

    Example:
        >>> print(Progress(tensors_done=12, tensors=723, nbytes_done=1 << 20, nbytes=1 << 30))
        12 of 723 tensors, 1048576 of 1073741824 bytes
    """

    tensors_done: int
    tensors: int
    nbytes_done: int
    nbytes: int

    def __str__(self) -> str:
        return f"{self.tensors_done} of {self.tensors} tensors, {self.nbytes_done} of {self.nbytes} bytes"


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """What one rank sent over one transport.

    Attributes:
        transport: its name, such as "gloo", "nccl", "memory" or "local"; "gloo and memory" where ranks take the one or
            the other.
        messages: sent; over "memory" those that others read from this rank.
        nbytes: likewise, without headers.
        wait_seconds: for which the rank had nothing to do but to wait for it.
    """

    transport: str
    messages: int = 0
    nbytes: int = 0
    wait_seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Stats:
    """What the calls of one rank cost. Stats add up: ``sum(all_stats, Stats())``; of staging the larger is kept.

    Attributes:
        calls: carried out.
        tensors: that the rank needs, or if it needs none that it holds, counted in each call.
        messages, nbytes: sent by this rank, or read from its memory by ranks of its host.
        received_messages, received_nbytes: that came to it, or that it read.
        minimum_nbytes: the least that must have come to it: what it needs and does not hold.
        staging_nbytes: the most that it had in packed chunks at once.
        plan_seconds: planning and binding, once per layout.
        pack_seconds, post_seconds, wait_seconds, unpack_seconds: in calls, on the thread that made them; what a device
            does meanwhile is not in them.
        transports: the traffic of each transport that was used.

    Example:
        >>> one = Stats(calls=1, messages=2, nbytes=4096, wait_seconds=0.002)
        >>> print(one + one)
        2 calls: 4 messages sent, 8192 bytes; 0 received, 0 bytes (minimum 0); at most 0 bytes staged
        0.0 ms plan, 0.0 pack, 0.0 post, 4.0 wait, 0.0 unpack
        >>> server = Stats(calls=2, tensors=390, received_nbytes=16 << 30, minimum_nbytes=16 << 30, wait_seconds=1.5)
        >>> print(server.line)
        390 tensors in 2 calls: 17179.87 MB received (minimum 17179.87 MB) in 1.500 s, 11.45 GB/s
    """

    calls: int = 0
    tensors: int = 0
    messages: int = 0
    nbytes: int = 0
    received_messages: int = 0
    received_nbytes: int = 0
    minimum_nbytes: int = 0
    staging_nbytes: int = 0
    plan_seconds: float = 0.0
    pack_seconds: float = 0.0
    post_seconds: float = 0.0
    wait_seconds: float = 0.0
    unpack_seconds: float = 0.0
    transports: tuple[Traffic, ...] = ()

    def __add__(self, other: "Stats") -> "Stats":
        if not isinstance(other, Stats):
            return NotImplemented
        traffic: dict[str, Traffic] = {}
        for one in (*self.transports, *other.transports):
            before = traffic.get(one.transport, Traffic(transport=one.transport))
            traffic[one.transport] = Traffic(transport=one.transport, **_sums(before, one, "transport"))
        sums = _sums(self, other, "transports", "staging_nbytes")
        staging = max(self.staging_nbytes, other.staging_nbytes)
        return Stats(transports=tuple(traffic.values()), staging_nbytes=staging, **sums)

    @property
    def seconds(self) -> float:
        """In calls, on the thread that made them; see above.

        >>> Stats(calls=1, pack_seconds=0.25, wait_seconds=0.5).seconds
        0.75
        """
        return self.pack_seconds + self.post_seconds + self.wait_seconds + self.unpack_seconds

    @property
    def line(self) -> str:
        """For a log: what has come to this rank, or what a rank to which nothing comes has sent, and how fast.

        >>> Stats(calls=1, tensors=2, nbytes=1_000_000, post_seconds=0.5).line
        '2 tensors in 1 calls: 1.00 MB sent in 0.500 s, 0.00 GB/s'
        """
        given, taken = self._verbs
        nbytes, what = self.received_nbytes, f"{taken} (minimum {self.minimum_nbytes / 1e6:.2f} MB)"
        if not (self.received_nbytes or self.minimum_nbytes):
            nbytes, what = self.nbytes, given
        rate = f", {nbytes / self.seconds / 1e9:.2f} GB/s" if self.seconds else ""
        return (
            f"{self.tensors} tensors in {self.calls} calls: {nbytes / 1e6:.2f} MB {what} in {self.seconds:.3f} s{rate}"
        )

    @property
    def _verbs(self) -> tuple[str, str]:
        """What happened to messages of this rank and to those for it: from memory nobody sends, but the other reads."""
        names = {name for one in self.transports for name in one.transport.split(" and ")}
        if names == {"memory"}:
            return "read by others", "read from others"
        return ("sent or read by others", "received or read") if "memory" in names else ("sent", "received")

    def __str__(self) -> str:
        times = [
            f"{1000 * getattr(self, f'{step}_seconds'):.1f}{' ms' if step == 'plan' else ''} {step}"
            for step in ("plan", "pack", "post", "wait", "unpack")
        ]
        given, taken = self._verbs
        return (
            f"{self.calls} calls: {self.messages} messages {given}, {self.nbytes} bytes; "
            f"{self.received_messages} {taken}, {self.received_nbytes} bytes (minimum {self.minimum_nbytes}); "
            f"at most {self.staging_nbytes} bytes staged\n" + ", ".join(times)
        )


def _sums(first: Traffic | Stats, second: Traffic | Stats, *without: str) -> dict[str, Any]:
    """The sums of all fields but some, by name."""
    names = [one.name for one in fields(first) if one.name not in without]
    return {name: getattr(first, name) + getattr(second, name) for name in names}
