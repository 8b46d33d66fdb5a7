"""What the other ranks are told when one of them fails or refuses, before it has a session and in it."""

from collections.abc import Mapping
from typing import Any

from tricomm.errors import TricommError
from tricomm.layout.spec import ShardingSpec
from tricomm.transport.coordination.intent import describe_refusal
from tricomm.transport.group import GroupContext


def describe_failure(rank: int, what: str, error: BaseException) -> str:
    """Say why a rank does not go on: it refused its arguments, or something failed in what it did."""
    text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    if isinstance(error, TricommError):
        return describe_refusal(rank, text)
    return f"rank {rank} failed in {what}: {text}"


def name_error(error: BaseException, name: str, about: str = "") -> None:
    """Put the name of a Resharder before the text of an error of ours, unless it, or what it is about, is in there."""
    if not (name and isinstance(error, TricommError)):
        return
    said = str(error)
    if not any(one in said or repr(one)[1:-1] in said for one in (name, about or name)):
        error.args = (f"{name}: {said}",)


def tell_all(
    context: GroupContext, error: BaseException, options: Mapping[str, Any], source: object, destination: object
) -> None:
    """Whatever stops this rank before its plan stands reaches whoever may wait for it: the ranks of the meshes, if they
    are meshes, in the call that they make, and all others of the group.
    """
    # Any may be of the wrong kind, which is what the error may be about.
    name, channel = (one if isinstance(one, str) else "" for one in (options.get("name"), options.get("channel")))
    name_error(error, name)
    text = describe_failure(context.rank, f"its call of tricomm{f' for {name}' if name else ''}", error)
    everybody = tuple(range(context.size))
    sides = [[*side.values()] if isinstance(side, Mapping) else [side] for side in (source, destination)]
    specs = [spec for side in sides for spec in side if isinstance(spec, ShardingSpec)]
    ranks = tuple(sorted({rank for mesh in {id(one.mesh): one.mesh for one in specs}.values() for rank in mesh.ranks}))
    is_known = (
        bool(ranks)
        and len(specs) == len(sides[0]) + len(sides[1])
        and context.rank in ranks
        and ranks[-1] < context.size
    )
    context.rendezvous.abort(ranks if is_known else everybody, text, channel, everybody)
