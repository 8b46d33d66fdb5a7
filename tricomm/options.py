"""The options that reshard, reshard_async, Resharder, and the Links and Executors of pipelines share.

Each of them takes its options by keyword, typed, so that mypy and editors refuse a misspelt one; whoever does not run
mypy is told the nearest right name. What was given becomes one value, :class:`Options`, checked once.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import timedelta
from functools import cache, wraps
from typing import Any, Literal, TypedDict, TypeVar, cast, get_args, get_type_hints

import torch

from tricomm.errors import ArgumentError, SpecError, check_text, describe_unknown, shown
from tricomm.hooks import Hooks
from tricomm.interop import read_placement
from tricomm.layout.placement import Partial, Replicate, Shard
from tricomm.layout.topology import Topology
from tricomm.plan import DEFAULT_STAGING_BYTES, Auto, SenderPolicy, Split, Strategy
from tricomm.plan.arguments import check_balance, check_staging_bytes, check_strategy, check_topology
from tricomm.rules import BoundRules, Rules
from tricomm.stats import Progress

OptionsType = TypeVar("OptionsType")

ProgressCallback = Callable[[Progress], object]
"""What ``progress`` is."""

TransportName = Literal["auto", "network", "memory"]

DEFAULT_TRANSPORT: TransportName = "auto"

DEFAULT_TIMEOUT_SECONDS = 300.0

MAX_TIMEOUT_SECONDS = 1e9
"""The longest timeout, some 31 years; deadlines in nanoseconds would not hold ten times as much."""

NO_FRILLS: Any = {
    "differentiable": False,
    "grad_placements": None,
    "progress": None,
    "checksum": False,
    "hooks": None,
    "stays_in_place": False,
}
"""Options of what a Resharder needs for itself."""


class PlanOptions(TypedDict, total=False):
    """Options that decide the plan; see :class:`Options`."""

    strategy: Strategy | Auto
    balance: SenderPolicy
    topology: Topology | None
    staging_bytes: int


class StageOptions(PlanOptions, total=False):
    """Options of a ReshardStage, which takes its device by itself; see :class:`Options`."""

    group: Any
    timeout_seconds: float | timedelta
    timeout: timedelta
    confirm: bool | None
    transport: TransportName


class LinkOptions(StageOptions, total=False):
    """Options of a Link or Executor, which choose ``channel`` and ``name`` themselves; see :class:`Options`."""

    device: torch.device | str | None


class ReshardOptions(LinkOptions, total=False):
    """Options of reshard, reshard_async and Resharder; see :class:`Options`."""

    channel: str
    name: str
    rules: Rules | BoundRules | None
    differentiable: bool
    grad_placements: Sequence[Any] | None
    progress: ProgressCallback | None
    checksum: bool
    hooks: Hooks | None
    stays_in_place: bool


def _explains_names(cls: type[OptionsType]) -> type[OptionsType]:
    """Let a dataclass of options name what an unknown name means, and take ``timeout`` as its callers do."""
    init: Callable[..., None] = cls.__init__

    @wraps(init)
    def explained(self: OptionsType, *unnamed: Any, **given: Any) -> None:
        try:
            init(self, *unnamed, **given)
        except ArgumentError:
            raise
        except TypeError:
            if unnamed:
                raise ArgumentError(
                    f"{cls.__name__}({shown(unnamed[0])}): options are named; write name=value"
                ) from None
            init(self, **_known_values(given, cls.__name__, ReshardOptions))

    cls.__init__ = explained  # type: ignore[assignment]
    return cls


@_explains_names
@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How a tensor is resharded, beside what and where to.

    Args:
        strategy: how elements travel.
        balance: which holder sends.
        topology: hosts and rates; None puts every rank on a host of its own, and all on one where ``transport`` is
            "memory".
        staging_bytes: the most that one rank may hold in packed chunks.
        group: the process group whose ranks the meshes name; None is the default one.
        device: where tensors live; None is host memory, or the current CUDA device if the group has NCCL.
        timeout_seconds: how long a call may wait for another rank: a number of seconds, or a timedelta. (The keyword
            ``timeout`` takes a timedelta too, as in torch.)
        confirm: whether a call returns only when all ranks have what they need, so that a failure anywhere raises
            everywhere and a failed call can be repeated: without it a rank that was done goes on to its next step,
            which would then meet the repeated one. It costs a barrier. None is True for reshard and reshard_async, and
            False for a Resharder.
        channel: Resharders between the same ranks that name different channels have communicators and a background
            thread of their own: their runs neither wait for each other nor need one order on all ranks. Those of
            one-shot calls stay connected on the 32 channels of a rank that were used last.
        name: what the calls are about, such as "layer 3"; stands in errors, and tells apart what is otherwise alike.
        rules: how the tensors of the destination are made of those of the source, where names, fusions, orders,
            paddings or shapes differ: each side then has its own names. What travels are the pieces that ranks need,
            straight from shards into shards. See :mod:`tricomm.rules`.
        differentiable: whether gradients come back between ranks that hold different things: all ranks of either mesh
            make the calls with gradients on, in one order, and end with :func:`tricomm.backward`. The order in which a
            backward pass reaches the calls of one Resharder counts as the order of calls: it is to be the same too.
        transport: "auto", the default, reads the sender's memory where two ranks are on one host and may (on GPUs by
            CUDA IPC), and takes the network elsewhere; "network" takes it between all ranks; "memory" raises where two
            ranks cannot read. ``Resharder.transports`` tells what was found. All ranks give the same.
        grad_placements: how the gradient of the result lies on its mesh, one placement per axis: as the result by
            default, where replicas are taken for equal; Partial() on an axis of replicas has them summed on the way.
        progress: called with a :class:`tricomm.Progress` as a call goes on, on the thread that moves; what it raises
            ends the call on all ranks. None calls nothing.
        checksum: whether each call ends with a comparison of digests of both sides, by the bits of every element and
            where it belongs: a TransportError on all ranks then names a tensor and the two ranks that differ. What
            rules fill in is looked at too; of what a rank holds several times, the first.
        hooks: what this rank does with its tensors before they are sent and after modules have come; see
            :class:`tricomm.Hooks`.
        stays_in_place: whether every call of a Resharder has the source tensors of the first one, where they were (as
            with CUDA graphs); others are refused before anything is sent. Ranks whose GPUs may read each other then
            pull straight out of them, in one launch and without packing, as ``Resharder.transports`` tells. Elsewhere
            it is checked, and buys nothing. Their memory is kept until all ranks have closed it. One-shot calls, which
            have no later ones, leave it aside. All ranks give the same.

    Raises:
        SpecError: a value that breaks a rule; an ArgumentError if it is of the wrong kind.

    Example:
        >>> Options(timeout_seconds=timedelta(minutes=2)).timeout_seconds
        120.0
    """

    strategy: Strategy | Auto = Auto()  # noqa: RUF009  an immutable value
    balance: SenderPolicy = Split()  # noqa: RUF009
    topology: Topology | None = None
    staging_bytes: int = DEFAULT_STAGING_BYTES
    group: Any = None
    device: torch.device | str | None = None
    timeout_seconds: float | timedelta = DEFAULT_TIMEOUT_SECONDS
    confirm: bool | None = None
    channel: str = ""
    name: str = ""
    rules: Rules | BoundRules | None = None
    differentiable: bool = False
    grad_placements: Sequence[Any] | None = None
    progress: ProgressCallback | None = None
    checksum: bool = False
    transport: TransportName = DEFAULT_TRANSPORT
    hooks: Hooks | None = None
    stays_in_place: bool = False

    def __post_init__(self) -> None:
        check_strategy(self.strategy)
        check_balance(self.balance)
        check_topology(self.topology)
        check_staging_bytes(self.staging_bytes)
        if self.confirm is not None and not isinstance(self.confirm, bool):
            raise ArgumentError(f"confirm={shown(self.confirm)} is no truth value; pass True, False or None")
        for option in ("channel", "name"):
            text = getattr(self, option)
            if not isinstance(text, str):
                raise ArgumentError(f'{option}={shown(text)} must be a string such as "layer 3"; leave it out for none')
            check_text(option, text)
        if self.rules is not None and not isinstance(self.rules, Rules | BoundRules):
            raise ArgumentError(
                f"rules={shown(self.rules)} must be Rules; write Rules({{'name': source('name')}}), or leave it out"
            )
        names, is_text = get_args(TransportName), isinstance(self.transport, str)
        if not is_text or self.transport not in names:  # what is no text compares as it likes
            kind = SpecError if is_text else ArgumentError
            raise kind(
                f"transport={shown(self.transport)} is none of {', '.join(names)}; write one of them, as a string"
            )
        for option in ("differentiable", "checksum", "stays_in_place"):
            if not isinstance(getattr(self, option), bool):
                raise ArgumentError(f"{option}={shown(getattr(self, option))} is no truth value; pass True or False")
        if self.hooks is not None and not isinstance(self.hooks, Hooks):
            raise ArgumentError(f"hooks={shown(self.hooks)} must be Hooks; write Hooks(after={{'layers.3': function}})")
        if self.progress is not None:
            _check_progress(self.progress)
        object.__setattr__(self, "grad_placements", _checked_grad_placements(self.grad_placements))
        object.__setattr__(self, "device", _checked_device(self.device))
        object.__setattr__(self, "timeout_seconds", _checked_seconds(self.timeout_seconds))

    @classmethod
    def of(cls, given: Mapping[str, Any], caller: str, known: type = ReshardOptions) -> "Options":
        """The value of keyword arguments.

        Args:
            given: by name.
            caller: who takes them, for errors.
            known: the TypedDict of what it takes.

        Raises:
            ArgumentError: no such option, or one of the wrong kind.
            SpecError: a value that breaks a rule.

        Example:
            >>> Options.of({"timeout": timedelta(minutes=2)}, "my_reshard").timeout_seconds
            120.0
        """
        return cls(**_known_values(given, caller, known))

    def given(self) -> ReshardOptions:
        """Give the options as keyword arguments, to pass them on.

        >>> options = Options(channel="kv cache", confirm=True)
        >>> options.given()["channel"]  # as in reshard(tensor, source, destination, **options.given())
        'kv cache'
        """
        return cast(ReshardOptions, {field.name: getattr(self, field.name) for field in fields(self)})

    @property
    def seconds(self) -> float:
        """The timeout as a number.

        >>> Options(timeout_seconds=timedelta(minutes=2)).seconds
        120.0
        """
        assert isinstance(self.timeout_seconds, float)
        return self.timeout_seconds


@cache
def _names_of(known: type) -> Mapping[str, Any]:
    """The keywords of a TypedDict. To read its annotations takes longer than a small call."""
    return get_type_hints(known)


def _known_values(given: Mapping[str, Any], caller: str, known: type) -> dict[str, Any]:
    """The values of options by the names of the fields; see Options.of."""
    values = dict(given)
    names = _names_of(known)
    for name in values:
        if name not in names:
            raise ArgumentError(describe_unknown(name, caller, names))
    if "timeout" in values:
        timeout = values.pop("timeout")
        if not isinstance(timeout, timedelta):
            raise ArgumentError(
                f"timeout={shown(timeout)} has no unit; write timeout_seconds={shown(timeout)}, or "
                "timeout=timedelta(...)"
            )
        if "timeout_seconds" in values:
            raise ArgumentError(
                f"timeout={shown(timeout)} and timeout_seconds={shown(values['timeout_seconds'])} say the same "
                "thing twice; leave one out"
            )
        values["timeout_seconds"] = timeout
    return values


def _checked_seconds(timeout: object) -> float:
    if isinstance(timeout, timedelta):
        timeout = timeout.total_seconds()
    if not isinstance(timeout, int | float) or isinstance(timeout, bool):
        raise ArgumentError(
            f"timeout_seconds={shown(timeout)} must be a number of seconds above 0, or a timedelta; leave it out for "
            f"{DEFAULT_TIMEOUT_SECONDS:.0f}"
        )
    if not 0 < timeout <= MAX_TIMEOUT_SECONDS:
        raise SpecError(
            f"timeout_seconds={shown(timeout)} must be a number of seconds above 0 and at most "
            f"{MAX_TIMEOUT_SECONDS:.0e}, which is some 31 years; give a time after which a rank that stays away is "
            "known to be lost"
        )
    return float(timeout)


def _check_progress(progress: Any) -> None:
    if not callable(progress):
        raise ArgumentError(f"progress={shown(progress)} cannot be called; pass a function of one Progress")
    try:
        inspect.signature(progress).bind(None)
    except ValueError:  # what is written in C may not say what it takes
        return
    except TypeError as error:
        raise ArgumentError(
            f"progress={shown(progress)} cannot be called with one Progress ({error}); pass a function of one Progress"
        ) from None


def _checked_grad_placements(placements: object) -> tuple[Any, ...] | None:
    if placements is None:
        return None
    if isinstance(placements, str | bytes) or not isinstance(placements, Sequence):
        raise ArgumentError(
            f"grad_placements={shown(placements)} is not a sequence of placements; write one per mesh axis of the "
            "result"
        )
    for one in placements:
        if not isinstance(one, Shard | Replicate | Partial) and read_placement(one) is None:
            raise ArgumentError(
                f"grad_placements has {shown(one)}, which is no placement; write Shard(0), or Partial()"
            )
    return tuple(placements)


def _checked_device(device: object) -> torch.device | None:
    if device is None:
        return None
    if not isinstance(device, torch.device | str):
        raise ArgumentError(f'device={shown(device)} is not a device; write "cpu", "cuda:0" or torch.device(...)')
    try:
        return torch.device(device)
    except RuntimeError as error:
        why = str(error)[:400]  # it says the whole text
        raise SpecError(f'device={shown(device)} is not a device of torch ({why}); write "cpu" or "cuda:0"') from None
