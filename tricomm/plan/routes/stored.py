"""Routes as a file: arrays of integers and a line of JSON, so that reading one runs nothing and notices damage."""

import hashlib
import io
import json
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from tricomm.layout.columns import numbers
from tricomm.plan.parts import Part
from tricomm.plan.routes.chunks import Message
from tricomm.plan.routes.joined import Routes
from tricomm.plan.routes.rounds import Hop, Hops, hop_table
from tricomm.plan.routes.strategies import Strategy

FORMAT_VERSION = 2

COLUMNS = ("messages", "chains", "parents", "chunks", "parts", "dims", "intervals")
"""What each message, chain, and so on is, in order: see :func:`written`."""


def written(routes: Routes, key: str, strategies: Sequence[Strategy]) -> bytes:
    """Write routes as an npz of arrays of integers.

    Args:
        routes: of all ranks.
        key: text that determines them.
        strategies: among which theirs is.
    """
    columns: dict[str, list[int]] = {name: [] for name in COLUMNS}
    for message in routes.messages:
        parents = message.parents or ()
        columns["messages"] += (len(message.chain), len(parents), len(message.chunks), message.in_one_call)
        columns["chains"] += message.chain
        columns["parents"] += parents
        for chunk in message.chunks:
            columns["chunks"].append(len(chunk))
            for part in chunk:
                columns["parts"] += (part.stack, part.itemsize, len(part.region))
                for intervals in part.region:
                    columns["dims"].append(len(intervals))
                    for interval in intervals:
                        columns["intervals"] += interval
    arrays = {name: numbers(values, len(values)) for name, values in columns.items()}
    arrays["hops"] = hop_table(routes.hops).astype(np.int64)
    header = {
        "version": FORMAT_VERSION,
        "key": _hash(key.encode(errors="surrogatepass")),
        "strategy": strategies.index(routes.strategy),
        "digest": _digest(arrays),
    }
    file = io.BytesIO()
    arrays["header"] = np.frombuffer(json.dumps(header).encode(), np.uint8)
    np.savez_compressed(file, allow_pickle=False, **arrays)
    return file.getvalue()


def read(content: bytes, key: str, strategies: Sequence[Strategy]) -> Routes:
    """Read what :func:`written` wrote.

    Raises:
        ValueError: it is of another version or of another key, or it is damaged.
    """
    with np.load(io.BytesIO(content), allow_pickle=False) as file:
        header = json.loads(file["header"].tobytes())
        if header["version"] != FORMAT_VERSION:
            raise ValueError(f"its format is {header['version']}, and this tricomm reads {FORMAT_VERSION}")
        arrays = {name: file[name] for name in (*COLUMNS, "hops")}
    if header["key"] != _hash(key.encode(errors="surrogatepass")):
        raise ValueError("it is of another plan")
    if header["digest"] != _digest(arrays):
        raise ValueError("its contents do not have the digest that it says")
    hops = arrays.pop("hops").reshape(-1, len(Hop._fields))
    return Routes(strategies[header["strategy"]], tuple(_messages(arrays)), Hops(hops))


def _messages(arrays: Mapping[str, np.ndarray]) -> Iterator[Message]:
    shape, chain, parent, chunk, part, dim, interval = (iter(arrays[name].tolist()) for name in COLUMNS)

    def taken(values: Iterator[int], count: int) -> tuple[int, ...]:
        return tuple([next(values) for _ in range(count)])

    def parts(count: int) -> Iterator[Part]:
        for _ in range(count):
            stack, itemsize, dims = taken(part, 3)
            region = [tuple([(next(interval), next(interval)) for _ in range(next(dim))]) for _ in range(dims)]
            yield Part(stack, itemsize, tuple(region))

    for _ in range(len(arrays["messages"]) // 4):
        ranks, parents, chunks, is_one_call = taken(shape, 4)
        yield Message(
            taken(chain, ranks),
            tuple([tuple(parts(next(chunk))) for _ in range(chunks)]),
            taken(parent, parents) or None,
            bool(is_one_call),
        )


def _digest(arrays: Mapping[str, np.ndarray]) -> str:
    """Hash arrays, with their names, types and lengths."""
    return _hash(
        b"".join(
            json.dumps([name, str(array.dtype), array.shape]).encode() + array.tobytes()
            for name, array in sorted(arrays.items())
        )
    )


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
