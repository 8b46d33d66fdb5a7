"""What the calls of a feed return, and how its moves end."""

from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any, NamedTuple

import torch

from tricomm.errors import SpecError, TransportError, TricommError
from tricomm.kinds import explains_kinds
from tricomm.options import MAX_TIMEOUT_SECONDS
from tricomm.transport.handle import Handle

FENCE, SNAPSHOT = "fence", "snapshot"


class Latest(NamedTuple):
    """What the destination of a feed holds.

    Attributes:
        version: that was published last; None is none.
        dirty: why its tensors are not that version now: a push is under way, or failed. "" if they are.

    Example:
        >>> Latest(7, "the push of version 8 is under way").version
        7
    """

    version: int | None
    dirty: str


class Push:
    """A call of :meth:`Feed.push` on a rank of the source.

    Attributes:
        version: that it brings.
        is_started: whether it began. One that did is never skipped.
        skipped: why it did not begin; "" if it did.
        snapshot_nbytes: memory of this rank that holds a copy of its tensors, kept by the feed for the next push.

    Example:
        >>> push = Push(7, "1 of 3 ranks are ready, but not ranks 3-4")
        >>> push.is_started, push.wait()
        (False, False)
    """

    @explains_kinds
    def __init__(
        self,
        version: int,
        skipped: str,
        handles: tuple[Handle[Any], ...] = (),
        outcome: "Future[str] | None" = None,
        snapshot_nbytes: int = 0,
    ) -> None:
        self.version = version
        self.skipped = skipped
        self.is_started = not skipped
        self.snapshot_nbytes = snapshot_nbytes
        self._handles = () if snapshot_nbytes else handles
        self._outcome = outcome

    def wait_source(self) -> None:
        """Return when the tensors that were pushed may change: at once after a snapshot, else when all is sent.

        On a GPU the host goes on before, and what it queues on the current stream runs afterwards.

        ::

            push = feed.push(model.state_dict(), version=step)
            loss.backward()  # reads parameters only
            push.wait_source()
            optimizer.step()
        """
        for handle in self._handles:
            handle.wait_source()

    def done(self) -> bool:
        """Whether wait() would return, or raise, at once.

        >>> Push(7, "1 of 3 ranks are ready, but not ranks 3-4").done()
        True
        """
        return self._outcome is None or self._outcome.done()

    def wait(self) -> bool:
        """Return when it is published, true; or false at once if it was skipped.

        Raises:
            TransportError: it failed. The destination's tensors are a mix until another push is published.

        Example:
            >>> Push(7, "1 of 3 ranks are ready, but not ranks 3-4").wait()  # skipped, which is no error
            False
        """
        if self._outcome is None:
            return False
        failure = self._outcome.result()
        if failure:
            raise TransportError(f"the push of version {self.version} failed: {failure}")
        return True


class Telling:
    """Fails the push for everybody if its block ends by an exception.

    Args:
        settle: votes against it, for a reason.
        rank: this one.
    """

    def __init__(self, settle: Callable[[str], str], rank: int) -> None:
        self._settle = settle
        self._rank = rank

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: object) -> None:
        if error is not None:
            self._settle(f"rank {self._rank}: {type(error).__name__}: {error}")


def failure_of(handles: tuple[Handle[Any], ...]) -> str | None:
    """Wait until all have ended, and return why the first that failed did."""
    found = None
    for handle in handles:
        try:
            handle.check()
        except TricommError as error:
            found = found or str(error)
        except Exception as error:
            found = found or f"{type(error).__name__}: {error}"
    return found


class Snapshot:
    """Copies of a rank's tensors, kept from one push to the next.

    Example:
        >>> kept, weight = Snapshot(), torch.ones(2)
        >>> copies = kept.of({"w": weight, "not here": None})
        >>> _ = weight.zero_()
        >>> copies["w"], kept.nbytes
        (tensor([1., 1.]), 8)
    """

    def __init__(self) -> None:
        self._copies: dict[str, torch.Tensor] = {}

    def of(self, tensors: Mapping[str, torch.Tensor | None]) -> dict[str, torch.Tensor | None]:
        """Copy tensors by name; what is None stays so."""
        return {name: None if tensor is None else self._copied(name, tensor) for name, tensor in tensors.items()}

    @property
    def nbytes(self) -> int:
        """Memory that the copies take."""
        return sum(tensor.nbytes for tensor in self._copies.values())

    def _copied(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        kept = self._copies.get(name)
        if kept is None or kept.shape != tensor.shape or kept.dtype != tensor.dtype or kept.device != tensor.device:
            kept = self._copies[name] = torch.empty_like(tensor, requires_grad=False)
        return kept.copy_(tensor)


def check_version(version: int, base_version: int | None, beside: str, wait_seconds: float) -> None:
    """Check what a push says of itself.

    Raises:
        SpecError: a value that breaks a rule.
    """
    for name, value in (("version", version), ("base_version", base_version)):
        if value is not None and value < 0:
            raise SpecError(f"{name}={value} must be at least 0; count steps")
    if beside not in (FENCE, SNAPSHOT):
        raise SpecError(f'beside={beside!r} is neither "fence" nor "snapshot"; choose one')
    if not 0 <= wait_seconds <= MAX_TIMEOUT_SECONDS:
        raise SpecError(
            f"wait_seconds={wait_seconds!r} must be from 0 to {MAX_TIMEOUT_SECONDS:.0e}; give the seconds for which a "
            "fleet may keep the trainer waiting"
        )
