"""World: the ranks of separate jobs as one process group, from one meeting to the end of its epoch."""

import time
import weakref
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import timedelta
from typing import Self, Unpack

import torch
import torch.distributed as dist

from tricomm.connect.appointment import Appointment, check_name, checked_sizes, default_device
from tricomm.connect.meeting.client import Client
from tricomm.connect.meeting.handshake import checked_secret
from tricomm.connect.meeting.join import (
    Missing,
    Paired,
    Refused,
    Status,
)
from tricomm.connect.meeting.server import parse_address
from tricomm.connect.store import EpochStore
from tricomm.connect.told.agreed import Told
from tricomm.connect.told.exchange import Exchange, Known
from tricomm.connect.told.maps import Map
from tricomm.connect.told.specs import placed
from tricomm.errors import SpecError, TransportError
from tricomm.kinds import checks_kinds
from tricomm.layout.spec import ShardingSpec
from tricomm.layout.topology import Rates, Topology
from tricomm.options import Options
from tricomm.transport.accelerator import device_here
from tricomm.transport.coordination.store import store_errors
from tricomm.transport.group import context_of

MAX_KNOWN = 64
"""So many layouts and rules are remembered for the next epoch."""


class World(dist.ProcessGroup):
    """The ranks of separate jobs as one process group, which every call of tricomm takes as ``group=``.

    :func:`tricomm.connect` makes it. It is one *epoch*: ranks and sizes never change. When a rank dies or leaves, the
    epoch is over, every call in it raises a TransportError that names that rank, and :meth:`renew` gives the next one,
    for which Resharders are made anew. Neither the default group of the job nor its environment is used or changed.

    torch.distributed takes it too, as an object: ``dist.all_reduce(tensor, group=world)`` works after
    :meth:`enable_collectives`. It has no global ranks, so ask ``world.rank()``, not ``dist.get_rank(world)``, and write
    ``group_src=``, not ``src=``.

    Attributes:
        side, side_rank: who this rank is.
        side_sizes: of each side. The ranks of the first side come first, then those of the second, and so on.
        epoch: 1 for the first of these sides at this meeting.
        hosts: of each rank.

    Example:
        >>> from tricomm.connect.meeting.server import Meeting
        >>> secret = "a secret of one example"
        >>> meeting = Meeting("tcp://127.0.0.1:0", secret=secret)
        >>> first = connect(meeting.address, side="trainer", side_rank=0, side_sizes={"trainer": 1}, secret=secret)
        >>> second = first.renew()
        >>> second.epoch, second.ranks_of("trainer")
        (2, (0,))
        >>> second.close(), meeting.close()
        (None, None)
    """

    def __init__(self, appointment: Appointment, client: Client, paired: Paired) -> None:
        self.side = appointment.side
        self.side_rank = appointment.side_rank
        self.side_sizes: dict[str, int] = dict(paired.sides)
        self.epoch = paired.number
        self.hosts = paired.hosts
        self._appointment = appointment
        self._client = client
        self._store = EpochStore(client, paired.serial)
        self._over = ""
        self._exchanges = 0
        self._known: Known = {}
        super().__init__(self.ranks_of(self.side)[self.side_rank], len(paired.hosts))  # type: ignore[call-arg]
        client.watch = _watcher(weakref.ref(self))

    def get_group_store(self) -> EpochStore:
        """Return the store of the epoch, as torch's groups do.

        ::

            world.get_group_store().set("my project/seed", "17")
            world.get_group_store().get("my project/seed")  # b"17", on any rank
        """
        return self._store

    @property
    def _device_types(self) -> list[torch.device]:
        """Where tensors are expected, which torch's groups say so too."""
        return [torch.device(self._appointment.device.type)]

    @checks_kinds
    def ranks_of(self, side: str) -> tuple[int, ...]:
        """Return the ranks of a side.

        ::

            mesh = Mesh(world.ranks_of("server"), ("tp",))

        Raises:
            SpecError: there is no such side.
        """
        first = 0
        for name, size in self.side_sizes.items():
            if name == side:
                return tuple(range(first, first + size))
            first += size
        raise SpecError(f"side {side!r} is none of {list(self.side_sizes)}; name one of them")

    def topology(self, **rates: Unpack[Rates]) -> Topology:
        """Return the hosts of all sides; the rates are those of :class:`tricomm.Topology`.

        ::

            topology = world.topology(nic_bytes_per_second=50e9)
            mover = tricomm.Resharder(source, destination, group=world, topology=topology)
        """
        return Topology(self.hosts, **rates)

    @property
    def over(self) -> str:
        """Why the epoch is over, as far as this rank has heard, which takes up to a second; "" while it is not.

        ::

            while not world.over:
                train_one_step()
            world = world.renew()
        """
        return self._over or self._client.connection.broken

    @checks_kinds
    def renew(
        self, timeout_seconds: float | timedelta | None = None, side_sizes: Mapping[str, int | None] | None = None
    ) -> "World":
        """Pair anew, and return the next epoch. All ranks of all sides must, those that started again by ``connect``.

        This epoch is over then, if it was not before.

        ::

            try:
                mover(tensors)
            except tricomm.TransportError:  # a rank of another job died, and is started again
                world = world.renew()
                mover = tricomm.Resharder(source, destination, group=world)

        Args:
            timeout_seconds: for all to come; None is what ``connect`` was told.
            side_sizes: of the next epoch; None takes this side's, and what the others say.

        Raises:
            TransportError: they did not come, or say what contradicts this rank.
        """
        before = self._appointment
        if side_sizes is None:
            side_sizes = {name: size if name == self.side else None for name, size in before.side_sizes.items()}
        again = before._replace(side_sizes=checked_sizes(side_sizes, self.side))
        found = _meet(again, self._client, self._seconds(timeout_seconds))
        found._known = dict(list(self._known.items())[-MAX_KNOWN:])
        return found

    @checks_kinds
    def exchange(
        self,
        specs: Mapping[str, ShardingSpec],
        timeout_seconds: float | timedelta | None = None,
        *,
        rules: Mapping[tuple[str, str], Map] | None = None,
    ) -> Told:
        """Tell the other sides the layouts of this side's tensors, and return those of all, on ranks of the group.

        Every rank of every side calls it, so that nobody needs the configuration of another job. A side with no tensors
        gives {}. After ``renew``, what was known before is not sent again.

        ::

            specs = world.exchange(my_specs)
            mover = tricomm.Resharder(specs["trainer"], specs["server"], group=world)
            told = world.exchange(my_specs, rules={("trainer", "server"): my_rules})  # told.rules, on all ranks

        Args:
            specs: by name, on the ranks of this side from 0, as if there were no other; equal on all ranks of it.
            timeout_seconds: for all to call; None is what ``connect`` was told.
            rules: how the tensors of one side are made of those of another, by (source, destination), one of which is
                this side. One of the two says it; if both do, it must mean the same.

        Returns:
            {side: {name: spec}}, this side's too, and in ``.rules`` what was told of rules. Give it whole to
            :class:`tricomm.Feed`.

        Raises:
            SpecError: a layout names a rank that the side has not, or there is more than can be told.
            TransportError: a rank says another thing than its side's rank 0, or did not come in time, or two sides tell
                different rules.
        """
        own = self.ranks_of(self.side)
        placed(specs, own[0], self.side, len(own))
        for one, other in rules or {}:
            self.ranks_of(one), self.ranks_of(other)
            if one == other or self.side not in (one, other):
                raise SpecError(
                    f"rules are given from side {one!r} to {other!r}, and this is side {self.side!r}; tell those "
                    "between this side and another"
                )
        seconds = self._seconds(timeout_seconds)
        self._exchanges += 1
        exchange = Exchange(
            self._store,
            self._exchanges,
            self.side,
            self.side_rank,
            self.side_sizes,
            time.monotonic() + seconds,
        )
        with store_errors():
            found = exchange.run(specs, rules or {}, self._known)
        sizes = self.side_sizes
        return Told(
            {side: placed(told, self.ranks_of(side)[0], side, sizes[side]) for side, told in found.items()}, found.rules
        )

    def _seconds(self, timeout_seconds: float | timedelta | None) -> float:
        """Return a timeout as a number; None is what ``connect`` was told."""
        given = self._appointment.timeout_seconds if timeout_seconds is None else timeout_seconds
        return Options(timeout_seconds=given).seconds

    def refresh(self) -> str:
        """Ask the meeting how the epoch stands now, and return ``over``.

        ::

            if world.refresh():
                world = world.renew()
        """
        with suppress(TransportError):
            self._hear(self._client.poll())
        return self.over

    @checks_kinds
    def peek(self, side_sizes: Mapping[str, int | None], name: str = "") -> Missing:
        """Return who of other sides is not waiting for this rank at the meeting now, without coming there itself.

        ::

            missing = world.peek({"trainer": 4, "server": None})
            print(missing if missing.places else "all servers are waiting")

        Args:
            side_sizes, name: as ``connect`` would be told.

        Raises:
            TransportError: the meeting is gone.
        """
        sizes = checked_sizes(side_sizes, self.side)
        return self._client.peek(self._appointment._replace(side_sizes=sizes, name=name).join())

    def enable_collectives(self) -> None:
        """Connect all ranks for torch.distributed's own calls with ``group=world``; every rank calls it, once.

        tricomm needs it not: its calls connect those ranks that exchange data.

        ::

            world.enable_collectives()
            dist.all_reduce(tensor, group=world)
        """
        timeout = timedelta(seconds=self._appointment.timeout_seconds)
        store = dist.PrefixStore("collectives", self._store)
        kinds = dist.ProcessGroup.BackendType
        on_host = dist.ProcessGroupGloo(dist.PrefixStore("gloo", store), self.rank(), self.size(), timeout)
        self._register_backend(torch.device("cpu"), kinds.GLOO, on_host)
        self._set_default_backend(kinds.GLOO)
        if self._appointment.device.type == "cuda":
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = timeout
            on_device = dist.ProcessGroupNCCL(dist.PrefixStore("nccl", store), self.rank(), self.size(), options)
            self._register_backend(self._appointment.device, kinds.NCCL, on_device)
            self._set_default_backend(kinds.NCCL)

    def close(self) -> None:
        """Leave in peace: the other ranks finish what they are in, and may pair anew without this one.

        ::

            world.close()  # or use it as ``with connect(...) as world:``
        """
        self._over = self._over or f"rank {self.rank()} has closed its group of epoch {self.epoch}"
        self._client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __repr__(self) -> str:
        sides = ", ".join(f"{name}: {size}" for name, size in self.side_sizes.items())
        return f"<World of {sides}; epoch {self.epoch}, rank {self.rank()}: rank {self.side_rank} of {self.side!r}>"

    def _hear(self, status: Status) -> None:
        """Take what the meeting says, on the client's thread."""
        if isinstance(status, Refused):
            self._over = self._over or status.text
        elif isinstance(status, Paired) and status.number == self.epoch:
            for rank, text in status.left.items():
                context_of(self).dead.setdefault(rank, text)


def _watcher(reference: "weakref.ref[World]") -> Callable[[Status], None]:
    def watch(status: Status) -> None:
        world = reference()
        if world is not None:
            world._hear(status)

    return watch


@checks_kinds
def connect(
    address: str,
    *,
    side: str,
    side_rank: int,
    side_sizes: Mapping[str, int | None],
    secret: str | bytes,
    timeout_seconds: float | timedelta = 300.0,
    device: torch.device | str | None = None,
    name: str = "",
    host: str | None = None,
    on_waiting: Callable[[Missing], object] | None = None,
) -> World:
    """Meet the ranks of other jobs, and return the group of all.

    Every rank of every side calls it, in any order and at any time within the timeout. Somebody listens at the address:
    a :class:`tricomm.Meeting` in one of the processes, or ``python -m tricomm meet``. Versions of tricomm, torch and
    NCCL, device and byte order are compared first. Sides are equal; a job that feeds several fleets meets each by a
    call of its own, so that none waits for another, and a fleet may come late.

    Args:
        address: "tcp://host:port".
        side: which job this rank is of.
        side_rank: which rank of it, from 0.
        side_sizes: how many ranks each side has, in the order in which their ranks follow each other in the group, the
            same on all ranks. None is what that side says of itself.
        secret: of the meeting.
        timeout_seconds: for all to come.
        device: where tensors live; None is host memory, or the current CUDA device where there is one.
        name: tells meetings of the same sides apart.
        host: what this machine is called in ``World.topology``; None is its own name.
        on_waiting: called, from this thread, with whom it waits for, after two seconds, when that changes, and again
            each time that it has waited twice as long. It is logged too.

    Raises:
        TransportError: a rank did not come in time, came twice, has other versions or says other sizes; the secret is
            wrong; or nobody listens.
        SpecError: a side or rank that is none; an ArgumentError where an argument is of the wrong kind.

    Example:
        >>> from tricomm.connect.meeting.server import Meeting
        >>> secret = "a secret of one example"
        >>> with Meeting("tcp://127.0.0.1:0", secret=secret) as meeting:
        ...     sizes = {"trainer": 1}
        ...     world = connect(meeting.address, side="trainer", side_rank=0, side_sizes=sizes, secret=secret)
        ...     print(world)
        ...     world.close()
        <World of trainer: 1; epoch 1, rank 0: rank 0 of 'trainer'>
    """
    parse_address(address)
    sizes = checked_sizes(side_sizes, side)
    own = sizes[side] or 0
    if not 0 <= side_rank < own:
        raise SpecError(f"side_rank={side_rank!r} is none of the {own} ranks of side {side!r}; use 0 to {own - 1}")
    if host == "":
        raise SpecError("host='' names no machine; leave it out for the name that this one has")
    check_name("host", host or "")
    check_name("name", name)
    chosen = Options(timeout_seconds=timeout_seconds, device=device, name=name)
    where = device_here(chosen.device) if isinstance(chosen.device, torch.device) else default_device()
    given = Appointment(
        address, checked_secret(secret), side, side_rank, sizes, where, host, name, chosen.seconds, on_waiting
    )
    return _meet(given, None, chosen.seconds)


def _meet(appointment: Appointment, client: Client | None, seconds: float) -> World:
    return World(appointment, *appointment.keep(client, time.monotonic() + seconds))
