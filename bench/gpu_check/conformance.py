"""The rules of streams and NCCL, on a GPU: the part "rules"."""

from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from typing import Any

import torch
import torch.distributed as dist

from bench.gpu_check.parts import Outcome, Setting, guarded
from bench.gpu_check.rules import ONE_QUEUE_RULES, RULES
from bench.gpu_check.rules.bed import Bed, Laxer
from bench.gpu_check.transport import ranks_of
from tricomm.launch import Ranks
from tricomm.transport.accelerator import CUDA

NEW_KERNELS = ("erfinv", "lgamma", "digamma", "sinc", "i0", "logit", "frac", "erfc", "expm1", "log1p", "asinh", "acosh")
"""Functions of torch that nothing else here uses: each is loaded when it is first called."""
CYCLES_PER_SECOND = 1.5e9
"""Of a GPU's clock, about."""


class CudaBed:
    """See Bed: a rank of a group of gloo, and its GPU.

    Args:
        rank: of two.
        device: which both may share.
    """

    accelerator = CUDA

    def __init__(self, rank: int, device: torch.device) -> None:
        self.rank, self.device, self.name = rank, device, ""
        self._new_kernels = iter(NEW_KERNELS)
        self._numbers = torch.full((64,), 0.5, device=device)
        self.compute(0.0)
        torch.cuda.synchronize(device)

    def store(self, name: str) -> Any:
        """See Bed."""
        group: Any = dist.group.WORLD
        return dist.PrefixStore(f"rules/{name}", group.get_group_store())

    @staticmethod
    def barrier() -> None:
        """See Bed."""
        dist.barrier()

    def compute(self, seconds: float) -> None:
        """See Bed."""
        with torch.cuda.device(self.device):
            torch.cuda._sleep(int(seconds * CYCLES_PER_SECOND))  # type: ignore[no-untyped-call]

    def compute_anew(self) -> None:
        """See Bed."""
        with torch.cuda.device(self.device):
            getattr(torch, next(self._new_kernels))(self._numbers)


@cache
def bed_of(rank: int, device: str) -> CudaBed:
    """That of this process."""
    return CudaBed(rank, torch.device(device))


def keep(rank: int, index: int, has_one_queue: bool, setting: Setting) -> str:
    """Keep a rule; what was laxer. Runs on both ranks."""
    bed = bed_of(rank, setting.device)
    rule = (ONE_QUEUE_RULES if has_one_queue else RULES)[index]
    return kept(rule, bed)


def kept(rule: Callable[[Bed], None], bed: Bed) -> str:
    """Keep a rule on one rank; how its device is laxer, or ""."""
    bed.name = rule.__name__
    try:
        rule(bed)
    except Laxer as laxer:
        return str(laxer)
    return ""


def rules(setting: Setting) -> Iterator[Outcome]:
    """The part "rules"."""
    if setting.is_rehearsal:
        yield Outcome("rules", None, "kept by the stand-in for NCCL, in tests/standin; a rehearsal has no streams")
        return
    yield from _each(RULES, setting, has_one_queue=False)
    yield from _each(ONE_QUEUE_RULES, setting, has_one_queue=True)


def _each(rules: Sequence[Callable[[Bed], None]], setting: Setting, has_one_queue: bool) -> Iterator[Outcome]:
    left = list(enumerate(rules))
    environment = {"CUDA_DEVICE_MAX_CONNECTIONS": "1" if has_one_queue else "32"}
    while left:
        with ranks_of(setting, 2, environment=environment) as ranks:
            while left:
                index, rule = left.pop(0)
                outcome = guarded(rule.__name__, partial(told, ranks, rule, index, has_one_queue, setting))
                yield outcome
                if not outcome.passed:
                    break  # a rank may have been left in the middle: the other rules get new ones


def told(ranks: Ranks, rule: Callable[[Bed], None], index: int, has_one_queue: bool, setting: Setting) -> str:
    """Have both ranks keep a rule; what it says, or how this device is laxer."""
    found = [text for text in ranks.run(keep, index, has_one_queue, setting) if text]
    return f"laxer here: {found[0]}" if found else str(rule.__doc__).strip().splitlines()[0]
