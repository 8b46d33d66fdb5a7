"""Moves between processes that share one GPU, by its memory, without NCCL: exact, how fast, and when a rank fails.

By way of an arena, and straight from tensors that stay in place.
"""

import os
import signal
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from bench.gpu_check.local import CASES, Case, full_of, spec
from bench.gpu_check.parts import Outcome, Setting, guarded
from bench.gpu_check.transport import Check, checked, exact_moves, finish, ranks_of, told
from tricomm import Mesh, Replicate, Resharder, SendRecv, Shard, ShardingSpec, TransportError, local_shard, make_plan
from tricomm.launch import Ranks

VICTIM = 1
CALLS = 10
"""Of one move, queued one after the other."""
SMALL_CALLS = 50
COLUMNS = 1 << 14
"""Of float32, in a row of 64 KiB."""
GIB = 1 << 30
PULLED_NBYTES = (GIB // 16, GIB, 8 * GIB)
"""The size of the tensor that stays in place: what a call costs beside its bytes counts less for more of them."""
REHEARSED_SIZE = 1 << 7
STAYS: dict[str, Any] = {"strategy": SendRecv(), "stays_in_place": True}
LONG_ROUNDS: dict[str, Any] = {"strategy": SendRecv(1 << 27), "staging_bytes": 1 << 30}
"""By way of the arena, with fewer turns of the processes."""
SIDES = {
    "1 to 1": ([0], [1]),
    "2 to 2": ([0, 1], [2, 3]),
    "1 to 3 replicas": ([0], [1, 2, 3]),
    "2 among themselves": ([0, 1], [0, 1]),
    "4 among themselves": ([0, 1, 2, 3], [0, 1, 2, 3]),
}


def moves(setting: Setting) -> Iterator[Outcome]:
    """The part "memory"."""
    checks: list[Check] = []
    if setting.is_rehearsal:
        yield Outcome("exact", None, "kept by the stand-in for devices, in tests/transport/device; here are none")
    else:
        checks += exact_moves(setting, "memory")
    checks += [(f"{name}, staying", _exact(setting, case)) for name, case in STAYING.items()]
    checks.append(("many, staying", lambda ranks: told(ranks, many_stay, setting)))
    for nbytes in PULLED_NBYTES[: setting.scaled(len(PULLED_NBYTES), 1)]:
        size = f"{nbytes >> 20} MiB staying"
        checks += [(f"{name}, {size}", _rate_of(setting, name, nbytes, STAYS)) for name in SIDES]
    checks += [(name, _rate_of(setting, name, GIB, {})) for name in SIDES]
    if not setting.is_rehearsal:
        checks += [(f"{name}, long rounds", _rate_of(setting, name, GIB, LONG_ROUNDS)) for name in SIDES]
    for stays in (True, False):
        text = "4 KiB, staying" if stays else "4 KiB"
        checks.append((text, partial(_latency, setting=setting, stays=stays)))
    yield from checked(setting, checks)
    for how in ("stays away", "stops", "dies"):
        with ranks_of(setting, 2) as ranks:
            yield guarded(f"a rank that {how}", partial(_failure, ranks, how, setting))


def _options(setting: Setting, **more: Any) -> dict[str, Any]:
    return {"device": setting.device, "timeout_seconds": 0.1 * setting.seconds, "transport": "memory", **more}


# ---- exact, where tensors stay in place

STAYING: dict[str, Case] = {
    **{name: case for name, case in CASES.items() if name not in ("one call, among all and some", "reduce")},
    "cast up": (spec([0, 1], Shard(1), "bfloat16"), spec([1, 2, 3], Shard(0), "float32"), SendRecv()),
    "replicas": (spec([0, 1], Shard(0)), spec([1, 2, 3], Replicate()), SendRecv()),
    "bytes": (spec([0, 1, 2], Shard(1), "uint8"), spec([3, 1], Shard(0), "uint8"), SendRecv()),
}


def _exact(setting: Setting, case: Case) -> Callable[[Ranks], str]:
    return lambda ranks: told(ranks, stayed, case, setting)


def stayed(rank: int, case: Case, setting: Setting) -> bool:
    """Whether calls bring what is in a tensor that stays in place, transposed there, and is written in between."""
    source, destination, strategy = case
    before, after = full_of(source, destination)
    tensor = None
    if rank in source.mesh:
        shard = local_shard(before, source, rank).to(setting.device)
        tensor = torch.zeros_like(shard).t().contiguous().t()
    expected = local_shard(after, destination, rank) if rank in destination.mesh else None
    with Resharder(source, destination, strategy=strategy, **_options(setting, stays_in_place=True)) as mover:
        first = mover(tensor)
        if tensor is not None:
            tensor.copy_(shard)
        results = [mover(tensor), mover(tensor), mover.start(tensor).wait()]
    is_zero = first is None or not bool(first.any())
    return is_zero and all(
        result is None if expected is None else result is not None and torch.equal(result.cpu(), expected)
        for result in results
    )


def many_stay(rank: int, setting: Setting) -> bool:
    """Whether many tensors come that share a piece of memory, one without elements among them; runs on every rank."""
    before, after = Mesh([0, 1], ("x",)), Mesh([3, 2, 1], ("y",))
    rows = [7, 0, 515, 64, 3]
    source = {str(at): ShardingSpec(before, (Shard(0),), (n, 96), "float32") for at, n in enumerate(rows)}
    target = {name: ShardingSpec(after, (Shard(1),), dtype="bfloat16") for name in source}
    whole = {str(at): (torch.arange(n * 96.0) % 251).reshape(n, 96) for at, n in enumerate(rows)}
    given: dict[str, torch.Tensor] = {}
    if rank in before.ranks:
        pool, first = torch.zeros(1 + 96 * sum(rows), device=setting.device), 1
        for name, one in source.items():
            shape = one.local_shape(rank)
            given[name] = pool[first : first + shape[0] * 96].view(shape)
            first += shape[0] * 96
            given[name].copy_(local_shard(whole[name], one, rank))
    with Resharder(source, target, strategy=SendRecv(), **_options(setting, stays_in_place=True)) as mover:
        results = [mover(given), mover(given)]
        straight = {way.rung.value for way in mover.transports.values()}
    expected = {
        name: local_shard(whole[name].bfloat16(), one.resolved(source[name]), rank)
        for name, one in target.items()
        if rank in after.ranks
    }
    is_exact = all(torch.equal(found[name].cpu(), one) for found in results for name, one in expected.items())
    return is_exact and (setting.is_rehearsal or rank == 0 or "CUDA IPC, straight from the tensors" in straight)


# ---- how fast


def _rate_of(setting: Setting, name: str, nbytes: int, more: dict[str, Any]) -> Callable[[Ranks], Any]:
    return lambda ranks: _rate(ranks, name, nbytes, more, setting)


def _rate(ranks: Ranks, name: str, nbytes: int, more: dict[str, Any], setting: Setting) -> tuple[str, dict[str, Any]]:
    found = [one for one in ranks.run(seconds_of, name, nbytes, more, setting) if one is not None]
    copied = ranks.run(copy_seconds, setting)[0]
    seconds, (delivered, crossing) = max(one[0] for one in found), found[0][1]
    ways = sorted({way for one in found for way in one[2]})
    rate, copy_rate = delivered / seconds, copied[1] / copied[0]
    text = f"{delivered >> 20} MiB a call, {crossing / delivered:.0%} of another process, in {seconds * 1e3:.2f} ms: "
    text += f"{rate / 1e9:.0f} GB/s, {rate / copy_rate:.0%} of the copy ({copy_rate / 1e9:.0f}); by {', '.join(ways)}"
    figures = {"seconds": seconds, "delivered_nbytes": delivered, "crossing_nbytes": crossing, "ways": ways}
    return text, {**figures, "copy_seconds": copied[0], "copy_nbytes": copied[1], "of": found}


def _shape(setting: Setting, nbytes: int = GIB) -> tuple[int, int]:
    return setting.scaled(nbytes // (4 * COLUMNS), REHEARSED_SIZE), setting.scaled(COLUMNS, REHEARSED_SIZE)


def copy_seconds(rank: int, setting: Setting) -> tuple[float, int]:
    """(seconds, bytes) of a copy on the device, the best of some; rank 0 makes it while the others wait."""
    source = torch.ones(_shape(setting), device=setting.device)
    target = torch.zeros_like(source)
    times = 3 if rank == 0 else 0
    return min((_per_call(lambda: target.copy_(source), setting) for _ in range(times)), default=0.0), source.nbytes


def _per_call(call: Callable[[], object], setting: Setting, calls: int = CALLS) -> float:
    for _ in range(2):
        call()
    finish(setting)
    begin = time.perf_counter()
    for _ in range(calls):
        call()
    finish(setting)
    return (time.perf_counter() - begin) / calls


def seconds_of(
    rank: int, name: str, nbytes: int, more: dict[str, Any], setting: Setting
) -> tuple[float, tuple[int, int], list[str]] | None:
    """(seconds a call, bytes that are there after it and that crossed, ways) of rows to columns; runs on every rank."""
    before, after = (Mesh(side, ("x",)) for side in SIDES[name])
    layout = Replicate() if "replicas" in name else Shard(1)
    shape = _shape(setting, nbytes)
    source, target = ShardingSpec(before, (Shard(0),), shape, "float32"), ShardingSpec(after, (layout,))
    if rank not in (*before.ranks, *after.ranks):
        return None
    values = torch.arange(float(shape[1]), device=setting.device)
    tensor = values.expand(source.local_shape(rank)).contiguous() if rank in before.ranks else None
    target = target.resolved(source)
    out = torch.zeros(target.local_shape(rank), device=setting.device) if rank in after.ranks else None
    with Resharder(source, target, name=name, **_options(setting, **more)) as mover:
        seconds = _per_call(partial(mover, tensor, out=out), setting)
        used = [pair for pair in mover.transports if pair[0] in before.ranks and pair[1] in after.ranks]
        ways = [str(mover.transports[pair]) for pair in used]
    if out is not None:
        first = 0 if "replicas" in name else after.ranks.index(rank) * out.shape[1]
        if any(not bool((part == values[first : first + out.shape[1]]).all()) for part in torch.split(out, 1 << 14)):
            raise ValueError(f"what came to rank {rank} is wrong")
    copies = len(after.ranks) if "replicas" in name else 1
    return seconds, (4 * shape[0] * shape[1] * copies, make_plan(source, target).wire_nbytes), ways


def _latency(ranks: Ranks, setting: Setting, stays: bool) -> tuple[str, dict[str, Any]]:
    queued, done = ranks.run(small_seconds, stays, setting)[0]
    text = f"queued in {queued * 1e6:.0f} us; with confirm=True there on both in {done * 1e6:.0f} us"
    return text, {"queued_seconds": queued, "confirmed_seconds": done}


def small_seconds(rank: int, stays: bool, setting: Setting) -> tuple[float, float]:
    """Seconds of a call of 4 KiB from rank 0 to 1 until it returns, and until it is confirmed."""
    if rank >= 2:
        return 0.0, 0.0
    found = [0.0, 0.0]
    source, target = (ShardingSpec(Mesh([one], ("x",)), (Replicate(),), (1024,), "float32") for one in range(2))
    tensor, out = (torch.ones(1024, device=setting.device) if rank == one else None for one in range(2))
    for at, confirm in enumerate((False, True)):
        with Resharder(source, target, **_options(setting, confirm=confirm, stays_in_place=stays)) as mover:
            call = partial(mover, tensor, out=out)
            _per_call(call, setting)
            begin = time.perf_counter()
            for _ in range(SMALL_CALLS):
                call()
            found[at] = (time.perf_counter() - begin) / SMALL_CALLS
            finish(setting)
    return found[0], found[1]


# ---- when a rank fails


def _failure(ranks: Ranks, how: str, setting: Setting) -> str:
    limit = 0.06 * setting.seconds
    if how == "stays away":
        texts = ranks.run(lose, how, limit, setting)
    else:
        ranks.start(lose, how, limit, setting)
        texts = ranks.collect([0])
    seconds, text = texts[0]
    if f"rank {VICTIM} " not in text.split(";")[0] or seconds > 1.5 * limit:
        raise ValueError(f"after {seconds:.1f} s of {limit:.1f}: {text!r}")
    if how == "stops":
        os.kill(ranks._processes[VICTIM].pid, signal.SIGKILL)
    return f"named after {seconds:.1f} s of {limit:.1f}, and this rank goes on: {text[:80]}"


def lose(rank: int, how: str, limit: float, setting: Setting) -> tuple[float, str]:
    """(seconds until, text of the error) on rank 0 of a call that rank 1 does not come to; then both call again."""
    size = setting.scaled(1 << 22, 1 << 8)
    source, target = (ShardingSpec(Mesh([0, 1], ("x",)), (Shard(dim),), (64, size // 64), "float32") for dim in (0, 1))
    shard = torch.full(source.local_shape(rank), float(rank), device=setting.device)
    stays = how != "stays away"
    mover = Resharder(source, target, **_options(setting, timeout_seconds=limit, stays_in_place=stays))
    mover(shard)
    finish(setting)
    begin, text = time.monotonic(), ""
    if rank == VICTIM:
        if how != "stays away":
            os.kill(os.getpid(), signal.SIGKILL if how == "dies" else signal.SIGSTOP)
        time.sleep(1.3 * limit)
    else:
        try:
            for _ in range(2):
                mover(shard)
                finish(setting)
        except TransportError as error:
            text = str(error)
    seconds = time.monotonic() - begin
    if how == "stays away":
        for attempt in range(4):  # ranks that were late catch up by calling again
            try:
                out = mover(shard)
                finish(setting)
                break
            except TransportError:
                if attempt == 3:
                    raise
        assert out is not None
        if not bool((out[:32] == 0).all() and (out[32:] == 1).all()):
            raise ValueError("what came after the failure is wrong")
    elif float((shard + 1).sum()) < 0:
        raise ValueError("this rank does not compute any more")
    return seconds, text
