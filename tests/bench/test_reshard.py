"""How much of a tensor and how many samples `bench.reshard` takes, with ranks that say how long they took."""

from collections.abc import Callable
from typing import Any

import pytest

from bench.reshard.cases import CASES
from bench.reshard.measure import IN_TURN, PARTS, Samples, first_of_peer, prepare_peer, sample, sample_in_turns
from bench.reshard.peers import COMPLETE, PEERS

WHOLE_SECONDS = 2.0
BOUNDS = [WHOLE_SECONDS / part for part in PARTS]


class Ranks:
    """Two ranks that take so many times the bound, the second longer, and one that takes no part."""

    def __init__(self, times: float = 1.0, noise: Callable[[int], float] = lambda count: 0.0) -> None:
        self.times, self.noise = times, noise
        self.moved: list[float] = []
        self.checked: list[bool] = []
        self.bound = WHOLE_SECONDS

    def run(self, function: Any, *arguments: Any) -> list[Any]:
        if function is prepare_peer:
            self.bound = arguments[1]
            return []
        assert function is sample
        self.moved.append(self.bound)
        self.checked.append(arguments[1])
        seconds = self.times * self.bound * (1 + self.noise(len(self.moved)))
        return [(5.0, 5.0 + seconds / 2), (5.0, 5.0 + seconds), None]


def first(ranks: Ranks, name: str) -> Samples:
    return first_of_peer(ranks, name, [(bound, bound) for bound in BOUNDS])  # type: ignore[misc]


@pytest.mark.parametrize(("times", "moves"), [(32.0, 1), (8.0, 2), (2.0, 3), (1.6, 3), (1.01, 4)])
def test_a_peer_moves_as_much_as_takes_long(times: float, moves: int) -> None:
    ranks = Ranks(times)
    found = first(ranks, COMPLETE)
    assert ranks.moved == BOUNDS[:moves]
    assert all(ranks.checked)
    assert found.bound_seconds == BOUNDS[moves - 1]
    assert found.seconds == [pytest.approx(times * found.bound_seconds)]
    assert found.is_slow == (times > 1.5)


def test_who_waits_for_each_message_moves_a_quarter_at_least() -> None:
    ranks = Ranks(32.0)
    first(ranks, IN_TURN)
    assert ranks.moved == [WHOLE_SECONDS / 4]
    assert IN_TURN in PEERS


def test_samples_are_taken_until_they_agree() -> None:
    quiet, noisy = Ranks(), Ranks(noise=lambda count: 0.02 * (count // 2 % 2))
    for ranks, counts in ((quiet, (3, 2)), (noisy, (5, 3))):
        samples = {"ours": Samples(WHOLE_SECONDS, []), COMPLETE: Samples(WHOLE_SECONDS, [])}
        samples["slow"] = Samples(WHOLE_SECONDS, [9.0], is_slow=True)
        sample_in_turns(ranks, samples, {"ours": (3, 5), COMPLETE: (2, 3), "slow": (2, 3)})
        assert tuple(len(samples[name].seconds) for name in ("ours", COMPLETE)) == counts
        assert samples["slow"].seconds == [9.0]
        assert ranks.checked == [True] * 2 + [False] * (sum(counts) - 2)  # the first of each


def test_cases_fit_their_clusters() -> None:
    for case in CASES:
        source, destination = case.make(240)
        used = {*source.mesh.ranks, *destination.mesh.ranks}
        assert max(used) < case.cluster.devices * len(case.cluster.rates), case.name
    assert len({case.cluster for case in CASES}) == 3  # each is started and calibrated once
