"""The reduction of stacked contributions, in an order that does not depend on who reduces."""

import torch

_UNSIGNED_AS_SIGNED = {
    torch.uint16: torch.int16,
    torch.uint32: torch.int32,
    torch.uint64: torch.int64,
}


class Reducer:
    """Reduces n contributions to each of some tensors, ((c0 + c1) + c2) ..., into buffers made once.

    Floats of 16 bits and less are accumulated in float32 (complex32 in complex64) and rounded once; an average
    is the sum divided before that rounding.

    Args:
        op: sum, avg, max or min.
        divisor: what a sum or average is divided by at the end.
        dtype: of the contributions and of the result.
        shape: (tensors, n, ...) of the contributions on this rank.
        device: where.

    Attributes:
        parts: the contributions to each tensor, (n, ...), to be written.
        results: of the last reduction; the same tensors every time.
    """

    def __init__(
        self,
        op: str,
        divisor: int,
        dtype: torch.dtype,
        shape: tuple[int, ...],
        device: torch.device,
    ) -> None:
        self.op = op
        self.divisor = divisor
        with torch.inference_mode(False):  # also calls outside of that mode write the buffers
            self._make_buffers(op, dtype, shape, device)

    def _make_buffers(self, op: str, dtype: torch.dtype, shape: tuple[int, ...], device: torch.device) -> None:
        buffer = torch.empty(shape, dtype=dtype, device=device)
        self.parts = buffer.unbind(0)
        self._contributions = buffer.unbind(1)
        self._result = torch.empty((shape[0], *shape[2:]), dtype=dtype, device=device)
        self.results = self._result.unbind(0)
        wide = _accumulation_dtype(dtype)
        self.sum_in_place = wide == dtype
        self.total = self._result if self.sum_in_place else torch.empty_like(self._result, dtype=wide)
        self.flips_sign = op in ("max", "min") and dtype in _UNSIGNED_AS_SIGNED
        needs_addend = self.flips_sign or not self.sum_in_place
        self.addend = torch.empty_like(self.total) if needs_addend else None

    def reduce(self) -> None:
        """Make ``results`` the reductions of ``parts`` as they are now."""
        self._load(self._contributions[0], self.total)
        for addend in self._contributions[1:]:
            if self.addend is not None:
                self._load(addend, self.addend)
                addend = self.addend
            self._combine(self.total, addend)
        if self.flips_sign:
            self._load(self.total, self.total)
        if self.divisor != 1:
            self.total.div_(self.divisor)
        if not self.sum_in_place:
            self._result.copy_(self.total)

    def _load(self, contribution: torch.Tensor, into: torch.Tensor) -> None:
        """Copy in the dtype of accumulation; unsigned integers, which torch cannot compare, with the top bit
        flipped, which makes the signed order the unsigned one (and doing it twice undoes it).
        """
        if not self.flips_sign:
            into.copy_(contribution)
            return
        signed = _UNSIGNED_AS_SIGNED[contribution.dtype]
        top_bit = torch.iinfo(signed).min
        torch.bitwise_xor(contribution.view(signed), top_bit, out=into.view(signed))

    def _combine(self, total: torch.Tensor, addend: torch.Tensor) -> None:
        # Two's complement addition is the same bits for signed and unsigned.
        signed = _UNSIGNED_AS_SIGNED.get(total.dtype, total.dtype)
        total, addend = total.view(signed), addend.view(signed)
        if self.op == "max":
            torch.maximum(total, addend, out=total)
        elif self.op == "min":
            torch.minimum(total, addend, out=total)
        else:
            total.add_(addend)


def _accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    if dtype.is_floating_point and dtype.itemsize < 4:
        return torch.float32
    if dtype == torch.complex32:
        return torch.complex64
    return dtype
