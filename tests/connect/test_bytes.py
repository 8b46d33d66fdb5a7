"""Everything that reads bytes from a peer: what is right comes back, what is wrong is a documented error, and no memory
is taken because somebody says so.
"""

import logging
import os
import random
import tracemalloc
from collections.abc import Callable
from typing import Any

import pytest

from tests.connect.maps import BOUND, RULES
from tricomm import Mesh, Partial, Replicate, Shard, ShardingSpec
from tricomm.connect.meeting import handshake, host
from tricomm.connect.meeting.handshake import Seals
from tricomm.connect.meeting.host import Host
from tricomm.connect.meeting.join import Join, Missing, Paired, Refused, Status, decode_status, encode_status
from tricomm.connect.meeting.table import MAX_TABLE_BYTES, Table
from tricomm.connect.meeting.wire import MAX_BODY_BYTES, MAX_VALUE_BYTES, FrameReader, Reader, WireError, Writer, framed
from tricomm.connect.told.exchange import LAYOUTS, Document, decode_documents, encode_documents
from tricomm.connect.told.maps import decode_map, encode_map
from tricomm.connect.told.specs import decode_specs, encode_specs, placed
from tricomm.errors import SpecError, TransportError, TricommError

SECRET = b"a secret of the tests"
JOIN = Join((("trainer", 2), ("server", 0)), "trainer", 1, "host", 7, "boot", "GPU-1", (("torch", "2"),), "again")
STATUSES: list[Status] = [
    Missing(1.5, (("server", 0), ("server", -1)), (("server", 0),), "a note"),
    Paired(3, 2, (("trainer", 2), ("server", 1)), ("a", "a", "b"), {2: "has left"}),
    Refused("why", is_over=True),
    Refused("why not"),
]
FUZZED = int(os.environ.get("TRICOMM_FUZZ_BYTES", "20000"))
ALLOCATION_BYTES = 1 << 20
"""Of inputs of some hundred bytes; a peer may announce gigabytes in them."""


def read_frames(data: bytes) -> None:
    reader = FrameReader(MAX_BODY_BYTES)
    for at in range(0, len(data), 7):
        reader.feed(data[at : at + 7])
        while reader.next() is not None:
            pass


def read_fields(data: bytes) -> None:
    for take in (Reader.octets, Reader.text, Reader.texts, Reader.integers, Reader.integer, Reader.code):
        take(Reader(data))


def read_join(data: bytes) -> None:
    Join.read(Reader(data))


def talk(data: bytes) -> None:
    """A stranger says anything."""
    place = Host(SECRET)
    place.opened(1, "stranger:1", 0.0)
    assert place.received(1, data, 0.0)[0] in (b"", framed(handshake.REFUSED))


def request(data: bytes) -> None:
    """One that knows the secret asks for anything, before and after it has met itself."""
    member = Member(Host(SECRET), 1)
    if data and data[0] % 2:
        member.ask(bytes([host.JOIN]) + Join((("solo", 1),), "solo", 0).encoded())
    member.ask(data[1:])


PARSERS: dict[str, tuple[Callable[[bytes], Any], list[bytes]]] = {
    "frames": (read_frames, [framed(b"abc") + framed(b"x" * 40)]),
    "fields": (read_fields, [Writer().text("abc").integer(4).done(), Writer().integers(range(4)).done()]),
    "join": (read_join, [JOIN.encoded()]),
    "status": (decode_status, [encode_status(one) for one in STATUSES]),
    "greeting": (handshake.nonce_of_greeting, [handshake.greeting(bytes(32))]),
    "stranger": (talk, [framed(handshake.answer(SECRET, bytes(32), bytes(32)))]),
    "request": (
        request,
        [
            b"1" + bytes([host.JOIN]) + JOIN.encoded(),
            b"1" + bytes([host.PEEK]) + JOIN.encoded(),
            b"1" + bytes([host.POLL]),
            b"1" + Writer(host.SET).integer(1).text("key").octets(b"value").done(),
            b"1" + Writer(host.GET).integer(1).text("key").done(),
            b"1" + Writer(host.ADD).integer(1).text("key").integer(5).done(),
            b"1" + Writer(host.CHECK).integer(1).texts(["key", "other"]).done(),
            b"1" + Writer(host.COMPARE_SET).integer(1).text("key").octets(b"a").octets(b"b").done(),
        ],
    ),
}


def read_specs(data: bytes) -> None:
    placed(decode_specs(data), 2, "server", 4)


DOCUMENTS = (Document.of(LAYOUTS, b"layouts"), Document.of(("trainer", "server"), b"rules"))
MESH = Mesh([[0, 1], [2, 3]], ("dp", "tp"))
SPECS = {
    "even": ShardingSpec(MESH, (Replicate(), Shard(0)), (8, 6), "float32"),
    "open": ShardingSpec(MESH, (Shard(0), Shard(0)), axis_order=("tp", "dp")),
    "fused": ShardingSpec(Mesh([3, 1], ("tp",)), (Shard(1, segments=(4, 2)),), (8, 6), "bfloat16"),
    "sums": ShardingSpec(MESH, (Partial("max"), Replicate()), (8, 6), "float32"),
    "held": ShardingSpec.explicit({0: (((0, 4), (6, 8)), ((0, 6),)), 2: (((4, 6),), ())}, (8, 6)),
    "scalar": ShardingSpec(Mesh([0], ("x",)), (Replicate(),), (), "int64"),
}
PARSERS["specs"] = (read_specs, [encode_specs(SPECS)])
PARSERS["map"] = (lambda data: decode_map(data, 1 << 16), [encode_map(one) for one in (RULES, BOUND)])
PARSERS["documents"] = (decode_documents, [encode_documents(DOCUMENTS)])


def test_a_name_is_told_whole_or_not_at_all() -> None:
    """It was cut, so that two names of a length became one."""
    for name, word in (("x" * 5000, "a name has 5000 bytes, and the most are 4096"), ("\ud800", "is no text")):
        with pytest.raises(SpecError, match=word):
            encode_specs({name: SPECS["even"]})


def test_layouts_are_told_as_they_are() -> None:
    assert decode_specs(encode_specs(SPECS)) == SPECS
    assert encode_specs(dict(reversed(SPECS.items()))) == encode_specs(SPECS)
    there = placed(SPECS, 10, "server", 4)
    assert there["fused"].mesh == Mesh([13, 11], ("tp",))
    assert all(
        there[name].holding(rank + 10) == SPECS[name].holding(rank)
        for name in SPECS
        for rank in (0,)
        if rank in SPECS[name].mesh and SPECS[name].shape is not None
    )
    with pytest.raises(SpecError, match=r"tensor 'even' of side 'server' is on .*, and the side has 3 ranks;"):
        placed(SPECS, 10, "server", 3)


def test_the_layouts_of_a_large_model_are_few_bytes() -> None:
    many = {f"layers.{layer}.experts.{expert}.w": SPECS["even"] for layer in range(60) for expert in range(256)}
    assert len(encode_specs(many)) / len(many) < 100


class Member:
    """One that knows the secret, at a Host without sockets."""

    def __init__(self, place: Host, number: int) -> None:
        self.place = place
        self.number = number
        greeting = place.opened(number, f"member:{number}", 0.0)
        assert greeting is not None
        theirs = handshake.nonce_of_greeting(greeting)
        answer, goes_on = place.received(number, framed(handshake.answer(SECRET, theirs, bytes(32))), 0.0)
        assert goes_on
        found = handshake.confirm(SECRET, theirs, bytes(32), answer[4:])
        assert found is not None
        self.seals: Seals = found

    def ask(self, body: bytes, now: float = 0.0) -> bytes | None:
        """The answer; None if the connection is closed for it."""
        answer, goes_on = self.place.received(self.number, framed(self.seals.seal(body)), now)
        return self.seals.open(answer[4:]) if goes_on else None

    def join(self, who: Join, now: float = 0.0) -> Status:
        answer = self.ask(bytes([host.JOIN]) + who.encoded(), now)
        assert answer is not None
        assert answer[0] == host.OK
        return decode_status(answer[1:])


def mutated(source: random.Random, valid: list[bytes]) -> bytes:
    """Random bytes, or something valid with bytes changed, cut, repeated or lengths made large."""
    if source.random() < 0.2:
        return source.randbytes(source.randrange(200))
    data = bytearray(source.choice(valid))
    for _ in range(source.randrange(1, 4)):
        at = source.randrange(len(data) + 1)
        match source.randrange(5):
            case 0:
                data[at : at + 1] = source.randbytes(1)
            case 1:
                del data[at:]
            case 2:
                data[at:at] = data[: source.randrange(len(data) + 1)]
            case 3:
                data[at : at + 4] = source.choice([b"\xff\xff\xff\x7f", b"\xff\xff\xff\xff", b"\x00\x00\x10\x00"])
            case 4:
                data[at : at + 8] = (1 << source.randrange(63)).to_bytes(8, "little")
    return bytes(data)


@pytest.mark.parametrize("name", PARSERS)
def test_fuzzed_bytes_are_a_documented_error_and_take_no_memory(name: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)
    parse, valid = PARSERS[name]
    source = random.Random(name)
    inputs = [mutated(source, valid) for _ in range(FUZZED // len(PARSERS) + 1)]
    refused = 0
    tracemalloc.start()
    try:
        for data in inputs:
            tracemalloc.reset_peak()
            before, _ = tracemalloc.get_traced_memory()
            try:
                parse(data)
            except TricommError:
                refused += 1
            _, peak = tracemalloc.get_traced_memory()
            assert peak - before < ALLOCATION_BYTES, data
    finally:
        tracemalloc.stop()
    assert refused > 0 or name in ("stranger", "request")
    assert "Traceback" not in caplog.text


def test_what_is_written_is_what_is_read() -> None:
    assert Join.read(Reader(JOIN.encoded())) == JOIN
    for status in STATUSES:
        assert decode_status(encode_status(status)) == status
    reader = Reader(Writer().text("gr\u00fc\u00dfe", 3).integers([1, -2]).texts(["a", "b"]).done())
    assert (reader.text(), reader.integers(), reader.texts()) == ("gr", (1, -2), ("a", "b")), "cut between characters"
    reader.end()


def test_a_frame_that_is_too_long_is_refused_before_it_comes() -> None:
    reader = FrameReader(100)
    reader.feed((101).to_bytes(4, "little"))
    with pytest.raises(WireError, match="a frame of 101 bytes is announced, and the most is 100"):
        reader.next()


def test_without_the_secret_nobody_is_answered() -> None:
    place = Host(SECRET)
    greeting = place.opened(1, "10.0.0.9:5", 0.0)
    assert greeting is not None
    theirs = handshake.nonce_of_greeting(greeting)
    wrong = handshake.answer(b"another secret ...", theirs, bytes(32))
    assert place.received(1, framed(wrong), 0.0) == (framed(handshake.REFUSED), False)
    assert handshake.confirm(SECRET, theirs, bytes(32), handshake.REFUSED) is None
    member = Member(place, 2)
    text = str(member.join(Join((("a", 2),), "a", 0), 1.0))
    assert "1 connection(s) had a wrong secret, the last from 10.0.0.9" in text, "who waits hears of it"


def test_a_meeting_that_does_not_know_the_secret_is_not_trusted() -> None:
    with pytest.raises(WireError, match="does not know the secret"):
        handshake.confirm(SECRET, bytes(32), bytes(32), bytes(32))


def test_an_answer_is_of_no_use_on_another_connection() -> None:
    place = Host(SECRET)
    first, second = place.opened(1, "a:1", 0.0), place.opened(2, "b:2", 0.0)
    assert first is not None
    assert second is not None
    overheard = framed(handshake.answer(SECRET, handshake.nonce_of_greeting(first), bytes(32)))
    assert place.received(1, overheard, 0.0)[1]
    assert place.received(2, overheard, 0.0) == (framed(handshake.REFUSED), False)


@pytest.mark.parametrize("how", ["changed", "again", "left out"])
def test_a_frame_that_was_meddled_with_ends_the_connection(how: str) -> None:
    member = Member(Host(SECRET), 1)
    frame = bytearray(framed(member.seals.seal(bytes([host.JOIN]) + Join((("a", 2),), "a", 0).encoded())))
    if how == "changed":
        frame[-1] ^= 1
    elif how == "left out":
        frame = bytearray(framed(member.seals.seal(bytes([host.POLL]))))
    if how == "again":
        assert member.place.received(1, bytes(frame), 0.0)[1]
    assert member.place.received(1, bytes(frame), 0.0) == (b"", False)


def test_one_that_does_not_wait_for_its_answer_is_not_served() -> None:
    """Answers to many small questions for large values would take all memory."""
    member = Member(Host(SECRET), 1)
    member.join(Join((("a", 2),), "a", 0))
    two = framed(member.seals.seal(bytes([host.POLL]))) + framed(member.seals.seal(bytes([host.POLL])))
    assert member.place.received(1, two, 0.0) == (b"", False)


def test_strangers_are_few_and_have_little_time() -> None:
    place = Host(SECRET)
    for number in range(host.MAX_STRANGERS):
        assert place.opened(number, "s:1", 0.0) is not None
    assert place.opened(9999, "s:1", 0.0) is None
    assert place.tick(host.STRANGER_SECONDS + 1).keys() == set(range(host.MAX_STRANGERS))


def test_what_goes_wrong_for_one_ends_its_connection_alone(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Host(SECRET)
    one, two = Member(place, 1), Member(place, 2)
    with monkeypatch.context() as broken:
        broken.setattr(Join, "read", lambda _: 1 / 0)
        assert one.ask(bytes([host.JOIN])) is None
    assert "ZeroDivisionError" in caplog.text
    assert isinstance(two.join(Join((("a", 2),), "a", 0)), Missing)


def test_the_silent_are_lost() -> None:
    place = Host(SECRET)
    one, two = Member(place, 1), Member(place, 2)
    sides = (("a", 2),)
    one.join(Join(sides, "a", 0))
    two.join(Join(sides, "a", 1))
    assert isinstance(one.join(Join((("a", 2),), "a", 0)), Missing)
    two.ask(bytes([host.POLL]), 15.0)
    assert list(place.tick(host.SILENT_SECONDS + 1)) == [1]


def store(member: Member, operation: int, serial: int, fields: Writer) -> bytes:
    answer = member.ask(Writer(operation).integer(serial).done() + fields.done())
    assert answer is not None
    return answer


def value_of(answer: bytes) -> bytes:
    assert answer[0] == host.OK, answer
    return Reader(answer[1:]).octets()


def test_a_store_belongs_to_the_members_of_an_epoch() -> None:
    place = Host(SECRET)
    sides = (("a", 2),)
    one, two, other = (Member(place, number) for number in (1, 2, 3))
    one.join(Join(sides, "a", 0))
    paired = two.join(Join(sides, "a", 1))
    assert isinstance(paired, Paired)
    serial = paired.serial
    assert value_of(store(one, host.SET, serial, Writer().text("k").octets(b"v"))) == b""
    assert value_of(store(two, host.GET, serial, Writer().text("k"))) == b"v"
    assert value_of(store(two, host.ADD, serial, Writer().text("n").integer(3))) == b"3"
    assert value_of(store(two, host.CHECK, serial, Writer().texts(["k", "n"]))) == b"1"
    assert value_of(store(two, host.COMPARE_SET, serial, Writer().text("final/x").octets(b"").octets(b"1"))) == b"1"
    assert value_of(store(one, host.COMPARE_SET, serial, Writer().text("final/x").octets(b"").octets(b"2"))) == b"1"
    assert store(one, host.GET, serial, Writer().text("none"))[0] == host.ABSENT
    solo = other.join(Join((("solo", 1),), "solo", 0))
    assert isinstance(solo, Paired)
    assert store(other, host.GET, serial, Writer().text("k"))[0] == host.OVER, "of another meeting"

    place.closed(2, "died", 1.0)
    answer = store(one, host.GET, serial, Writer().text("k"))
    assert answer[0] == host.OVER
    assert "epoch 1 is over: rank 1" in Reader(answer[1:]).text()
    assert value_of(store(one, host.GET, serial, Writer().text("final/x"))) == b"1", "what is final can be read"
    assert store(one, host.COMPARE_SET, serial, Writer().text("final/y").octets(b"").octets(b"1"))[0] == host.OVER
    three = Member(place, 4)
    three.join(Join(sides, "a", 1))
    again = one.join(Join(sides, "a", 0))
    assert isinstance(again, Paired)
    assert again.serial not in (serial, solo.serial)
    assert store(one, host.GET, again.serial, Writer().text("k"))[0] == host.ABSENT, "a new epoch knows nothing"
    assert value_of(store(one, host.GET, serial, Writer().text("final/x"))) == b"1"


def test_a_store_is_bounded() -> None:
    table = Table()
    with pytest.raises(TransportError, match="write it in pieces"):
        table.set("k", bytes(MAX_VALUE_BYTES + 1))
    count = (MAX_TABLE_BYTES - 1) // (MAX_VALUE_BYTES + 1000)
    for number in range(count):
        table.set(str(number), bytes(MAX_VALUE_BYTES))
    with pytest.raises(TransportError, match="the store of the epoch is full"):
        table.set("one more", bytes(MAX_VALUE_BYTES))
    for number in range(count):
        assert table.delete(str(number))
    assert not table.delete("0")
    table.set("0", b"12")
    assert table.add("0", -20) == -8
    for wrong in (b"", b"x", b"1" * 30, b"\xd9\xa1", str((1 << 63) - 1).encode()):
        table.set("n", wrong)
        with pytest.raises(TransportError, match="add to integers of 64 bits"):
            table.add("n", 1)


def test_secrets_that_can_be_guessed_are_refused() -> None:
    with pytest.raises(SpecError, match="has 6 bytes and needs at least 16"):
        handshake.checked_secret("secret")
    with pytest.raises(SpecError, match="is not a text"):
        handshake.checked_secret(12)
