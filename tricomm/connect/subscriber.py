"""Subscriber: what a server takes weights with, from a trainer that comes, goes and starts again as it likes."""

import logging
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import suppress
from datetime import timedelta
from typing import Unpack

import torch

from tricomm.connect.agreement import gathered
from tricomm.connect.feeds.feed import Feed, part
from tricomm.connect.meeting.client import AbsentError
from tricomm.connect.pairing import Paired
from tricomm.connect.told.agreed import DifferenceError
from tricomm.errors import SpecError, TransportError
from tricomm.kinds import checks_kinds
from tricomm.layout.spec import ShardingSpec
from tricomm.options import Options, ReshardOptions

LOG = logging.getLogger("tricomm")
PULL, ADOPT, LOST, NOTHING = "pull", "adopt", "lost", "nothing"
LONGEST_PAUSE_SECONDS = 0.05
PATIENCE_SECONDS = 30.0
"""After which a server that waits for its trainer begins anew, unless it was closed."""

FIRST_RETRY_SECONDS = 0.05
LONGEST_RETRY_SECONDS = 2.0
"""Between attempts to meet a trainer that fail, as they do while ranks of one side say different things."""

ADOPT_SECONDS = 10.0
"""In which a rank has met a trainer that rank 0 has met, or has failed to."""


class Subscriber(Paired):
    """Take versions of tensors from a trainer, in place, between two batches.

    Every rank of the job makes one, and calls ``poll`` as often as the others: rank 0 decides, so that all take a
    version in the same call. The trainer is met in the background, and met anew when it or this job has started again.

    Args:
        address, secret: of the meeting.
        side: this job's.
        side_rank, side_size: this rank, and how many there are.
        source: the trainer's side (see :class:`tricomm.Publisher`).
        specs: of the tensors, on the ranks of this job; shape and dtype may be left out.
        out: this rank's tensors by name, which are written.
        timeout_seconds: for the ranks of this job to come, and for each move.
        device, host: see ``connect``.
        options: of the moves: those of :class:`tricomm.Options`. ``rules`` say how these tensors are made of the
            trainer's; they are told, and left out where the trainer tells them.

    Raises:
        TransportError: a rank of this job did not come in time.

    Example:
        >>> from tricomm import Mesh, Shard
        >>> from tricomm.connect.meeting.server import Meeting
        >>> secret = "a secret of one example"
        >>> specs, out = {"w": ShardingSpec(Mesh([0], ("x",)), (Shard(0),))}, {"w": torch.zeros(4)}
        >>> with Meeting("tcp://127.0.0.1:0", secret=secret) as meeting, Subscriber(
        ...     meeting.address, side="server", side_rank=0, side_size=1, source="trainer", specs=specs, out=out,
        ...     secret=secret, device="cpu"
        ... ) as subscriber:
        ...     print(subscriber.poll(), subscriber.version)
        None None
    """

    @checks_kinds
    def __init__(
        self,
        address: str,
        *,
        side: str,
        side_rank: int,
        side_size: int,
        source: str,
        specs: Mapping[str, ShardingSpec],
        out: Mapping[str, torch.Tensor | None],
        secret: str | bytes,
        host: str | None = None,
        **options: Unpack[ReshardOptions],
    ) -> None:
        if not source or source == side:
            raise SpecError(f"source={source!r} must be the name of another side than {side!r}; name the trainer's")
        chosen = Options.of(options, "Subscriber")
        self._side, self._source = side, source
        self._sizes: dict[str, int | None] = {source: None, side: side_size}
        self._out = dict(out)
        self.version: int | None = None
        """That this rank's tensors are; None is none, or a mix."""
        self.dirty = ""
        """Why they are a mix; "" if they are not."""
        super().__init__(gathered(address, side, side_rank, side_size, secret, host, chosen), specs)
        self._feed: Feed | None = None
        self._told = ""
        """Why the trainer was lost last, which is logged once."""
        self._is_closed = threading.Event()
        self._coming: Future[Feed] = self._meet(None)

    def poll(self) -> int | None:
        """Take the version that the trainer pushes, if it has started to push one; return it, or None. Does not wait
        for a trainer that does nothing.

        ::

            while True:
                if subscriber.poll() is not None:
                    print(f"serving version {subscriber.version}")
                serve_one_batch()

        Raises:
            TransportError: the push failed, and the tensors are a mix until another is taken; or a rank of this job
                died, after which every call raises it and all ranks of the job make a new Subscriber; or the trainer
                cannot be met, as it has other versions or tells other rules.
        """
        what = self._agreement.decide(self._choice)
        if what == ADOPT:
            with suppress(FutureTimeoutError):  # it failed here, and the epoch is over
                self._feed = self._coming.result(timeout=ADOPT_SECONDS)
        elif what == LOST:
            self._drop()
        elif what == PULL and self._feed is not None:
            return self._pull(self._feed)
        return None

    def wait(self, timeout_seconds: float | timedelta) -> int:
        """Poll until a version has been taken; return it.

        ::

            subscriber.wait(timeout_seconds=600)  # before the first batch

        Raises:
            TransportError: as ``poll``, or none came in time.
        """
        seconds = Options(timeout_seconds=timeout_seconds).seconds
        deadline, pause = time.monotonic() + seconds, 0.001
        while (version := self.poll()) is None:
            if self._agreement.decide(lambda: str(time.monotonic() > deadline)) == "True":
                raise TransportError(f"side {self._source!r} pushed no version within {seconds:.1f} s")
            time.sleep(pause)
            pause = min(1.5 * pause, LONGEST_PAUSE_SECONDS)
        return version

    def _choice(self) -> str:
        """As rank 0: what to do now."""
        if self._feed is None:
            return ADOPT if self._coming.done() else NOTHING
        try:
            return NOTHING if self._feed.offered() is None else PULL
        except TransportError as error:
            if str(error) != self._told:
                LOG.warning("%s", error)
            self._told = str(error)
            return LOST

    def _pull(self, feed: Feed) -> int | None:
        try:
            offer = feed.pull(self._out)
            return None if offer is None else offer.version
        finally:
            self.version, self.dirty = feed.held, feed.dirty
            with suppress(TransportError):
                feed.ready()

    def _drop(self) -> None:
        """Forget a trainer that is gone, and wait for the next one."""
        before, self._feed = self._feed, None
        if before is not None:
            self._coming = self._meet(before)

    def _meet(self, before: Feed | None) -> "Future[Feed]":
        """Begin to wait for the trainer, on a thread of its own."""
        found: Future[Feed] = Future()

        def run() -> None:
            try:
                found.set_result(self._met(before))
            except BaseException as error:
                found.set_exception(error)

        threading.Thread(target=run, name="tricomm-meet", daemon=True).start()
        return found

    def _met(self, before: Feed | None) -> Feed:
        if before is not None:
            part(before)
        told, pause = "", FIRST_RETRY_SECONDS
        while True:
            try:
                world = self._connect(side_sizes=self._sizes, timeout_seconds=PATIENCE_SECONDS)
            except AbsentError:
                if self._is_closed.is_set():
                    raise
                continue
            try:
                feed = self._feed_between(world, self._source, self._side, self._options.seconds, before)
                feed.ready()
            except TransportError as error:
                world.close()
                if self._is_closed.is_set() or isinstance(error, DifferenceError):
                    raise
                if str(error) != told:
                    LOG.warning("%s; side %r goes on trying to meet side %r", error, self._side, self._source)
                told = str(error)
                self._is_closed.wait(pause)
                pause = min(2 * pause, LONGEST_RETRY_SECONDS)
            else:
                return feed

    def close(self) -> None:
        """Leave in peace.

        ::

            subscriber.close()  # or use it as ``with Subscriber(...) as subscriber:``
        """
        self._is_closed.set()
        if self._feed is not None:
            part(self._feed)
        self._agreement.world.close()
