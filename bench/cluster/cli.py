"""The command line of the emulated cluster.

python -m bench.cluster run --hosts 4 --devices 4 --nic 400mbit [--rails N] -- COMMAND...
python -m bench.cluster calibrate --hosts 4 --devices 4 --nic 400mbit [--rails N]
python -m bench.cluster clean
"""

import argparse
import re
import signal
import sys
from collections.abc import Sequence

from bench.cluster import network
from bench.cluster.cluster import Cluster
from bench.cluster.launch import run_command
from bench.cluster.network import ClusterError, Host, Nic

# What four hosts of a machine with two cores send and receive all at once at line rate, with time to spare.
DEFAULT_BITS_PER_SECOND = 400_000_000


def parse_bits_per_second(text: str) -> int:
    """A rate as ``tc`` writes them: 400mbit, 1gbit, 1.5gbit, 64000kbit."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(kbit|mbit|gbit)", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no rate; write a number and kbit, mbit or gbit, such as 400mbit")
    return round(float(found[1]) * {"kbit": 1e3, "mbit": 1e6, "gbit": 1e9}[found[2]])


def parse_nic(text: str) -> Nic:
    """``RATE``, or ``SEND/RECEIVE`` where they differ."""
    rates = [parse_bits_per_second(part) for part in text.split("/")]
    if len(rates) > 2:
        raise argparse.ArgumentTypeError(f"{text!r} has {len(rates)} rates; a NIC has one, or SEND/RECEIVE")
    try:
        return Nic(rates[0], rates[-1])
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def parse_nics(text: str) -> list[Nic]:
    """NICs separated by commas."""
    return [parse_nic(part) for part in text.split(",")]


def parse_hosts(hosts: int, devices: int, nics: Sequence[Nic], rails: int) -> list[Host]:
    """What the options of the command line describe.

    Raises:
        ValueError: they do not fit together.
    """
    if hosts < 1:
        raise ValueError(f"--hosts {hosts} must be above 0")
    if rails < 1:
        raise ValueError(f"--rails {rails} must be above 0")
    if len(nics) not in (1, hosts):
        raise ValueError(f"--nic has {len(nics)} rates for {hosts} hosts; give one for all, or one for each")
    return [Host(devices, (nic,) * rails) for nic in (nics if len(nics) == hosts else [nics[0]] * hosts)]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.cluster", description="A cluster emulated on this machine.")
    actions = parser.add_subparsers(dest="action", required=True)
    run = actions.add_parser("run", help="run a command once per device, like torchrun")
    calibrate = actions.add_parser("calibrate", help="measure whether the NICs do what they promise")
    for action in (run, calibrate):
        action.add_argument("--hosts", type=int, default=4, help="how many (%(default)s)")
        action.add_argument("--devices", type=int, default=1, help="of each host (%(default)s)")
        action.add_argument(
            "--nic",
            type=parse_nics,
            default=f"{DEFAULT_BITS_PER_SECOND // 10**6}mbit",
            metavar="RATE[,RATE...]",
            help="of each NIC; one for all hosts or one per host; SEND/RECEIVE where they differ (%(default)s)",
        )
        action.add_argument("--rails", type=int, default=1, help="NICs of each host (%(default)s)")
    run.add_argument("command", nargs="+", metavar="COMMAND", help="what to run, after --")
    actions.add_parser("clean", help="remove what a crashed run has left")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        if options.action == "clean":
            print("\n".join(f"removed {name}" for name in network.clean()) or "nothing to remove")
            return 0
        try:
            hosts = parse_hosts(options.hosts, options.devices, options.nic, options.rails)
            cluster = Cluster(hosts)
        except ValueError as error:
            parser.error(str(error))
        with cluster:
            return run_command(cluster, options.command) if options.action == "run" else _print_calibration(cluster)
    except ClusterError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def _print_calibration(cluster: Cluster) -> int:
    # Here, so that the other commands need no torch and start at once.
    from bench.cluster.calibrate import calibrate

    with cluster.ranks() as ranks:
        print(calibrate(cluster, ranks))
    return 0
