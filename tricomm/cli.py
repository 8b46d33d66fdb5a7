"""The command line: ``python -m tricomm demo | plan``."""

import argparse
import sys
from collections.abc import Sequence

from tricomm.errors import SpecError, TricommError
from tricomm.mesh import Mesh
from tricomm.plan import make_plan
from tricomm.sharding import ShardingSpec


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command; exits with 2 and one line if its arguments make no sense."""
    parser = argparse.ArgumentParser(prog="tricomm", description="Move sharded tensors between device meshes.")
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser("demo", help="move a real model from a trainer to a server and back, on 8 processes")
    demo.add_argument("--checkpoint", help="a .safetensors file; the default is a small pretrained sentence encoder")
    plan = commands.add_parser(
        "plan",
        help="print how a tensor would travel",
        description='Example: tricomm plan --shape 4096,1024 --source 2,2 "S1 R" --destination 4 "R S0"',
    )
    plan.add_argument("--shape", required=True, help="global shape, as 4096,1024")
    plan.add_argument("--dtype", default="float32", help="element type")
    for side in ("source", "destination"):
        plan.add_argument(
            f"--{side}",
            nargs=2,
            required=True,
            metavar=("MESH", "LAYOUT"),
            help='mesh shape, as 2,2, and one entry per tensor dim, as "S01 R"',
        )
    plan.add_argument("--same-ranks", action="store_true", help="both meshes start at rank 0")
    options = parser.parse_args(arguments)
    try:
        if options.command == "demo":
            from tricomm.demo import run_demo

            run_demo(options.checkpoint)
        else:
            print(_plan_text(options))
    except TricommError as error:
        print(f"tricomm: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def _plan_text(options: argparse.Namespace) -> str:
    shape = _integers("--shape", options.shape)
    source = _spec(options.source, 0, shape, options.dtype)
    first = 0 if options.same_ranks else source.mesh.size
    return str(make_plan(source, _spec(options.destination, first, shape, None)))


def _spec(words: Sequence[str], first: int, shape: tuple[int, ...], dtype: str | None) -> ShardingSpec:
    """The spec of a mesh shape and a layout in words, on consecutive ranks."""
    mesh, layout = words
    extents = _integers("mesh", mesh)
    count = 1
    for extent in extents:
        count *= extent
    nested: list[object] = list(range(first, first + count))
    for extent in reversed(extents[1:]):
        nested = [nested[i : i + extent] for i in range(0, len(nested), extent)]
    names = tuple(f"axis{axis}" for axis in range(len(extents)))
    return ShardingSpec.from_dims(Mesh(nested, names), layout.split(), shape, dtype)


def _integers(name: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(word) for word in text.split(",") if word)
    except ValueError:
        raise SpecError(f"{name} {text!r} is not a list of integers; write 4096,1024") from None
