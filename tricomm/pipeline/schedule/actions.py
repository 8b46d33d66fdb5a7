"""Action: one step of a pipeline, with a text form that parses back; Edge and Channel: what joins the stages.

The text is that of torch.distributed.pipelining, so its schedules can be read and written:

    2F0        stage 2, forward of microbatch 0
    2B0        its whole backward, or in two steps
    2I0  2W0   the gradient of its inputs (which the stage before waits for), and that of its weights
    2SEND_F0   start to send the activation of microbatch 0 to stage 3
    3RECV_F0   have a buffer ready for it: the receive is posted here, and 3F0 waits for it
    3SEND_B0   start to send its gradient back to stage 2
    2RECV_B0   post the receive of that

An edge between stages that are no neighbours names the other end: ``0SEND_F2>3`` goes to stage 3, where it is
``3RECV_F2<0``. torch has no such edges.
"""

import re
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache, wraps
from typing import Any, NamedTuple, TypeVar

from tricomm.errors import ArgumentError, PlanError
from tricomm.kinds import explains_fields, explains_kinds, is_integer, refuse_wrong_kinds

P = TypeVar("P", bound=tuple[int, int])


class Kind(StrEnum):
    """What an action does; the value is torch's name for it.

    Attributes:
        is_compute: whether the device computes, rather than sends or receives.
        is_send: whether it starts a send.
        is_receive: whether it posts a receive.
        gives_gradient: whether it gives the gradient that the stage before waits for.
        ends_microbatch: whether its stage needs nothing more of its microbatch afterwards: B or W.

    Example:
        >>> [kind.value for kind in Kind if kind.is_compute]
        ['F', 'B', 'I', 'W']
        >>> Kind("RECV_F").is_receive
        True
    """

    FORWARD = "F"
    BACKWARD = "B"
    INPUT_GRADIENT = "I"
    WEIGHT_GRADIENT = "W"
    SEND_FORWARD = "SEND_F"
    RECEIVE_FORWARD = "RECV_F"
    SEND_BACKWARD = "SEND_B"
    RECEIVE_BACKWARD = "RECV_B"

    def __init__(self, text: str) -> None:
        self.is_compute = len(text) == 1
        self.is_send = text.startswith("SEND")
        self.is_receive = text.startswith("RECV")
        self.gives_gradient = text in ("B", "I")
        self.ends_microbatch = text in ("B", "W")

    __hash__ = str.__hash__  # a kind equals its text; Enum's own hashes the name, in Python


def _of_stages(cls: type[P]) -> type[P]:
    """Refuse what are no numbers of stages where a pair of them is made."""
    make = cls.__new__

    @wraps(make)
    def checked(kind: type[P], *args: Any, **kwargs: Any) -> P:
        try:
            found: P = make(kind, *args, **kwargs)
        except TypeError as error:
            raise ArgumentError(f"{cls.__name__}: {error}; write {cls.__name__}(0, 1)") from None
        for stage in found:
            if type(stage) is not int and not is_integer(stage):
                raise ArgumentError(f"{cls.__name__}{tuple(found)!r}: {stage!r} is no number of a stage; give two")
        return found

    cls.__new__ = checked  # type: ignore[method-assign, assignment]
    return cls


@_of_stages
class Channel(NamedTuple):
    """One direction of an edge: activations flow to higher stages, gradients to lower ones.

    Example:
        >>> Channel(2, 1).is_forward, str(Channel(2, 1).edge)
        (False, '1-2')
    """

    sender: int
    receiver: int

    @property
    def is_forward(self) -> bool:
        """Whether it carries activations.

        >>> Channel(0, 1).is_forward, Channel(1, 0).is_forward
        (True, False)
        """
        return self.sender < self.receiver

    @property
    def edge(self) -> "Edge":
        """The edge of which this is a direction.

        >>> Channel(1, 0).edge == Channel(0, 1).edge
        True
        """
        return Edge(min(self), max(self))

    def __str__(self) -> str:
        return f"{self.sender}>{self.receiver}"


@_of_stages
class Edge(NamedTuple):
    """Activations of stage ``source`` are inputs of stage ``destination``, and gradients come back.

    Example:
        >>> edge = Edge(0, 1)
        >>> print(edge, edge.forward, edge.backward)
        0-1 0>1 1>0
    """

    source: int
    destination: int

    @property
    def forward(self) -> Channel:
        """The direction of activations.

        >>> print(Edge(0, 2).forward)
        0>2
        """
        return Channel(self.source, self.destination)

    @property
    def backward(self) -> Channel:
        """The direction of gradients.

        >>> print(Edge(0, 2).backward)
        2>0
        """
        return Channel(self.destination, self.source)

    def __str__(self) -> str:
        return f"{self.source}-{self.destination}"


_TEXT = re.compile(r"(\d+)(F|B|I|W|SEND_F|RECV_F|SEND_B|RECV_B)(\d+)(?:([<>])(\d+))?")


MAX_STAGES = 1 << 16
"""Of a pipeline: more is a mistake, and would only fill the memory."""

MAX_COUNT = 1 << 20
"""Of microbatches, or moves to try: the same."""


@explains_fields
@dataclass(frozen=True, slots=True)
class Action:
    """One step of one stage for one microbatch.

    Attributes:
        stage: whose step it is.
        kind: what is done.
        microbatch: for which.
        peer: the stage at the other end of a send or receive; None means the neighbour, and is replaced by it. Always
            None for compute.

    Raises:
        PlanError: numbers that name no stage or microbatch, or a peer on the wrong side.

    Example:
        >>> Action(2, Kind.FORWARD, 0)
        Action.parse('2F0')
        >>> Action.parse("0SEND_F2>3").channel
        Channel(sender=0, receiver=3)
    """

    stage: int
    kind: Kind
    microbatch: int
    peer: int | None = None

    def __post_init__(self) -> None:
        if type(self.stage) is not int or type(self.microbatch) is not int or type(self.kind) is not Kind:
            refuse_wrong_kinds(Action.__init__, stage=self.stage, microbatch=self.microbatch, kind=self.kind)
        if self.stage < 0 or self.microbatch < 0:
            raise PlanError(
                f"stage {self.stage} and microbatch {self.microbatch} of an action are counted from 0; give numbers "
                "that are not negative"
            )
        if self.kind.is_compute:
            if self.peer is not None:
                raise PlanError(f"{self} computes and has no peer, but peer={self.peer}; leave it out")
            return
        step = 1 if self.kind in (Kind.SEND_FORWARD, Kind.RECEIVE_BACKWARD) else -1
        if self.peer is None:
            object.__setattr__(self, "peer", self.stage + step)
        assert self.peer is not None
        if self.peer < 0 or (self.peer - self.stage) * step <= 0:
            side = "after" if step > 0 else "before"
            raise PlanError(
                f"{self.stage}{self.kind}{self.microbatch} joins stage {self.stage} to stage {self.peer}, which is not "
                f"a stage {side} it; activations go to later stages and gradients to earlier ones"
            )

    @classmethod
    @explains_kinds
    def parse(cls, text: str) -> "Action":
        """Read what ``str`` writes.

        Raises:
            PlanError: text that is no action.

        Example:
            >>> action = Action.parse("1SEND_B3")
            >>> action.stage, action.kind.name, action.microbatch, action.peer
            (1, 'SEND_BACKWARD', 3, 0)
        """
        match = _TEXT.fullmatch(text)
        kind = Kind(match[2]) if match else None
        arrow = {"<": True, ">": False}.get(match[4]) if match and match[4] else None
        if match is None or kind is None or (arrow is not None and (kind.is_compute or arrow != kind.is_receive)):
            raise PlanError(f"{text!r} is not an action; write stage, kind and microbatch, as 2F0, 1I3 or 0SEND_F2>3")
        return cls(int(match[1]), kind, int(match[3]), int(match[5]) if match[5] else None)

    @property
    def channel(self) -> Channel:
        """The directed edge that a send or receive uses.

        >>> print(Action.parse("1SEND_B3").channel, Action.parse("1RECV_F3").channel)
        1>0 0>1
        """
        assert self.peer is not None, f"{self} uses no channel"
        return Channel(self.peer, self.stage) if self.kind.is_receive else Channel(self.stage, self.peer)

    @property
    def is_compute(self) -> bool:
        """Whether the device computes, rather than sends or receives.

        >>> [Action.parse(text).is_compute for text in ("1F0", "1SEND_F0")]
        [True, False]
        """
        return self.kind.is_compute

    def __str__(self) -> str:
        text = f"{self.stage}{self.kind}{self.microbatch}"
        if self.peer is None or abs(self.peer - self.stage) == 1:
            return text
        return f"{text}{'<' if self.kind.is_receive else '>'}{self.peer}"

    def __repr__(self) -> str:
        return f"Action.parse({str(self)!r})"


@lru_cache(maxsize=1 << 16)
def send(channel: Channel, microbatch: int) -> Action:
    """The action that starts to send on a channel."""
    kind = Kind.SEND_FORWARD if channel.is_forward else Kind.SEND_BACKWARD
    return Action(channel.sender, kind, microbatch, channel.receiver)


@lru_cache(maxsize=1 << 16)
def receive(channel: Channel, microbatch: int) -> Action:
    """The action that posts the receive on a channel."""
    kind = Kind.RECEIVE_FORWARD if channel.is_forward else Kind.RECEIVE_BACKWARD
    return Action(channel.receiver, kind, microbatch, channel.sender)
