"""Stats: what moves cost, counted; the same type for a Resharder, a group and a pipeline."""

from dataclasses import dataclass, fields
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """What one rank sent over one transport.

    Attributes:
        transport: its name, such as "gloo", "nccl", "memory" or "local".
        messages: sent.
        nbytes: sent, without headers.
        wait_seconds: for which the rank had nothing to do but to wait for it.
    """

    transport: str
    messages: int = 0
    nbytes: int = 0
    wait_seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Stats:
    """What the calls of one rank cost. Stats add up: ``sum(all_stats, Stats())``.

    Attributes:
        calls: made.
        messages, nbytes: sent by this rank.
        minimum_nbytes: what this rank would send if every needed element crossed the wire once, from the holder that
            the plan chose.
        plan_seconds: planning and binding, once per layout.
        pack_seconds, post_seconds, wait_seconds, unpack_seconds: in calls.
        transports: the traffic of each transport that was used.

    Example:
        >>> one = Stats(calls=1, messages=2, nbytes=4096, minimum_nbytes=4096, wait_seconds=0.002)
        >>> print(one + one)
        2 calls: 4 messages, 8192 bytes (minimum 8192); 0.0 ms plan, 0.0 pack, 0.0 post, 4.0 wait, 0.0 unpack
    """

    calls: int = 0
    messages: int = 0
    nbytes: int = 0
    minimum_nbytes: int = 0
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
        return Stats(transports=tuple(traffic.values()), **_sums(self, other, "transports"))

    def __str__(self) -> str:
        times = [
            f"{1000 * getattr(self, f'{step}_seconds'):.1f}{' ms' if step == 'plan' else ''} {step}"
            for step in ("plan", "pack", "post", "wait", "unpack")
        ]
        return (
            f"{self.calls} calls: {self.messages} messages, {self.nbytes} bytes (minimum {self.minimum_nbytes}); "
            + ", ".join(times)
        )


def _sums(first: Traffic | Stats, second: Traffic | Stats, without: str) -> dict[str, Any]:
    """The sums of all fields but one, by name."""
    names = [one.name for one in fields(first) if one.name != without]
    return {name: getattr(first, name) + getattr(second, name) for name in names}
