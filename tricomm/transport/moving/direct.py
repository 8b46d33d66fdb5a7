"""Direct: one rank's end of a plan whose source tensors stay in place, so that receivers pull straight out of them.

Once, when the ranks are connected, each tells those that read its tensors where they are; from then on a call only says
when they can be read, and when they were. Which pairs do so, both ends know; all others go as without.
"""

from collections.abc import Iterator, Sequence
from math import prod

import torch

from tricomm.kernels.reference import alignment_nbytes
from tricomm.layout.intervals import region_shape
from tricomm.packing.binding import local_copies
from tricomm.packing.copy_program import CopyProgram, LocalTensor, Side, between, torch_dtype
from tricomm.packing.holdings import Tensors
from tricomm.plan.program import RankProgram
from tricomm.plan.stacks import Stack
from tricomm.transport.base import Asked, Operation, Place, Shared, Transport, Work
from tricomm.transport.memory.rungs import PairTransport, Rung
from tricomm.transport.moving.pulls import Pulls, pulls_of
from tricomm.transport.moving.steps import NOTHING_PULLED, Pulled

SUMMED = PairTransport(Rung.DEVICE, "what comes is summed first, as the source is Partial")
PASSED_ON = "what comes is passed on from there"
REMEDIES = {
    PASSED_ON: "strategy=SendRecv() has each rank pull for itself",
    "cannot be exported": "let PYTORCH_CUDA_ALLOC_CONF have neither expandable_segments nor cudaMallocAsync",
}


class Straight:
    """What was agreed on with the ranks of some connections.

    Args:
        shares: of those connections.
        shared: what was agreed.
        pulls: what goes so.
        stacks: of the move.
        device: of the tensors.
    """

    def __init__(
        self, shares: object, shared: Shared, pulls: Pulls, stacks: Sequence[Stack], device: torch.device
    ) -> None:
        self.shares, self.pulls = shares, pulls
        self.ways = frozenset(pulls.nbytes)
        self._shared = shared
        self._device = device
        self._counts = {at: len(stack.items) for at, stack in enumerate(stacks)}
        self._tensors: list[torch.Tensor] = []
        firsts = {}
        for peer in {peer: None for is_send, peer in pulls.nbytes if not is_send}:
            first, firsts[peer] = len(self._tensors), dict[int, int]()
            shapes = list(_shapes_of(stacks, peer))
            for stack, shape, dtype in shapes:
                place = shared.received[peer][len(self._tensors) - first]
                firsts[peer].setdefault(stack, len(self._tensors))
                self._tensors.append(self._tensor(place, shape, dtype))
        described = tuple(LocalTensor(one.dtype, one.stride(), alignment_nbytes(one)) for one in self._tensors)
        self._sides = {peer: Side(described, of_stacks, self._counts) for peer, of_stacks in firsts.items()}

    def _tensor(self, place: Place, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """That of a peer."""
        if not prod(shape):
            return torch.empty(shape, dtype=dtype, device=self._device)
        reach = 1 + sum((extent - 1) * stride for extent, stride in zip(shape, place.strides, strict=True))
        memory = self._shared.memory(place.address, reach * dtype.itemsize)
        return memory.view(dtype).as_strided(shape, place.strides)

    def pulled(self, side: Side, destinations: Tensors) -> Pulled:
        """What is done in each run, for some tensors of this rank."""
        nothing = torch.empty(0, dtype=torch.uint8, device=self._device)
        sends, receives = (
            tuple(Operation(way, peer, nothing, is_direct=True) for way, peer in self.pulls.nbytes if way == is_send)
            for is_send in (True, False)
        )
        nbytes = [sum(n for (way, _), n in self.pulls.nbytes.items() if way == is_send) for is_send in (True, False)]
        boxes = tuple(box for one in self.pulls.boxes for box in between(one.copy, self._sides[one.peer], side))
        if not sends and not receives:
            return NOTHING_PULLED
        some = next(iter(self._sides.values()), side)
        copies = local_copies(CopyProgram(some, side, (), (), boxes, 0, 0, 0), self._tensors, destinations)
        return Pulled(receives, sends, copies, nbytes[1], nbytes[0])


class Direct:
    """See above.

    Args:
        program: of this rank.
        stacks: of the move.
        is_summed: whether another move follows, of what this one brought.
        device: of the tensors.
    """

    def __init__(self, program: RankProgram, stacks: Sequence[Stack], is_summed: bool, device: torch.device) -> None:
        self._program, self._stacks, self._is_summed, self._device = program, stacks, is_summed, device
        sends = {one.peer: "" for step in program.rounds for one in step.sends}
        receives = {one.peer: "" for step in program.rounds for one in step.receives}
        relayed = set()
        for step in program.rounds:
            for one in step.sends:
                if not one.regions:
                    sends[one.peer] = PASSED_ON
                    relayed.add(one.key)
        for step in program.rounds:
            receives |= {one.peer: PASSED_ON for one in step.receives if one.key in relayed}
        self._sends, self._receives = sends, receives
        self._straight: Straight | None = None
        self._kept: Tensors | None = None
        self.transports: dict[tuple[int, int], PairTransport] = {}
        """Of the pairs of this rank that go by memory of devices, once that is known."""

    def close(self) -> None:
        """Give back what was agreed on."""
        self._straight = self._kept = None

    def kept(self, sources: Tensors) -> Tensors:
        """The tensors of the first run, for those of another that are where these were: what is bound is kept."""
        if self._kept is None:
            self._kept = sources
        return self._kept

    def agreed(self, sources: Tensors, transport: Transport[Work]) -> Straight | None:
        """What goes straight, on the connections of the moment; where they are new, the ranks agree on it."""
        directions, _, shares = transport.arenas
        if self._straight is not None and self._straight.shares is not shares:
            self._straight, self.transports = None, {}
        if shares is None or self._straight is not None:
            return self._straight
        to = {peer: why for peer, why in self._sends.items() if (True, peer) in directions}
        of = {peer: why for peer, why in self._receives.items() if (False, peer) in directions}
        rank = self._program.rank
        if self._is_summed:
            self.transports = {**{(rank, peer): SUMMED for peer in to}, **{(peer, rank): SUMMED for peer in of}}
            return None
        shared = transport.share(Asked(sources, to, of))
        ways = {(True, peer) for peer, why in shared.sent.items() if not why}
        ways |= {(False, peer) for peer in shared.received}
        for peer, places in shared.received.items():
            assert len(places) == sum(1 for _ in _shapes_of(self._stacks, peer)), "the ranks follow one plan"
        pulls = pulls_of(self._program, self._stacks, ways)
        self._straight = Straight(shares, shared, pulls, self._stacks, self._device)
        self.transports = {(rank, peer): _way(why) for peer, why in shared.sent.items()}
        self.transports |= {(peer, rank): _way(why) for peer, why in shared.refused.items()}
        self.transports |= {(peer, rank): _way("") for peer in shared.received}
        return self._straight


def _way(problem: str) -> PairTransport:
    remedy = next((remedy for text, remedy in REMEDIES.items() if text in problem), "")
    return PairTransport(Rung.DEVICE, problem, remedy) if problem else PairTransport(Rung.TENSORS)


def _shapes_of(stacks: Sequence[Stack], rank: int) -> Iterator[tuple[int, tuple[int, ...], torch.dtype]]:
    """(stack, shape, dtype) of each tensor that a rank has before a move, in the order in which it gives them."""
    for number, stack in enumerate(stacks):
        if rank in stack.source.mesh:
            shape = region_shape(stack.source.holding(rank))
            count = len(stack.items)
            for _ in stack.items:
                yield number, shape if count == 1 else shape[1:], torch_dtype(stack.source.element_type)
