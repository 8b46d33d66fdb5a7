"""What the simulator says where ranks share a NIC."""

import pytest

from tricomm import Topology
from tricomm.plan.cost import MessageColumns, simulated_seconds
from tricomm.plan.parts import Part
from tricomm.plan.routes.chunks import Message
from tricomm.plan.routes.rounds import schedule


@pytest.mark.parametrize("posts", [(3, 2), (2, 3), (1, 4)])
def test_a_nic_carries_first_what_was_posted_first(posts: tuple[int, int]) -> None:
    """Whichever of two ranks posts more: each post takes 2 ms and each chunk 1 ms, so that the last post decides."""
    receivers = iter(range(2, 7))
    part = Part(0, 1, (((0, 1_000_000),),))
    messages = [Message((rank, next(receivers)), ((part,),)) for rank, count in enumerate(posts) for _ in range(count)]
    topology = Topology(("a", "a", "b", "c", "d", "e", "f"), 1e9, overhead_seconds=2e-3, latency_seconds=0.0)
    hops = schedule(messages, range(7), topology)
    seconds = simulated_seconds(MessageColumns.of(messages), hops, topology)
    assert seconds == pytest.approx(1e-3 + 2e-3 * max(posts))
