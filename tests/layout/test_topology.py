"""Topologies that are equal are the same everywhere."""

import pytest

from tricomm import Mesh, Shard, ShardingSpec, SpecError, Topology, make_plan


def test_equal_rates_give_equal_digests() -> None:
    source = ShardingSpec(Mesh([0], ("x",)), (Shard(0),), (8,), "int8")
    destination = ShardingSpec(Mesh([1], ("x",)), (Shard(0),))
    whole, fraction = (Topology(("a", "b"), nic_bytes_per_second=rate) for rate in (10, 10.0))
    assert whole == fraction
    digests = [make_plan(source, destination, topology=topology).digest() for topology in (whole, fraction)]
    assert digests[0] == digests[1]


@pytest.mark.parametrize("rate", [0, -1, float("nan"), float("inf"), "fast", True, None])
def test_a_rate_is_a_number_above_zero(rate: object) -> None:
    with pytest.raises(SpecError, match=r"nic_bytes_per_second=.* must be above 0, a finite number; give a rate"):
        Topology(("a",), nic_bytes_per_second=rate)  # type: ignore[arg-type]


@pytest.mark.parametrize("nics", [0, 1.5, True])
def test_a_host_has_whole_nics(nics: object) -> None:
    with pytest.raises(SpecError, match=r"nics_per_host=.* must be above 0, an integer"):
        Topology(("a",), nics_per_host=nics)  # type: ignore[arg-type]


@pytest.mark.parametrize("hosts", [5, None, "ab", ("a", 1), iter(("a",))])
def test_hosts_are_a_tuple_of_names(hosts: object) -> None:
    with pytest.raises(SpecError, match="must be one host name per rank"):
        Topology(hosts)  # type: ignore[arg-type]
