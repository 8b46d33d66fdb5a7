"""Subgroups: which communicators there are among some ranks of another one. The same on all ranks.

Every rank of the whole knows of all groups of a plan, and makes the same calls in the same order. So also those that a
rank is no member of are counted, and all agree which one is made next, and which one goes.
"""

from collections.abc import Callable

from tricomm.plan.routes.one_call import MAX_GROUPS, Group, members
from tricomm.transport.accelerator import DeviceBackend

Make = Callable[[int, Group], DeviceBackend]
"""Connects some ranks, sorted, this one among them; told how many groups were made before, by anybody."""


class Subgroups:
    """See above: as many as MAX_GROUPS, those used last.

    Args:
        rank: this one.
        whole: all ranks, sorted.
        backend: of all ranks, which a group of all of them uses.
    """

    def __init__(self, rank: int, whole: Group, backend: DeviceBackend) -> None:
        self._rank, self._whole, self._backend = rank, whole, backend
        self._kept: dict[Group, DeviceBackend | None] = {}
        self._made = 0
        self._required: tuple[Group, ...] = ()
        self._of_groups: dict[Group, tuple[DeviceBackend, int]] = {}

    @property
    def are_there(self) -> bool:
        """Whether any was ever made with this rank."""
        return any(backend is not None for backend in self._kept.values())

    def require(self, groups: tuple[Group, ...], make: Make, drop: Callable[[DeviceBackend], None]) -> None:
        """Have those of some groups, at most of MAX_GROUPS sets of ranks, and no others for now.

        Args:
            groups: each with its sender first.
            make, drop: a communicator that is not there yet; one that was used longest ago.
        """
        if groups == self._required:
            return  # they are those used last
        wanted = [ranks for ranks in dict.fromkeys(map(members, groups)) if ranks != self._whole]
        self._required, self._of_groups = (), {}
        for ranks in wanted:
            if ranks in self._kept:
                self._kept[ranks] = self._kept.pop(ranks)
        for ranks in wanted:
            if ranks not in self._kept:
                self._make_room(drop)
                self._made += 1
                self._kept[ranks] = make(self._made, ranks) if self._rank in ranks else None
        for group in groups:
            ranks = members(group)
            backend = self._backend if ranks == self._whole else self._kept[ranks]
            if backend is not None:
                self._of_groups[group] = backend, ranks.index(group[0])
        self._required = groups

    def _make_room(self, drop: Callable[[DeviceBackend], None]) -> None:
        while len(self._kept) >= MAX_GROUPS:
            backend = self._kept.pop(next(iter(self._kept)))
            if backend is not None:
                drop(backend)

    def backend_of(self, group: Group) -> tuple[DeviceBackend, int] | None:
        """The communicator of a group that is required, and the place of its sender; None for any other."""
        return self._of_groups.get(group)
