"""What a rendezvous of thousands of ranks asks of the store: little, also when ranks come late."""

import pytest

from bench.rendezvous import Row


@pytest.mark.parametrize("ranks", [64, 1024, 4096])
def test_ranks_that_come_at_once_ask_little(ranks: int) -> None:
    found = Row.of(ranks, 0.0)
    assert found.watcher_calls <= 8  # nobody watches
    assert found.watcher_nbytes <= 1_000


@pytest.mark.parametrize("ranks", [64, 1024])
def test_ranks_that_come_late_ask_little_and_watchers_in_proportion(ranks: int) -> None:
    found = Row.of(ranks, 2.0)
    # Watchers look at every note now and then; the first that announces itself writes fields.
    assert found.calls <= 150
    assert found.nbytes <= 15_000
    assert found.watcher_calls <= 40 * ranks
    assert found.watcher_nbytes <= 1_000 * ranks + 150_000
