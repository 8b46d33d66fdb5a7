"""The command line: ``python -m tricomm demo | meet | plan | simulate``."""

import argparse
import os
import signal
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from tricomm.connect.meeting.server import Meeting
from tricomm.draw import plan_svg, timeline_perfetto, timeline_svg
from tricomm.errors import SpecError, TricommError
from tricomm.layout.mesh import Mesh
from tricomm.layout.spec import ShardingSpec
from tricomm.layout.topology import DEFAULT_NIC_BYTES_PER_SECOND, Topology
from tricomm.pipeline import (
    Costs,
    Edge,
    Limits,
    Schedule,
    TransferCost,
    chain,
    eager_one_f_one_b,
    gpipe,
    read_csv,
    simulate,
    tune,
    with_communication,
    zero_bubble,
)
from tricomm.plan import make_plan
from tricomm.plan.describe import ASSUMED

SECRET_VARIABLE = "TRICOMM_SECRET"

SLOWEST_NIC = 1e6
"""Bytes per second below which a rate must be meant in another unit."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command; exits with 2 and one line if its arguments make no sense."""
    parser = argparse.ArgumentParser(prog="tricomm", description="Move sharded tensors between device meshes.")
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser("demo", help="move a real model from a trainer to a server and back, on 8 processes")
    demo.add_argument("--checkpoint", help="a .safetensors file; the default is a small pretrained sentence encoder")
    _add_meet(commands)
    _add_plan(commands)
    _add_simulate(commands)
    options = parser.parse_args(arguments)
    try:
        if options.command == "demo":
            _demo(options.checkpoint)
        elif options.command == "simulate":
            print(_simulate(options))
        elif options.command == "meet":
            _meet(options)
        else:
            print(_plan_text(options))
        sys.stdout.flush()
    except TricommError as error:
        print(f"tricomm: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except BrokenPipeError:
        # The reader has had enough, as head does; what is still buffered must not be flushed to it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None


def _demo(checkpoint: str | None) -> None:
    try:
        from tricomm.demo import run_demo
    except ModuleNotFoundError as error:
        raise SpecError(
            f"the demo needs the package {error.name}, which comes with tricomm's extra 'demo'; in the checkout, run "
            "pip install -e '.[demo]'"
        ) from None
    run_demo(checkpoint)


def _add_meet(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "meet",
        help="listen where the ranks of separate jobs meet, until interrupted",
        description=f"Prints the address for tricomm.connect. The secret is in --secret-file, or in {SECRET_VARIABLE}.",
    )
    parser.add_argument(
        "--address",
        default="tcp://127.0.0.1:0",
        help="of this machine, as the ranks reach it: nothing else is listened to; port 0 is a free one (%(default)s)",
    )
    parser.add_argument("--secret-file", type=Path, help="what `openssl rand -hex 32` prints")


def _meet(options: argparse.Namespace) -> None:
    try:
        secret = os.environ.get(SECRET_VARIABLE, "")
        if options.secret_file is not None:
            secret = options.secret_file.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"--secret-file {options.secret_file} cannot be read ({error}); name a file of yours") from None
    if not secret:
        raise SpecError(f"there is no secret; give --secret-file, or set {SECRET_VARIABLE}")
    for number in (signal.SIGTERM, signal.SIGINT):  # the latter is ignored in what a shell starts in the background
        signal.signal(number, signal.default_int_handler)
    # From the address on: whoever reads it may interrupt before the next line runs.
    with suppress(KeyboardInterrupt), Meeting(options.address, secret=secret) as meeting:
        print(meeting.address, flush=True)
        meeting.wait()


def _add_plan(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "plan",
        help="print how a tensor would travel",
        description='Example: tricomm plan --shape 4096,1024 --source 2x2 "S1 R" --destination 4 "R S0" --svg plan.svg',
    )
    parser.add_argument("--shape", required=True, help="global shape, as 4096,1024")
    parser.add_argument("--dtype", default="float32", help="element type")
    for name in ("source", "destination"):
        parser.add_argument(
            f"--{name}",
            nargs=2,
            required=True,
            metavar=("MESH", "LAYOUT"),
            help='mesh shape, as 2x2 or dp=2,tp=2, and one entry per tensor dim, as "S01 R": R is whole, S01 is cut by '
            "mesh axis 0 and then by axis 1",
        )
    parser.add_argument("--same-ranks", action="store_true", help="both meshes start at rank 0")
    parser.add_argument("--hosts", type=int, help="how many hosts there are (a host per rank, or what --devices gives)")
    parser.add_argument("--devices", type=int, help="consecutive ranks of a host, which share its NIC (1)")
    parser.add_argument("--nic", type=float, help="bytes per second of a NIC, as 50e9 (12.5e9)")
    parser.add_argument("--svg", type=Path, metavar="PATH", help="write a picture")


def _add_simulate(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "simulate",
        help="print how a pipeline would run",
        description="Example: tricomm simulate --stages 4 --microbatches 8 --seconds 1,1,1 --hop 1 --svg timeline.svg",
    )
    parser.add_argument(
        "--schedule",
        default="tuned",
        help="tuned (the default), gpipe, 1f1b, eager, zero-bubble, or the path of a CSV file as torch writes it",
    )
    parser.add_argument("--stages", type=int, default=4, help="(%(default)s)")
    parser.add_argument("--microbatches", type=int, default=8, help="(%(default)s)")
    parser.add_argument(
        "--seconds", default="1,1,1", help="of F, I and W: forward, gradient of inputs, of weights (%(default)s)"
    )
    parser.add_argument("--hop", type=float, default=0.0, help="seconds that a transfer keeps its link (%(default)s)")
    parser.add_argument(
        "--one-nic", action="store_true", help="hops to and from both neighbours of a stage share its NIC"
    )
    parser.add_argument("--latency", type=float, default=0.0, help="seconds until it can be used (%(default)s)")
    parser.add_argument("--depth", type=int, help="of the warm-up of eager and zero-bubble (1)")
    parser.add_argument("--split", action="store_true", help="backwards in two steps, I then W")
    parser.add_argument("--activations", type=int, help="the most that a stage may hold, for tuned")
    parser.add_argument(
        "--receives-ahead", type=int, default=2, help="actions by which receives come first (%(default)s)"
    )
    parser.add_argument("--svg", type=Path, metavar="PATH", help="write a picture")
    parser.add_argument("--perfetto", type=Path, metavar="PATH", help="write a trace for ui.perfetto.dev")


def _simulate(options: argparse.Namespace) -> str:
    """The grid, the figures and, if asked for, what was compared."""
    _check_unused(options)
    lines = []
    if options.schedule == "tuned":
        costs = _costs(options, options.stages, chain(options.stages))
        tuned = tune(lambda _: costs, [options.microbatches], limits=Limits(activations=options.activations))
        schedule, timeline = tuned.best.schedule, tuned.timeline
        lines = [str(tuned), ""]
    else:
        schedule = _named_schedule(options)
        costs = _costs(options, schedule.stages, schedule.edges)
        if not schedule.has_communication:
            schedule = with_communication(schedule, receives_ahead=options.receives_ahead)
        timeline = simulate(schedule, costs)
    if options.svg is not None:
        _write("--svg", options.svg, timeline_svg(timeline))
    if options.perfetto is not None:
        _write("--perfetto", options.perfetto, timeline_perfetto(timeline))
    return "\n".join([*lines, str(schedule.compute_only()), "", str(timeline)])


def _write(option: str, path: Path, text: str) -> None:
    if option == "--svg" and path.suffix not in ("", ".svg"):
        raise SpecError(f"--svg {path} names no SVG file; write it to {path.with_suffix('.svg')} and convert that")
    try:
        path.write_text(text)
    except OSError as error:
        raise SpecError(f"{option} {path} cannot be written ({error.strerror}); name a file of yours") from None


def _costs(options: argparse.Namespace, stages: int, edges: Iterable[Edge]) -> Costs:
    """Equal stages and hops; with one NIC, a stage sends and receives at its full rate at once."""
    try:
        times = [float(word) for word in options.seconds.split(",")]
        forward, inputs, weights = times
    except ValueError:
        raise SpecError(f"--seconds {options.seconds!r} is not three numbers; write F, I and W as 1,1,1") from None
    hop = TransferCost(options.hop, options.latency)
    costs = Costs.uniform(stages, forward, inputs, weights, hop)
    for channel in (one for edge in edges for one in (edge.forward, edge.backward)) if options.one_nic else ():
        shared = hop.sharing(f"NIC of stage {channel.sender}", f"NIC of stage {channel.receiver}")
        costs = costs.with_transfers([channel], shared)
    return costs


def _check_unused(options: argparse.Namespace) -> None:
    """Refuse what the schedule would not look at."""
    is_tuned = options.schedule == "tuned"
    if options.activations is not None and not is_tuned:
        raise SpecError(f"--activations limits tuned schedules, and this is {options.schedule}; leave it out")
    if options.depth is not None and options.schedule not in ("eager", "zero-bubble"):
        raise SpecError(f"--depth is of eager and zero-bubble, and this is {options.schedule}; leave it out")


def _depth(options: argparse.Namespace) -> int:
    return 1 if options.depth is None else int(options.depth)


def _named_schedule(options: argparse.Namespace) -> Schedule:
    stages, microbatches, split = options.stages, options.microbatches, options.split
    if options.schedule == "gpipe":
        return gpipe(stages, microbatches, split=split)
    if options.schedule in ("1f1b", "eager"):
        depth = 0 if options.schedule == "1f1b" else _depth(options)
        return eager_one_f_one_b(stages, microbatches, depth=depth, split=split)
    if options.schedule == "zero-bubble":
        return zero_bubble(stages, microbatches, depth=_depth(options))
    path = Path(options.schedule)
    if not path.is_file():
        raise SpecError(
            f"--schedule {options.schedule!r} is no schedule and no file; write tuned, gpipe, 1f1b, eager, zero-bubble "
            "or a path"
        )
    return read_csv(path.read_text())


def _plan_text(options: argparse.Namespace) -> str:
    shape = _integers("--shape", options.shape)
    source = _spec(options.source, 0, shape, options.dtype)
    first = 0 if options.same_ranks else source.mesh.size
    destination = _spec(options.destination, first, shape, None)
    topology = _topology(options, max(*source.mesh.ranks, *destination.mesh.ranks) + 1)
    plan = make_plan(source, destination, topology=topology)
    if options.svg is not None:
        _write("--svg", options.svg, plan_svg(plan))
    lines = str(plan).splitlines()
    assumed = [option for option in ("hosts", "devices", "nic") if getattr(options, option) is None]
    if assumed:
        index = next(i for i, line in enumerate(lines) if line.startswith("  over  "))
        lines[index] = lines[index].removesuffix(f" {ASSUMED}")
        lines[index] += f" (assumed; say otherwise with {', '.join(f'--{option}' for option in assumed)})"
    return "\n".join(lines)


def _topology(options: argparse.Namespace, ranks: int) -> Topology:
    """The network of so many ranks, host after host."""
    for option in ("hosts", "devices"):
        value = getattr(options, option)
        if value is not None and value < 1:
            raise SpecError(f"--{option} {value} must be at least 1; leave it out for one rank on each host")
    if options.nic is not None and options.nic < SLOWEST_NIC:
        raise SpecError(f"--nic {options.nic:g} is in bytes per second, and no NIC is that slow; write 50e9")
    devices = options.devices or (1 if options.hosts is None else -(-ranks // options.hosts))
    hosts = options.hosts or -(-ranks // devices)
    if hosts * devices < ranks:
        raise SpecError(
            f"--hosts {hosts} of --devices {devices} are places for {hosts * devices} ranks, and the meshes have "
            f"{ranks}; give more of either"
        )
    names = tuple(f"host{rank // devices}" for rank in range(ranks))
    return Topology(names, DEFAULT_NIC_BYTES_PER_SECOND if options.nic is None else options.nic)


def _spec(words: Sequence[str], first: int, shape: tuple[int, ...], dtype: str | None) -> ShardingSpec:
    """The spec of a mesh shape and a layout in words, on consecutive ranks."""
    mesh, layout = words
    if "=" in mesh:
        axes = [word.partition("=") for word in mesh.split(",") if word]
        names = tuple(name for name, _, _ in axes)
        extents = _integers("mesh", ",".join(extent for _, _, extent in axes))
    else:
        extents = _integers("mesh", mesh.replace("x", ","))
        names = tuple(f"axis{axis}" for axis in range(len(extents)))
    if not extents or min(extents) < 1 or len(names) != len(extents):
        raise SpecError(f"mesh {mesh!r} has no size for each axis; write 2x2 or dp=2,tp=2, each at least 1")
    count = 1
    for extent in extents:
        count *= extent
    nested: list[Any] = list(range(first, first + count))
    for extent in reversed(extents[1:]):
        nested = [nested[i : i + extent] for i in range(0, len(nested), extent)]
    return ShardingSpec.from_dims(Mesh(nested, names), layout.split(), shape, dtype)


def _integers(name: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(word) for word in text.split(",") if word)
    except ValueError:
        raise SpecError(f"{name} {text!r} is not a list of integers; write 4096,1024") from None
