"""What one process keeps for one process group. It belongs to the group object and goes with it."""

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import replace
from functools import cache
from typing import Any

import torch
import torch.distributed as dist

from tricomm.errors import ArgumentError, SpecError, shown
from tricomm.layout.topology import Topology
from tricomm.plan.routes.strategies import Auto
from tricomm.transport.accelerator import Accelerator, accelerator_of, device_here
from tricomm.transport.channel import Channel
from tricomm.transport.coordination.coordinator import Coordinator
from tricomm.transport.gloo import GlooDevices

HAS_GROUPS = dist.is_available()
"""Whether torch was built with them."""

MAX_KEPT = 512
"""So many keys of Resharders of one-shot calls are kept, those that were used last; most have two."""

MAX_CHANNELS = 32
"""Of so many channels at most: each holds connections to all its ranks. One that comes again connects again."""

MAX_COUNTED = 1 << 16
"""Resharders are counted for so many layouts and names, those that were made last."""


NCCL_HOP_SECONDS = 14e-6
"""NCCL's own figure for a step of a ring between hosts (ring, simple protocol, network: hwLat in src/graph/tuning.cc of
2.28), the largest of its protocols. On one GPU shared by ranks no such figure can be measured; see bench/README.md."""

COPY_BYTES_PER_SECOND, COPIES_BYTES_PER_SECOND = 9e9, 15e9
"""Between two processes by way of memory that both have, and between all those of two cores together."""

WAKING_SECONDS = 60e-6
"""From a process that has packed to one that unpacks, both in Python."""

MOST_PLANNED_TOGETHER = Auto().search_up_to
"""With more ranks each plans its own part, and does not know all groups."""


def _share_hosts(topology: Topology, ranks: tuple[int, ...]) -> bool:
    """Whether any two of these ranks are on one host."""
    topology.check_covers(ranks)
    return len(set(map(topology.host, ranks))) < len(ranks)


@cache
def _one_host(ranks: int) -> Topology:
    return Topology(
        ("this host",) * ranks,
        intra_bytes_per_second=COPY_BYTES_PER_SECOND,
        latency_seconds=WAKING_SECONDS,
        memory_bytes_per_second=COPIES_BYTES_PER_SECOND,
    )


class GroupContext(Coordinator):
    """This rank's channels, one-shot Resharders and counts in one process group.

    Args:
        group: a ProcessGroup of torch; not kept alive.
    """

    def __init__(self, group: Any) -> None:
        super().__init__(group)
        self._channels: weakref.WeakValueDictionary[Hashable, Channel] = weakref.WeakValueDictionary()
        self._devices = GlooDevices()
        self._kept: OrderedDict[Hashable, Any] = OrderedDict()
        self.as_written: dict[tuple[int | str, ...], tuple[Any, Hashable]] = {}
        """By the ids of what one-shot calls were given, what was made for them; and that, so that ids stay its own."""
        self._counts: OrderedDict[str, int] = OrderedDict()
        self.tapes: dict[str, Any] = {}
        """Of differentiable moves, by channel; see tricomm.autograd.tape."""
        self._lock = threading.Lock()
        self.accelerator_of: Callable[[torch.device], Accelerator | None] = accelerator_of
        """Of the device of a new channel."""

    def channel(self, participants: tuple[int, ...], device: torch.device, name: str) -> Channel:
        """Return the channel of some ranks; it lives as long as somebody holds it."""
        key = (participants, device.type, name)
        with self._lock:
            channel = self._channels.get(key)
            if channel is None:
                channel = self._channels[key] = Channel(
                    self, participants, device, name, self._devices, self.accelerator_of(device)
                )
            return channel

    def topology_with_calls(
        self, topology: Topology | None, participants: tuple[int, ...], device: torch.device, transport: str
    ) -> Topology | None:
        """The topology of a plan whose ranks can broadcast in one call, if those of this device surely can: where some
        read each other's memory, nothing goes in one call. Ranks that use memory alone share a host, if nothing else is
        said: then each reads what others have, and nobody hands on what it got.
        """
        if topology is None and transport == "memory" and self.accelerator_of(device) is None:
            return _one_host(participants[-1] + 1)
        is_said = topology is not None and topology.multicast_hop_seconds is not None
        if is_said or len(participants) > MOST_PLANNED_TOGETHER or self.accelerator_of(device) is None:
            return topology
        if transport != "network" and (topology is None or _share_hosts(topology, participants)):
            return topology
        topology = topology or Topology.flat(participants[-1] + 1)
        return replace(topology, multicast_hop_seconds=NCCL_HOP_SECONDS)

    def count(self, digest: str) -> int:
        """Return how many Resharders of this layout and name were made on this rank, this one included."""
        with self._lock:
            number = self._counts.pop(digest, 0) + 1
            self._counts[digest] = number
            if len(self._counts) > MAX_COUNTED:
                self._counts.popitem(last=False)
            return number

    def uncount(self, digest: str, number: int) -> None:
        """The Resharder with the last number never met anybody, so that the next one gets its number."""
        with self._lock:
            if self._counts.get(digest) == number:
                self._counts[digest] = number - 1

    def kept(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """Return what was made for a key before, or make it."""
        with self._lock:
            found = self._kept.get(key)
            if found is not None:
                self._kept.move_to_end(key)
                return found
        made = make()
        with self._lock:
            self._kept[key] = made
            gone = self._too_many()
            if gone:
                self.as_written.clear()  # what goes is held by nothing else
        del gone  # connections close, without the lock
        return made

    def _too_many(self) -> list[Any]:
        """Take out those used longest ago that are too many, or of too many channels."""
        channels, gone = set[tuple[Any, str]](), list[Any]()
        for place, (key, made) in enumerate(reversed([*self._kept.items()])):
            channel = made.participants, made.options.channel
            if place < MAX_KEPT and (channel in channels or len(channels) < MAX_CHANNELS):
                channels.add(channel)
            else:
                gone.append(self._kept.pop(key))
        return gone

    def note_written(self, written: tuple[int | str, ...], made: Any, given: Hashable) -> None:
        """Let ``as_written`` find what is kept. A group among the arguments is this one, and is not held."""
        with self._lock:
            if len(self.as_written) >= MAX_KEPT:
                self.as_written.clear()
            self.as_written[written] = made, given

    def clear(self) -> None:
        """Forget what was kept for one-shot calls."""
        with self._lock:
            self._kept.clear()
            self.as_written.clear()


@cache
def _contexts() -> "weakref.WeakKeyDictionary[Any, GroupContext]":
    """The contexts of this process's groups, which torch's group objects cannot hold themselves."""
    return weakref.WeakKeyDictionary()


@cache
def _making() -> threading.Lock:
    return threading.Lock()


def context_of(group: Any) -> GroupContext:
    """Return the context of a process group, the same for as long as the group object lives."""
    contexts = _contexts()
    found = contexts.get(group)
    if found is None:
        with _making():
            found = contexts.get(group)
            if found is None:
                found = contexts[group] = GroupContext(group)
    return found


def resolve_group(group: Any) -> Any:
    """Return the process group, the default one for None.

    Raises:
        SpecError: there is none, it was destroyed, or this process is not in it.
    """
    if group is None and HAS_GROUPS and (default := dist.group.WORLD) is not None:
        return default
    if dist.is_available() and group is dist.GroupMember.NON_GROUP_MEMBER:
        raise SpecError("this process is not in the given group; only its ranks may call")
    if dist.is_available() and isinstance(group, dist.ProcessGroup):
        if _is_destroyed(group):
            raise SpecError(
                f"group={group!r} was destroyed (destroy_process_group); pass one that is there, on all of its ranks"
            )
        return group
    if not dist.is_available() or not dist.is_initialized():
        remedy = "call torch.distributed.init_process_group first, or run all ranks here with tricomm.LocalTransport"
        raise SpecError(f"there is no process group; {remedy}")
    raise ArgumentError(f"group={shown(group)} is not a process group; pass what new_group gave, or None")


def _is_destroyed(group: Any) -> bool:
    """Whether torch has forgotten a group that had a name; others without a name are of those who make their own."""
    if type(group) is not dist.ProcessGroup:
        return False
    try:
        name = group.group_name
    except RuntimeError:
        return False
    if not name:
        return False
    try:
        return dist.distributed_c10d._resolve_process_group(name) is not group
    except RuntimeError:
        return True


def is_whole_job(group: Any) -> bool:
    """Whether the ranks of a group are those of the whole job, by which torch's meshes name them."""
    return dist.is_available() and dist.is_initialized() and group is dist.group.WORLD


def default_device(group: Any) -> torch.device:
    """Where tensors are expected when nobody says: the current CUDA device if the group has NCCL, else host memory."""
    if torch.cuda.is_available() and _has_nccl(group):
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def _has_nccl(group: Any) -> bool:
    try:
        # The configuration, as get_backend says "undefined" of a group that was made without naming one.
        return "cuda:nccl" in dist.get_backend_config(group).split(",")
    except (TypeError, ValueError):  # a group that torch has no record of
        return torch.device("cuda") in group._device_types


def device_of(device: torch.device | str | None, group: Any) -> torch.device:
    """The device that somebody asks for, with its index ("cuda" is the current one), or the default one for None.

    Raises:
        SpecError: this machine does not have it, or it has no memory that can be moved.
    """
    return default_device(group) if device is None else device_here(torch.device(device))
