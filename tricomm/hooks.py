"""Hooks: what a rank does with its tensors before they are sent, and with those that have come once a module is whole.

Rules say where elements belong; what changes their values (quantisation and its scales, a norm that is stored plus
one) or is a private format of kernels is code, and belongs into a hook.
"""

import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from tricomm.errors import ArgumentError, SpecError, shown
from tricomm.kinds import checks_kinds
from tricomm.layout.blocks import checked_blocks, first_cut_inside
from tricomm.layout.spec import ShardingSpec
from tricomm.rules.names import Scope, frozen, references

BeforeHook = Callable[[str, dict[str, Any]], Mapping[str, Any]]
"""Given a module's name and what of it was given to the call, returns what of it is sent."""

AfterHook = Callable[[str, dict[str, Any]], None]
"""Given a module's name and those of its tensors that have come."""


@dataclass(frozen=True, slots=True, init=False)
class Hooks:
    """Functions that a Resharder of many tensors calls for modules, on the ranks that hold or need some of them.

    A module is named by what the names of its tensors begin with: "layers.3" has "layers.3.wq", and "layers.3.wq" has
    itself alone; "" is everything. Names may hold index variables in braces, as in rules. Hooks are a rank's own: a
    trainer has some and a server others, and they are not compared.

    In every call each hook is called once for a module, in the order in which they are written:

    - ``before`` on a rank that sends some of the module, ahead of all else: ``hook(module, tensors)`` gets those of the
      tensors given to the call whose names are in the module, and returns those that are sent. So one weight can become
      a weight and its scales. A tensor has one such hook at most.
    - ``after`` on a rank that needs some of it, when all of the call has come (with ``confirm``, to all ranks; with
      ``checksum``, compared): ``hook(module, tensors)`` gets the module's tensors as the call returns them. What is
      derived from them is refreshed here. After a call that failed it is not called. Where calls with ``only=`` move a
      module in parts, it is called by the one after which all of its tensors have come, with all of them.

    If a hook raises, so does the call. Of a ``before`` the other ranks are told, and their call raises too; after an
    ``after`` they have all that they need and go on, so that the next call is the next one of all: a server that must
    not go on alone says so by ``Resharder.abort``. A hook that calls its own Resharder is refused. ``start`` calls
    ``before`` at once, and ``after`` on the thread that moves, before ``wait`` returns. ``Resharder.reverse`` has none.

    Args:
        before, after: hooks by the name of their module.
        blocks: the size of blocks by the name of a tensor, such as (128, 128) where each has a scale: layouts that cut
            one are refused. ``ShardingSpec.on_blocks`` gives layouts that do not.
        indices: the values of each index variable (a range or a list), and tables, by name.

    Raises:
        ArgumentError: not such mappings.
        SpecError: an index has no values.

    Example:
        >>> import torch, torch.distributed as dist
        >>> from tricomm import Hooks, Mesh, Replicate, Resharder, ShardingSpec
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # a job of one rank
        >>> spec = ShardingSpec(Mesh([0], ("tp",)), (Replicate(),), (2,), "float32")
        >>> specs = {"l.0.w": spec, "l.0.scale": spec}
        >>> def scaled(module, tensors):
        ...     weight = tensors[f"{module}.w"]
        ...     return {f"{module}.w": weight / weight.max(), f"{module}.scale": weight.max().expand(2)}
        >>> hooks = Hooks(before={"l.{l}": scaled}, after={"l.{l}": lambda module, _: print(module, "has come")}, l=[0])
        >>> mover = Resharder(specs, specs, hooks=hooks)
        >>> moved = mover({"l.0.w": torch.tensor([2.0, 4.0])})
        l.0 has come
        >>> moved
        {'l.0.scale': tensor([4., 4.]), 'l.0.w': tensor([0.5000, 1.0000])}
        >>> dist.destroy_process_group()
    """

    before: tuple[tuple[str, BeforeHook], ...]
    after: tuple[tuple[str, AfterHook], ...]
    blocks: tuple[tuple[str, tuple[int, ...]], ...]
    scope: Scope

    def __init__(
        self,
        before: Mapping[str, BeforeHook] | None = None,
        after: Mapping[str, AfterHook] | None = None,
        *,
        blocks: Mapping[str, Sequence[int]] | None = None,
        **indices: object,
    ) -> None:
        for option, given in (("before", before), ("after", after)):
            if given is not None and not isinstance(given, Mapping):
                raise ArgumentError(
                    f"{option}={shown(given)} is no mapping; write {option}={{'layers.{{l}}': function}}"
                )
            for module, run in (given or {}).items():
                if not isinstance(module, str) or not callable(run):
                    raise ArgumentError(
                        f"{option}={{{shown(module)}: {shown(run)}}} is no function under the name of a module"
                    )
            object.__setattr__(self, option, tuple((given or {}).items()))
        if blocks is not None and not isinstance(blocks, Mapping):
            raise ArgumentError(f"blocks={shown(blocks)} is no mapping; write blocks={{'layers.{{l}}.w': (128, 128)}}")
        sizes = {name: checked_blocks(size, None) for name, size in (blocks or {}).items()}
        object.__setattr__(self, "blocks", tuple(sizes.items()))
        scope = Scope(tuple((name, frozen(name, values)) for name, values in indices.items()))
        object.__setattr__(self, "scope", scope)
        for template, _ in (*self.before, *self.after, *self.blocks):
            self._modules(template)

    def _modules(self, template: str) -> list[str]:
        """The name of each module that a name with indices stands for."""
        variables = dict.fromkeys(reference.variable for reference in references(template))
        return [scope.name(template) for scope in self.scope.over(tuple(variables))]

    @checks_kinds
    def check_blocks(self, specs: Sequence[tuple[str, ShardingSpec]], rank: int) -> None:
        """Refuse layouts that cut blocks of what a rank holds.

        Args:
            specs: (name, layout) of all tensors of both sides.
            rank: whose hooks these are.

        Raises:
            SpecError: one does, or there is no such tensor.

        Example:
            >>> from tricomm import Mesh, Shard, ShardingSpec
            >>> rows = ShardingSpec(Mesh([0, 1], ("tp",)), (Shard(0),), (384, 256))
            >>> Hooks(blocks={"w": (128, 128)}).check_blocks([("w", rows.on_blocks((128, 128)))], rank=0)
            >>> Hooks(blocks={"w": (128, 128)}).check_blocks([("w", rows)], rank=0)
            Traceback (most recent call last):
            tricomm.errors.SpecError: 'w' on rank 0 is cut at 192 of dim 0, inside of a block of (128, 128), ...
        """
        for template, given in self.blocks:
            for name in self._modules(template):
                found = [spec for one, spec in specs if one == name]
                if not found:
                    raise SpecError(f"blocks={{{template!r}: ...}} names {name!r}, which no side has; name its tensors")
                for spec in [one for one in found if rank in one.mesh]:
                    sizes = checked_blocks(given, len(spec.global_shape))
                    cut = first_cut_inside(spec.holding(rank), sizes, spec.global_shape)
                    if cut is not None:
                        raise SpecError(
                            f"{name!r} on rank {rank} is cut at {cut[1]} of dim {cut[0]}, inside of a block of "
                            f"{sizes}, which its hook would see in parts; take the layout's .on_blocks({sizes}), or "
                            "other axes"
                        )

    @checks_kinds
    def bind(
        self, sources: Sequence[str], destinations: Sequence[str], sent: Collection[str], needed: Collection[str]
    ) -> "BoundHooks":
        """The hooks of a Resharder on one rank.

        Args:
            sources, destinations: the names of all tensors on either side.
            sent: those of the sources that this rank holds.
            needed: those of the destinations that it needs.

        Raises:
            SpecError: a hook is for no tensor, or two are called before the same one is sent.

        Example:
            >>> hooks = Hooks(after={"l.{l}": lambda module, tensors: None}, l=range(2))
            >>> names = ["l.0.w", "l.0.scale", "l.1.w"]
            >>> [module.name for module in hooks.bind(names, names, sent=[], needed=names).modules_after]
            ['l.0', 'l.1']
        """
        before = [
            _Module(module, run, _members(module, sources, "source"))
            for template, run in self.before
            for module in self._modules(template)
        ]
        after = [
            _Module(module, run, _members(module, destinations, "destination"))
            for template, run in self.after
            for module in self._modules(template)
        ]
        owner: dict[str, str] = {}
        for one in before:
            for name in one.members:
                if name in owner:
                    raise SpecError(
                        f"{name!r} is of two hooks before it is sent, those of {owner[name]!r} and of {one.name!r}; "
                        "write one that does both"
                    )
                owner[name] = one.name
        return BoundHooks(tuple(before), tuple(after), frozenset(sent), frozenset(needed), None, {}, threading.local())


class _Module(NamedTuple):
    """A hook of one module: its name, the function, and the names of its tensors."""

    name: str
    run: Callable[[str, dict[str, Any]], Any]
    members: frozenset[str]


@dataclass(frozen=True, slots=True)
class BoundHooks:
    """The hooks of a Resharder on one rank; see :meth:`Hooks.bind`.

    Attributes:
        modules_before, modules_after: in the order of the calls.
        sent, needed: names of the source tensors that this rank holds, and of the destination's that it needs.
        chosen: of a selection, the source tensors that it moves; None for all.
        come: of modules that have come in part, the tensors that have, by the place of the hook.
        inside: which hook this thread is in.
    """

    modules_before: tuple[_Module, ...]
    modules_after: tuple[_Module, ...]
    sent: frozenset[str]
    needed: frozenset[str]
    chosen: frozenset[str] | None
    come: dict[int, dict[str, Any]]
    inside: threading.local

    def only(self, sources: Collection[str]) -> "BoundHooks":
        """Those of a selection, which moves these source tensors."""
        return replace(self, chosen=frozenset(sources))

    def takes(self, source: str) -> bool:
        """Whether a hook makes a source tensor of what is given."""
        return any(source in module.members for module in self.modules_before)

    def refuse_inside(self) -> None:
        """Refuse a call that a hook makes of its own Resharder.

        Raises:
            SpecError: it is one.
        """
        module = getattr(self.inside, "module", None)
        if module is not None:
            raise SpecError(
                f"the hook of {module!r} calls the Resharder that it is a hook of, which is in a call; return from the "
                "hook first, or use another Resharder"
            )

    def before(self, given: Any) -> Any:
        """What is sent, of what was given to a call; anything but a mapping is left to those who check it.

        Raises:
            SpecError: a hook returned other tensors than this rank sends of its module.
        """
        if not isinstance(given, Mapping):
            return given
        tensors = dict(given)
        for module in self.modules_before:
            expected = module.members & self.sent
            if not expected:
                continue
            taken = {name: tensors.pop(name) for name in given if _is_in(name, module.name)}
            if self.chosen is not None and not expected & self.chosen:
                continue
            with self._in(module):
                made = module.run(module.name, taken)
            if not isinstance(made, Mapping) or set(made) != expected:
                found = sorted(made) if isinstance(made, Mapping) else made
                raise SpecError(
                    f"the hook before {module.name!r} returned {found!r}; of this module, this rank sends "
                    f"{sorted(expected)}: return these by name"
                )
            tensors.update((name, made[name]) for name in made if self.chosen is None or name in self.chosen)
        return tensors

    def after(self, moved: Any) -> None:
        """Call the hooks of the modules that are whole on this rank, given what a call returned.

        Raises:
            ArgumentError: a hook returned something, which nobody takes.
        """
        if not isinstance(moved, Mapping):
            return
        for place, module in enumerate(self.modules_after):
            expected = module.members & self.needed
            tensors = {name: tensor for name, tensor in moved.items() if name in expected}
            if not tensors:
                continue
            tensors = self.come.pop(place, {}) | tensors
            if len(tensors) < len(expected):
                self.come[place] = tensors
                continue
            with self._in(module):
                found = module.run(module.name, tensors)
            if found is not None:
                raise ArgumentError(
                    f"the hook after {module.name!r} returned {type(found).__name__}, which nobody takes; write in "
                    "place, and return nothing"
                )

    @contextmanager
    def _in(self, module: _Module) -> Iterator[None]:
        """Know that this thread is in a hook."""
        self.inside.module = module.name
        try:
            yield
        finally:
            self.inside.module = None


def _is_in(name: str, module: str) -> bool:
    """Whether a tensor is of a module."""
    return not module or name == module or name.startswith(f"{module}.")


def _members(module: str, names: Sequence[str], side: str) -> frozenset[str]:
    found = frozenset(name for name in names if _is_in(name, module))
    if not found:
        known = f"whose names are such as {names[0]!r}" if names else "which has none"
        raise SpecError(
            f"the hook of {module!r} is for no tensor of the {side}, {known}; name a module of these, or leave the "
            "hook out"
        )
    return found
