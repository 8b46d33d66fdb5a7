"""Rules between the sides of a feed: told by one side or by both, and compared."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.connect.feeds.test_feed import OWN, SHAPES, Rank, all_of, full, moved
from tests.connect.jobs import SECRET, raised, together, worlds_of
from tests.oracle import pick
from tricomm import Feed, Meeting, Mesh, Publisher, Shard, ShardingSpec, SpecError, Subscriber, TransportError, World
from tricomm.connect.feeds.ballot import Offer
from tricomm.connect.told.agreed import DifferenceError, Told
from tricomm.connect.told.exchange import Exchange
from tricomm.connect.told.maps import Map
from tricomm.rules import Rules, cat, source

FUSED_SHAPE = (8, 6)
FUSED = Rules({"ab": cat([source("a")[:4], source("b").flatten()[:24].unflatten(0, (4, 6))])}, drop=["a", "b"])
SAME = Rules(
    {"ab": cat([source("a")[:2], source("a")[2:4], source("b").flatten()[:24].unflatten(0, (-1, 6))])}, drop=["*"]
)
"""FUSED, written otherwise."""

OTHER = Rules({"ab": cat([source("b").flatten()[:24].unflatten(0, (4, 6)), source("a")[:4]])}, drop=["a", "b"])
BOUND = FUSED.bind(SHAPES, dict.fromkeys(SHAPES, "float32"))
PAIR = ("trainer", "server")
SERVED = {"ab": ShardingSpec(Mesh([0, 1, 2], ("tp",)), (Shard(0),))}


def exchanged(world: World, told: dict[str, Map]) -> Told:
    """What a rank hears if the sides tell these rules."""
    rules = {PAIR: told[world.side]} if world.side in told else None
    return world.exchange(OWN["trainer"] if world.side == "trainer" else SERVED, 10, rules=rules)


class FusedRank(Rank):
    """A rank of a world whose destination has one tensor where the source has two.

    Args:
        world: of the rank.
        told: the rules that each side tells.
        rules: that this rank gives to its feed instead.
    """

    def __init__(self, world: World, told: dict[str, Map], rules: Rules | None = None) -> None:
        self.world = world
        self.is_source = world.side == "trainer"
        self.specs = exchanged(world, told)
        self.feed = Feed(
            world, self.specs, source="trainer", destination="server", timeout_seconds=30.0, rules=rules, name="fused"
        )
        if self.is_source:
            self.tensors = {name: self.shard(name, 0) for name in SHAPES}
        else:
            self.tensors = {"ab": torch.zeros(self.spec.local_shape(world.rank()))}

    @property
    def spec(self) -> ShardingSpec:
        return replace(self.specs["server"]["ab"], shape=FUSED_SHAPE, dtype="float32")

    def require(self, version: int) -> None:
        whole = torch.cat([full("a", version)[:4], full("b", version).flatten()[:24].unflatten(0, (4, 6))])
        assert torch.equal(self.tensors["ab"], pick(whole, self.spec, self.world.rank()))


TOLD: dict[str, dict[str, Map]] = {
    "the server's rules": {"server": FUSED},
    "the trainer's rules": {"trainer": FUSED},
    "the server's map": {"server": BOUND},
    "the same": {"server": FUSED, "trainer": FUSED},
    "the same, written otherwise": {"server": FUSED, "trainer": SAME},
    "rules and a map": {"server": BOUND, "trainer": SAME},
}


@pytest.mark.parametrize("who", TOLD)
def test_one_side_tells_its_rules_and_the_other_needs_none(worlds: list[World], who: str) -> None:
    ranks = raised(together(*(lambda w=w: FusedRank(w, TOLD[who]) for w in worlds)))
    for version in (1, 2):
        assert raised(all_of(ranks, lambda r: moved(r, version))) == [True, True] + [Offer(version, None)] * 3  # noqa: B023
        for rank in ranks[2:]:
            rank.require(version)


def test_rules_that_were_told_are_not_sent_again_in_the_next_epoch(worlds: list[World]) -> None:
    told: dict[str, Map] = {"server": FUSED}
    raised(together(*(lambda w=w: exchanged(w, told) for w in worlds)))
    worlds[:] = raised(together(*(w.renew for w in worlds)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Exchange, "_fetch", lambda *_: pytest.fail("it is known"))
        found = raised(together(*(lambda w=w: exchanged(w, told) for w in worlds)))
    assert [one.rules for one in found] == [{PAIR: FUSED}] * 5


@pytest.mark.parametrize("other", [OTHER, OTHER.bind(SHAPES)], ids=["rules", "map"])
def test_rules_that_differ_are_told_with_both_sides_and_what_they_say(worlds: list[World], other: Map) -> None:
    found = together(*(lambda w=w: exchanged(w, {"server": other, "trainer": FUSED}) for w in worlds))
    assert all(isinstance(one, DifferenceError) for one in found), found
    assert len({str(one) for one in found}) == 1
    for words in ("sides 'trainer' and 'server' tell different rules", "'ab' is cat([a[:4], ", "for side 'server'"):
        assert words in str(found[0])


def test_rules_that_do_not_fit_one_sides_tensors_are_told_by_all(worlds: list[World]) -> None:
    found = together(*(lambda w=w: FusedRank(w, {"server": Rules({"ab": source("c")})}) for w in worlds))
    assert all(isinstance(one, SpecError) and "source 'c' is not among" in str(one) for one in found), found


def test_rules_that_differ_between_feeds_are_told(worlds: list[World]) -> None:
    found = together(*(lambda w=w: FusedRank(w, {}, OTHER if w.side == "server" else FUSED) for w in worlds))
    ranks = [one for one in found if isinstance(one, FusedRank)]
    assert len(ranks) == 5, found
    pushed = all_of(ranks, lambda r: moved(r, 1))
    assert all(isinstance(one, TransportError) for one in pushed), pushed
    assert all(rank.feed.held is None for rank in ranks[2:])


def test_ranks_of_a_side_tell_the_same(worlds: list[World]) -> None:
    rules = [FUSED, FUSED, FUSED, OTHER, FUSED]
    found = together(
        *(lambda w=w, r=r: exchanged(w, {"server": r}) for w, r in zip(worlds, rules, strict=True)),
    )
    words = "rank 1 of side 'server' tells other rules from 'trainer' to 'server' than its rank 0"
    assert all(isinstance(one, TransportError) and words in str(one) for one in found), found


@pytest.mark.parametrize("pair", [("trainer", "trainer"), ("server", "judge"), ("trainer", "nobody")])
def test_rules_between_others_are_refused(meeting: Meeting, pair: tuple[str, str]) -> None:
    sizes = {"trainer": 1, "server": 1, "judge": 1}
    worlds = worlds_of(meeting, sizes)
    with pytest.raises(SpecError, match=r"and this is side 'trainer'|side 'nobody' is none of"):
        worlds[0].exchange({}, rules={pair: FUSED})


# ---- the loop around it


def serve(meeting: Meeting, rules: Map | None, seconds: float = 20.0) -> Any:
    """The one rank of a fleet that takes a version of the tensors that the rules make."""
    out = {"ab": torch.zeros(FUSED_SHAPE)}
    specs = {"ab": ShardingSpec(Mesh([0], ("x",)), (Shard(0),))}
    with Subscriber(
        meeting.address, side="server", side_rank=0, side_size=1, source="trainer", specs=specs, out=out, secret=SECRET,
        device="cpu", rules=rules,
    ) as subscriber:  # fmt: skip
        return subscriber.wait(seconds), out["ab"]


def train(meeting: Meeting, rules: Map | None, is_over: Any) -> list[str]:
    """The one rank of a trainer that pushes until something; why it did not."""
    specs = {name: ShardingSpec(Mesh([0], ("x",)), (Shard(0),), shape, "float32") for name, shape in SHAPES.items()}
    told: list[str] = []
    with Publisher(
        meeting.address, side="trainer", side_rank=0, side_size=1, fleets=["server"], specs=specs, secret=SECRET,
        device="cpu", rules=rules,
    ) as publisher:  # fmt: skip
        for version in range(1, 2000):
            push = publisher.push({name: full(name, version) for name in SHAPES}, version, wait_seconds=0.01)["server"]
            told.append(push.skipped)
            if is_over(push):
                break
    return told


def test_a_fleet_brings_its_rules_and_the_trainer_knows_none(meeting: Meeting) -> None:
    _, (version, found) = raised(
        together(lambda: train(meeting, None, lambda push: push.wait()), lambda: serve(meeting, FUSED))
    )
    whole = torch.cat([full("a", version)[:4], full("b", version).flatten()[:24].unflatten(0, (4, 6))])
    assert torch.equal(found, whole)


@pytest.mark.parametrize(
    ("ours", "theirs", "words"),
    [
        (FUSED, OTHER, "tell different rules for how the tensors of 'server'"),
        (None, Rules({"ab": source("c")}), "side 'server' cannot be fed: rule 'ab': source 'c' is not among"),
        (None, None, "side 'server' cannot be fed: only side"),
    ],
    ids=["different", "misfit", "none"],
)
def test_a_fleet_that_cannot_be_fed_is_skipped_and_told(
    meeting: Meeting, ours: Map | None, theirs: Map | None, words: str
) -> None:
    """Nothing that a fleet says stops the trainer."""
    told, error = together(
        lambda: train(meeting, ours, lambda push: words in push.skipped), lambda: serve(meeting, theirs)
    )
    assert words in told[-1]
    assert isinstance(error, SpecError | DifferenceError), error
    assert words.partition(": ")[2] in str(error)
