"""Who may talk to the meeting: both ends show that they know the secret, and seal every frame with a key made of it.

    meeting   magic | nonce                            to whoever connects
    client    nonce | HMAC(secret, "client" ...)       over both nonces
    meeting   HMAC(secret, "meeting" ...)              or REFUSED, and the connection ends

From then on each body has a seal before it, HMAC of its place in the stream and its bytes, with a key for this
connection and direction: nothing can be changed, repeated, left out or put in on the way. Nothing is encrypted.
"""

import hmac
import os

from tricomm.connect.meeting.wire import INTEGER, SEAL_BYTES, WireError
from tricomm.errors import ArgumentError, SpecError

MAGIC = b"tricomm meeting 1\n"
NONCE_BYTES = 32
PROOF_BYTES = 32
GREETING_BYTES = len(MAGIC) + NONCE_BYTES
ANSWER_BYTES = NONCE_BYTES + PROOF_BYTES
REFUSED = b"refused"
MIN_SECRET_BYTES = 16


def checked_secret(secret: object) -> bytes:
    """Return the bytes of a secret.

    Raises:
        SpecError: it is too short to be one, or holds what cannot be written; an ArgumentError if it is no text.
    """
    if not isinstance(secret, str | bytes):
        raise ArgumentError(f"secret={type(secret).__name__} is not a text; pass what `openssl rand -hex 32` prints")
    try:
        found = secret.encode() if isinstance(secret, str) else secret
    except UnicodeEncodeError as error:
        # Nothing of it is shown: not the character, and not the error, which has it all.
        raise SpecError(
            f"secret has at place {error.start} a character that is none by itself (half of a surrogate pair), which "
            "no encoding writes; pass bytes, or what `openssl rand -hex 32` prints"
        ) from None
    if len(found) < MIN_SECRET_BYTES:
        raise SpecError(
            f"secret has {len(found)} bytes and needs at least {MIN_SECRET_BYTES}, as whoever guesses it joins; pass "
            "what `openssl rand -hex 32` prints"
        )
    return found


def new_nonce() -> bytes:
    """Return bytes that were never used before."""
    return os.urandom(NONCE_BYTES)


def greeting(nonce: bytes) -> bytes:
    """What the meeting says first."""
    return MAGIC + nonce


def nonce_of_greeting(data: bytes) -> bytes:
    """Read what the meeting says first.

    Raises:
        WireError: somebody else listens there, or another version.
    """
    if len(data) != GREETING_BYTES or not data.startswith(MAGIC):
        raise WireError(f"what answers there is no meeting of this version of tricomm (it says {data[:24]!r})")
    return data[len(MAGIC) :]


def _derive(secret: bytes, word: bytes, nonces: bytes) -> bytes:
    return hmac.digest(secret, word + b"\n" + nonces, "sha256")


def answer(secret: bytes, meeting_nonce: bytes, nonce: bytes) -> bytes:
    """What a client answers: its own nonce and the proof."""
    return nonce + _derive(secret, b"client", meeting_nonce + nonce)


def accept(secret: bytes, meeting_nonce: bytes, data: bytes) -> tuple[bytes, "Seals"] | None:
    """At the meeting: (what to say, the seals) for a right answer, None for a wrong one."""
    if len(data) != ANSWER_BYTES:
        return None
    nonces = meeting_nonce + data[:NONCE_BYTES]
    if not hmac.compare_digest(data[NONCE_BYTES:], _derive(secret, b"client", nonces)):
        return None
    seals = Seals(_derive(secret, b"to client", nonces), _derive(secret, b"to meeting", nonces))
    return _derive(secret, b"meeting", nonces), seals


def confirm(secret: bytes, meeting_nonce: bytes, nonce: bytes, data: bytes) -> "Seals | None":
    """At the client: the seals if the meeting has shown that it knows the secret, None if it refused.

    Raises:
        WireError: it has shown nothing of the kind.
    """
    nonces = meeting_nonce + nonce
    if data == REFUSED:
        return None
    if not hmac.compare_digest(data, _derive(secret, b"meeting", nonces)):
        raise WireError("what answers there does not know the secret; see whether the address is right")
    return Seals(_derive(secret, b"to meeting", nonces), _derive(secret, b"to client", nonces))


class Seals:
    """The seals of one connection at one end.

    Args:
        sending, receiving: the keys.
    """

    def __init__(self, sending: bytes, receiving: bytes) -> None:
        self._sending = sending
        self._receiving = receiving
        self._sent = 0
        self._received = 0

    def seal(self, body: bytes) -> bytes:
        """Return the seal and the body, for the next place in the stream."""
        self._sent += 1
        return _seal(self._sending, self._sent, body) + body

    def open(self, sealed: bytes) -> bytes:
        """Return the body of what came next.

        Raises:
            WireError: it was not sealed by who knows the secret, or not for this place.
        """
        self._received += 1
        body = sealed[SEAL_BYTES:]
        if not hmac.compare_digest(sealed[:SEAL_BYTES], _seal(self._receiving, self._received, body)):
            raise WireError("a frame has a wrong seal: it was changed on the way, or put in by somebody else")
        return body


def _seal(key: bytes, place: int, body: bytes) -> bytes:
    return hmac.digest(key, INTEGER.pack(place) + body, "sha256")[:SEAL_BYTES]
