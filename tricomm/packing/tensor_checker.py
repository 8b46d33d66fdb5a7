"""Local tensors against their specs: the last check before anything is sent."""

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any

import torch
from torch.autograd.graph import increment_version

from tricomm.compiled.registry import is_in_fake_mode
from tricomm.errors import ArgumentError, SpecError
from tricomm.layout.dtype import OPAQUE, dtype_name
from tricomm.layout.spec import ShardingSpec
from tricomm.packing import remedies
from tricomm.packing.copy_program import torch_dtype
from tricomm.packing.holdings import tensors_of_rank
from tricomm.packing.overlap import find_shared, has_shared_elements, share_memory
from tricomm.packing.selection import Planned
from tricomm.plan import Plan

NamedTensors = Mapping[str, torch.Tensor | None] | Mapping[str, torch.Tensor]

Given = torch.Tensor | NamedTensors | None
"""What a caller passes: a tensor, or many by name; None where the rank has none."""

DENSE = frozenset((torch.Tensor, torch.nn.Parameter))
"""Types of tensors whose elements are where they say."""

_is_in_transform = torch._C._are_functorch_transforms_active  # a call has no time to look it up
_count_modes = torch._C._len_torch_dispatch_stack
_strided = torch.strided

IN_A_TRANSFORM = (
    "tricomm was called inside of a torch.func transform (vmap, grad, jvp), where tensors have no memory of their own; "
    "call it outside, or use torch.autograd for gradients"
)

IN_A_FAKE_MODE = (
    "tricomm was called inside of a FakeTensorMode of torch, where nothing is copied, and not with one fake tensor; "
    "call it outside, or pass mode.from_tensor(tensor) alone for the shape of the result, which asks no other rank"
)


class TensorChecker:
    """What one rank passes in and gets out of a plan, computed once, checked on every call.

    Args:
        plan: the plan.
        rank: whose side.
        device: where the tensors must be.
    """

    def __init__(self, plan: Planned, rank: int, device: torch.device) -> None:
        self.plan = plan
        self.rank = rank
        self.device = device
        ends, (sources, destinations) = plan.ends, tensors_of_rank(plan, rank)
        self._known: dict[ShardingSpec, ItemChecker] = {}
        self._known_objects: dict[int, ItemChecker] = {}
        self._sources = {ends.sources[number].name: self._checker(ends.sources[number].spec) for number in sources}
        self._destinations = {
            ends.destinations[number].name: self._checker(ends.destinations[number].spec) for number in destinations
        }
        self._unread = {one.name for one in ends.sources if rank in one.spec.mesh} - self._sources.keys()
        """What no rule reads: it may be given, and stays where it is."""
        is_alone = isinstance(plan, Plan) and not plan.is_mapping
        self._only = ItemChecker(ends.sources[0].spec, ends.destinations[0].spec, rank, device) if is_alone else None
        """Of a tensor that was planned alone."""
        self._names = {one.name for one in ends.sources}, {one.name for one in ends.destinations}

    def _checker(self, spec: ShardingSpec) -> "ItemChecker":
        """The checker of a layout on either side; layouts are often the same object, and hashing them takes time."""
        if id(spec) not in self._known_objects:
            if spec not in self._known:
                self._known[spec] = ItemChecker(spec, spec, self.rank, self.device)
            self._known_objects[id(spec)] = self._known[spec]
        return self._known_objects[id(spec)]

    @property
    def source_names(self) -> list[str]:
        """Of what ``check`` gives."""
        return [*self._sources]

    def check(self, given: Given, out: Given) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Check what a call was given, before anything is sent.

        Returns:
            The sources as the runtime takes them (detached, lazy conjugation resolved): those that the rank holds, in
            the order of the plan's ends; and those that receive the result: ``out`` if it is given, else new ones.

        Raises:
            SpecError: one is missing, given where the rank holds none, of another kind, shape, dtype or device; or one
                to be written shares memory with a source, with another, or with itself.
        """
        if (_is_in_transform() or _count_modes()) and (problem := describe_transform()):
            raise SpecError(problem)
        only = self._only
        if only is None:
            sources = self._many_sources(given)
            return sources, self._many_outs(out, sources)
        sources = [only.check_source("the tensor", given)] if only.has_source or given is not None else []
        return sources, [only.check_out("out", out, sources)] if only.has_destination or out is not None else []

    def _many_sources(self, given: Given) -> list[torch.Tensor]:
        tensors = self._by_name("tensor", given, self._sources)
        sources = []
        for name, checker in self._sources.items():
            tensor = tensors.get(name)
            if isinstance(tensor, torch.Tensor) and tensor.requires_grad and torch.is_grad_enabled():
                raise SpecError(
                    f"tensor {name!r} of rank {self.rank} requires grad, and gradients do not come back through a "
                    "mapping; call under torch.no_grad(), pass tensor.detach(), or move it alone"
                )
            sources.append(checker.check_source(f"tensor {name!r}", tensor))
        return sources

    def _many_outs(self, out: Given, sources: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        if out is None:
            return [checker.check_out("out", None, ()) for checker in self._destinations.values()]
        tensors = self._by_name("out", out, self._destinations)
        outs = []
        for name, checker in self._destinations.items():
            if tensors.get(name) is None:
                raise SpecError(f"out of rank {self.rank} has no tensor {name!r}; give all of them, or leave out=None")
            outs.append(checker.check_out(f"out[{name!r}]", tensors[name], ()))
        self._check_apart(outs, sources)
        return outs

    def result(self, destinations: Sequence[torch.Tensor]) -> Any:
        """What the caller gets: the tensor or None, or a dict by name of those that the rank holds."""
        if self._only is None:
            return dict(zip(self._destinations, destinations, strict=True))
        return destinations[0] if destinations else None

    def _by_name(self, what: str, given: Given, held: Mapping[str, Any]) -> Mapping[str, Any]:
        """The mapping that was given, without names that mean nothing."""
        if given is None:
            given = {}
        if not isinstance(given, Mapping):
            raise ArgumentError(
                f"{what} of rank {self.rank} is a {type(given).__name__}, and this plan is of many tensors; "
                f"{remedies.of_many(given)}"
            )
        names = self._names[what == "out"]
        for name, tensor in given.items():
            if name not in names:
                near = get_close_matches(str(name), [*names][:2000], 1)
                hint = f"did you mean {near[0]!r}?" if near else "take it out, or plan it"
                raise SpecError(
                    f"{what} of rank {self.rank} has {name!r}, which is none of the {len(names)} tensors that "
                    f"were planned; {hint}"
                )
            if tensor is not None and name not in held and not (what == "tensor" and name in self._unread):
                side = "destination" if what == "out" else "source"
                raise SpecError(
                    f"{what} of rank {self.rank} has {name!r}, and the rank is not on the {side} mesh of that tensor; "
                    "take it out there, or pass None"
                )
        return given

    def _check_apart(self, outs: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> None:
        """Refuse tensors to be written that share memory with each other, or with one that is read."""
        pair = find_shared(outs, sources)
        if pair is None:
            return
        first, second = pair
        written, read = [*self._destinations], [*self._sources]
        every = [*(f"out[{name!r}]" for name in written), *(f"tensor {name!r}" for name in read)]
        kept, *other = (written[one] for one in pair if one < len(written))
        remedy = remedies.of_tied(kept, other[0]) if other else "pass another tensor, or leave out=None"
        raise SpecError(
            f"{every[first]} of rank {self.rank} shares memory with {every[second]}; what is written must be "
            f"apart from all else: {remedy}"
        )


class ItemChecker:
    """What one rank passes in and gets out of an item, or of any of equal layouts.

    Args:
        source, destination: its layouts.
        rank: whose side.
        device: where the tensors must be.

    Attributes:
        has_source, has_destination: whether the rank is on the mesh, and has something to check.
    """

    def __init__(self, source: ShardingSpec, destination: ShardingSpec, rank: int, device: torch.device) -> None:
        self._source, self._destination = source, destination
        self._rank = rank
        self._device = device
        self.has_source, self.has_destination = rank in source.mesh, rank in destination.mesh
        self._source_shape = source.local_shape(rank) if self.has_source else ()
        self._source_dtype = torch_dtype(source.element_type)
        self._destination_shape = destination.local_shape(rank) if self.has_destination else ()
        self._destination_dtype = torch_dtype(destination.element_type)

    def check_source(self, name: str, tensor: Given) -> torch.Tensor:
        """See TensorChecker; refuses what is given off the source mesh."""
        if not self.has_source:
            _refuse_many(name, tensor)
            raise SpecError(
                f"rank {self._rank} gave a tensor of shape {_shape(tensor)} but is not on the source mesh "
                f"{self._source.mesh}; pass None there"
            )
        if tensor is None:
            which = "no tensor" if name == "the tensor" else f"no {name}"
            raise SpecError(
                f"rank {self._rank} is on the source mesh {self._source.mesh} and gave {which}; "
                f"pass its shard of shape {self._source_shape} and dtype {self._source.dtype}"
            )
        tensor = self._checked("source", name, tensor, self._source_shape, self._source_dtype)
        if tensor.is_conj() or tensor.is_neg():
            tensor = tensor.resolve_conj().resolve_neg()
        return tensor.detach() if tensor.requires_grad else tensor

    def check_out(self, name: str, out: Given, sources: Sequence[torch.Tensor]) -> torch.Tensor:
        """See TensorChecker; refuses what is given off the destination mesh."""
        if not self.has_destination:
            _refuse_many(name, out)
            raise SpecError(
                f"rank {self._rank} gave {name} of shape {_shape(out)} but is not on the destination mesh "
                f"{self._destination.mesh}; pass None there"
            )
        if out is None:
            return _empty(self._destination_shape, self._destination_dtype, self._device)
        out = self._checked("out", name, out, self._destination_shape, self._destination_dtype)
        if out.is_conj() or out.is_neg():
            raise SpecError(f"{name} of rank {self._rank} is a lazy conjugate or negative; pass a plain tensor")
        if out.requires_grad and torch.is_grad_enabled():
            raise SpecError(
                f"{name} of rank {self._rank} requires grad and would be written in place; call under torch.no_grad() "
                "or pass out.detach()"
            )
        if not out.is_contiguous() and has_shared_elements(out):
            raise SpecError(
                f"{name} of rank {self._rank} is expanded or overlaps itself (strides {out.stride()}), so several "
                "elements share memory; pass a tensor without shared elements, as torch.empty(...), or leave out=None"
            )
        for source in sources:
            if share_memory(source, out):
                raise SpecError(
                    f"{name} of rank {self._rank} shares memory with its source tensor, which must stay untouched; "
                    "pass another tensor or leave out=None"
                )
        return out.detach() if out.requires_grad else out

    def _checked(self, role: str, name: str, tensor: Any, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        rank = self._rank
        is_plain = type(tensor) in DENSE and tensor.layout is _strided
        if not is_plain or tensor.is_quantized or tensor.is_nested:
            _refuse_many(name, tensor)
            raise ArgumentError(
                f"{name} of rank {rank} is {_kind(tensor)}, and a plain dense torch.Tensor is expected; "
                f"{remedies.of_kind(tensor, role)}"
            )
        if tensor.shape != shape:
            raise SpecError(
                f"{name} of rank {rank} has shape {tuple(tensor.shape)}, and its spec gives it {shape}; "
                f"{remedies.of_shape(role)}"
            )
        if tensor.dtype is not dtype:
            raise SpecError(
                f"{name} of rank {rank} has dtype {tensor.dtype}, and its spec says {dtype}; "
                f"{remedies.of_dtype(dtype, role)}"
            )
        if tensor.device != self._device:
            raise SpecError(
                f"{name} of rank {rank} is on {tensor.device}, and this call works on {self._device}; "
                f"{remedies.of_device(tensor.device, self._device, role)}"
            )
        here = tensor.untyped_storage().nbytes()
        if here < tensor.nbytes and here < _reach_nbytes(tensor):
            raise SpecError(
                f"{name} of rank {rank} has shape {shape} and no memory for it: its storage has {here} bytes, as after "
                "untyped_storage().resize_(0), which FSDP does between uses; give it its memory back before the call "
                f"(unshard, gather), or {'pass another tensor' if role == 'source' else 'leave out=None'}"
            )
        checked: torch.Tensor = tensor
        return checked


def _reach_nbytes(tensor: torch.Tensor) -> int:
    """How many bytes of its storage a tensor with elements needs: up to its last one."""
    last = sum((extent - 1) * stride for extent, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return int(tensor.storage_offset() + last + 1) * tensor.itemsize


def _empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Make a tensor to be filled. In deterministic mode torch fills it too, which it cannot for types of bare bits."""
    word = {1: torch.uint8, 2: torch.int16}.get(dtype.itemsize)
    if word is None or dtype_name(dtype) not in OPAQUE:
        return torch.empty(shape, dtype=dtype, device=device)
    return torch.empty(shape, dtype=word, device=device).view(dtype)


def describe_transform() -> str | None:
    """Say that a transform of torch.func or a FakeTensorMode is at work, where no elements can be moved; else None."""
    if _is_in_transform():
        return IN_A_TRANSFORM
    return IN_A_FAKE_MODE if is_in_fake_mode() else None


def check_casts(plan: Plan) -> None:
    """Refuse a cast that this torch does not have.

    Raises:
        SpecError: torch cannot cast the source's dtype to the destination's.
    """
    pairs = dict.fromkeys((one.source.element_type, one.destination.element_type) for one in plan.classes)
    for source, destination in pairs:
        if source == destination:
            continue
        try:
            torch.empty(1, dtype=torch_dtype(source), device="cpu").to(torch_dtype(destination))
        except (RuntimeError, NotImplementedError) as error:
            raise SpecError(
                f"this torch {torch.__version__} cannot cast {source} to {destination} ({error}); cast the tensor "
                "yourself"
            ) from error


def _refuse_many(name: str, given: Given) -> None:
    """Refuse a mapping where a plan is of one tensor."""
    if isinstance(given, Mapping):
        raise ArgumentError(
            f"{name} is a mapping, and the layouts are of one tensor; pass a tensor, or layouts as "
            "{name: ShardingSpec}"
        )


def bump_versions(out: Given) -> None:
    """Tell autograd that tensors were written."""
    for tensor in (out,) if isinstance(out, torch.Tensor) else (out or {}).values():
        if tensor is not None and not tensor.is_inference():
            increment_version(tensor)


def _shape(tensor: object) -> object:
    return tuple(tensor.shape) if isinstance(tensor, torch.Tensor) else type(tensor).__name__


def _kind(tensor: object) -> str:
    """What a tensor is that is not plain, or what is no tensor."""
    if type(tensor) in (torch.Tensor, torch.nn.Parameter):
        assert isinstance(tensor, torch.Tensor)
        what = "nested" if tensor.is_nested else "quantized" if tensor.is_quantized else f"of layout {tensor.layout}"
        return f"a {type(tensor).__name__} that is {what}"
    return f"a {type(tensor).__name__}"
