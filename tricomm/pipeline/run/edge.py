"""Link: an edge of a pipeline between real ranks. Activations go one way, gradients the other.

Each direction is a channel with communicators and a background thread of its own, so that a receive may be posted
before, and waited for after, anything that goes the other way or over another edge.

    link = Link("0-1", [EdgeTensor(source, destination)], microbatches=8)
    link.connect()
    # On the ranks of the source mesh:
    y = module(x)
    link.send(y, 0)
    handle = link.recv_gradient(0)           # posts the receive; compute something else meanwhile
    y.backward(handle.wait())
    # On those of the destination mesh:
    y = link.recv(0).wait().requires_grad_()
    module(y).sum().backward()
    link.send_gradient(y.grad, 0)
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Self, Unpack

import torch

from tricomm.autograd.layouts import gradient_scale
from tricomm.errors import ArgumentError, SpecError
from tricomm.kinds import checks_kinds, explains_missing
from tricomm.layout.spec import ShardingSpec
from tricomm.options import LinkOptions, Options
from tricomm.pipeline.run.edges.directed_link import (
    DirectedLink,
    PerDirectionFifo,
    ReceiveHandle,
    SendHandle,
    Sizes,
    Tensors,
)
from tricomm.pipeline.run.edges.tensor import EdgeTensor
from tricomm.pipeline.schedule.actions import MAX_COUNT
from tricomm.plan.plan import digest_of
from tricomm.transport.coordination.intent import Intent


@explains_missing
class Link:
    """Carry the tensors of one edge between the meshes of its two stages.

    Every rank of either mesh makes it with the same arguments, then all call ``connect``. Calls come from one thread,
    and each direction takes the microbatches in one order at both ends; the two directions need no common order.

    On one rank that is on both meshes, where nothing has to be sent:

    >>> import torch
    >>> import torch.distributed as dist
    >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    >>> from tricomm import Mesh, Replicate, ShardingSpec
    >>> spec = ShardingSpec(Mesh([0], ("x",)), (Replicate(),), (2, 3), "float32")
    >>> with Link("0-1", [EdgeTensor(spec, spec)], microbatches=1) as link:
    ...     link.connect()
    ...     sent = link.send(torch.ones(2, 3), 0)
    ...     link.recv(0).wait().sum()
    tensor(6.)
    >>> dist.destroy_process_group()

    Args:
        name: distinct among the Links of these ranks.
        tensors: what crosses; all on the same two meshes.
        microbatches: of a step.
        orders: of the microbatches in each direction (forward, backward), each repeated every step; None is
            0, 1, 2 ... in both.
        slots: receive buffers of each direction (forward, backward), used in turn and given back with
            ``handle.release()``. None makes a new tensor for every receive.
        fifo: shared by the Links of a rank that take turns with each other; on all ranks or on none.
        turns: the old name of ``fifo``, kept for one version.
        options: those of :class:`tricomm.Options` but ``channel`` and ``name``, which the Link chooses. The timeout
            bounds how long a posted receive may wait, the other stage's compute included.

    Raises:
        SpecError: tensors on different meshes, or arguments that break a rule.
    """

    @checks_kinds
    def __init__(
        self,
        name: str,
        tensors: Sequence[EdgeTensor],
        *,
        microbatches: int,
        orders: tuple[Sequence[int], Sequence[int]] | None = None,
        slots: tuple[int | None, int | None] = (None, None),
        fifo: PerDirectionFifo | None = None,
        turns: PerDirectionFifo | None = None,
        **options: Unpack[LinkOptions],
    ) -> None:
        Options.of(options, "Link", LinkOptions)
        self.name = name
        self.tensors = tuple(tensors)
        self.microbatches = microbatches
        self.differentiable = tuple(i for i, tensor in enumerate(self.tensors) if tensor.gradient is not None)
        """Indices of the tensors that have a gradient, in the order in which the gradients cross."""
        _check(name, self.tensors, microbatches, slots)
        forward_order, backward_order = orders or (range(microbatches), range(microbatches))
        for order in (forward_order, backward_order):
            if sorted(order) != list(range(microbatches)):
                raise SpecError(
                    f"order {tuple(order)} of edge {name!r} must name each of {microbatches} microbatches once; "
                    "list them all"
                )
        fifo = fifo or turns
        meshes = (self.tensors[0].source.mesh.ranks, self.tensors[0].destination.mesh.ranks)
        scales = [1.0] * len(self.tensors)
        self.forward = DirectedLink(f"edge {name} forward", meshes, forward_order, slots[0], scales, fifo, options)
        self.backward: DirectedLink | None = None
        if self.differentiable:
            scales = [gradient_scale(self.tensors[index].source) for index in self.differentiable]
            self.backward = DirectedLink(
                f"edge {name} backward", meshes[::-1], backward_order, slots[1], scales, fifo, options
            )
        self.directed_links = (self.forward,) if self.backward is None else (self.forward, self.backward)
        if not any(tensor.names for tensor in self.tensors):
            self._make(())
            for directed_link in self.directed_links:
                directed_link.use([()] * microbatches)

    def connect(self) -> None:
        """Compare with the ranks of both meshes what is going to cross, and connect to them.

        Where ranks have several Links, all connect them in the same order.

        ::

            link = Link("0-1", [hidden], microbatches=4)
            link.connect()  # on every rank of both meshes

        Raises:
            SpecError: sizes of its tensors have names; call ``bind`` instead.
            TransportError: a rank says something else, refused, or did not come within the timeout.
        """
        self.bind([()])

    @checks_kinds
    def bind(self, sizes: Sequence[Sizes]) -> None:
        """Connect as ``connect`` does, for tensors whose sizes have names; later calls set other sizes.

        ::

            link = Link("0-1", [EdgeTensor(source, destination, shape=(8, "length", 512))], microbatches=2)
            link.bind([(("length", 100),), (("length", 72),)])  # of each microbatch

        Args:
            sizes: of each microbatch of the coming steps, or one for all of them; the same on all ranks.
        """
        if len(sizes) not in (1, self.microbatches):
            raise SpecError(
                f"sizes of edge {self.name!r} are {len(sizes)}, and a step has {self.microbatches} microbatches; give "
                "one for each, or one for all of them"
            )
        missing = [one for one in dict.fromkeys(sizes) if not self.forward.has(one)]
        for one in missing:
            self._make(one)
        if not self.forward.is_connected:
            self._compare()
        for directed_link in self.directed_links:
            directed_link.connect()
            directed_link.use(sizes if len(sizes) > 1 else list(sizes) * self.microbatches)

    def _make(self, sizes: Sizes) -> None:
        """Plan for tensors of some sizes, in both directions."""
        tensors = [tensor.bound(dict(sizes)) for tensor in self.tensors]
        self.forward.bind(sizes, [(tensor.source, tensor.destination) for tensor in tensors])
        if self.backward is not None:
            self.backward.bind(sizes, [tensors[index].gradient_specs() for index in self.differentiable])

    def _compare(self) -> None:
        resharder = self.forward.resharders[0]
        fields = {
            "edge": self.name,
            "tensors": repr(self.tensors),
            "orders": repr([directed_link.order for directed_link in self.directed_links]),
            "whether its transfers take turns (fifo)": str(self.forward.fifo is not None),
        }
        call = f"the connecting of edge {self.name!r}"
        intent = Intent(resharder.participants, fields, digest_of(fields), f"edge {self.name}", call)
        resharder.context.rendezvous.join(intent, resharder.timeout_seconds)

    def gradient_layouts(self) -> list[ShardingSpec]:
        """Return the layout of each gradient of microbatch 0 that goes back, on the destination stage.

        ::

            (spec,) = link.gradient_layouts()
            gradient = torch.zeros(spec.local_shape(rank))  # for a stage that has none
        """
        return [] if self.backward is None else [one.plan.source for one in self.backward.resharders_of(0)]

    def send(self, x: Tensors, microbatch: int) -> SendHandle:
        """Start to send the activations of a microbatch; on ranks of the source mesh.

        ::

            sent = [link.send(stage(x), microbatch) for microbatch, x in enumerate(data)]
            sent[0].wait()  # that tensor may change now

        Args:
            x: this rank's shard of the tensor, or a tuple in the order of declaration if the edge has several. They
                must not change before the handle's ``wait`` returns, but may be dropped at once. Autograd does not
                follow them: what arrives requires no grad, and the gradient comes back by ``recv_gradient``.
            microbatch: which; they go in order, from 0 in each step.

        Raises:
            SpecError: not this microbatch's turn, or tensors that are not what was declared. The ranks at the other
                end get a TransportError that says so.
        """
        with self._reporting():
            return self.forward.send(_as_tuple(x), microbatch)

    def recv(self, microbatch: int) -> ReceiveHandle:
        """Post the receive of the activations of a microbatch; on ranks of the destination mesh.

        ::

            coming = link.recv(0)  # early: it arrives while other things are computed
            output = stage(coming.wait())
            coming.release()  # its buffer, if the Link has slots

        Raises:
            SpecError: not this microbatch's turn, or no free buffer.
        """
        with self._reporting():
            return self.forward.recv(microbatch)

    def send_gradient(self, gradient: Tensors, microbatch: int) -> SendHandle:
        """As send, for gradients of the tensors that have one; on ranks of the destination mesh.

        ::

            link.send_gradient(hidden.grad, microbatch)
        """
        with self._reporting():
            return self._gradients().send(_as_tuple(gradient), microbatch)

    def recv_gradient(self, microbatch: int) -> ReceiveHandle:
        """As recv, for gradients; on ranks of the source mesh.

        ::

            torch.autograd.backward(output, link.recv_gradient(microbatch).wait())
        """
        with self._reporting():
            return self._gradients().recv(microbatch)

    def flush(self) -> None:
        """Return when all that was sent may be changed.

        ::

            link.flush()
            optimizer.step()  # may change what was sent

        Raises:
            TransportError: a rank failed.
        """
        for directed_link in self.directed_links:
            directed_link.flush()

    def close(self) -> None:
        """Give back connections, threads and buffers, as soon as what was started is done; so does a dropped Link.

        ::

            link.close()  # or use it as ``with Link(...) as link:``
        """
        for directed_link in self.directed_links:
            directed_link.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def abort(self, reason: str) -> None:
        """Tell the ranks of both meshes that this one does not go on, and why; their waits end in a TransportError.

        ::

            link.abort("rank 3 found a loss that is not finite")
        """
        for directed_link in self.directed_links:
            directed_link.abort(reason)

    @contextmanager
    def _reporting(self) -> Iterator[None]:
        """Tell the other ranks of an error of this one, in both directions: they would wait for it."""
        try:
            yield
        except SpecError as error:
            self.abort(f"rank {self.forward.rank} refused the call: {type(error).__name__}: {error}")
            raise

    def _gradients(self) -> DirectedLink:
        if self.backward is None:
            raise SpecError(f"no tensor of edge {self.name!r} has a gradient; declare one with gradient=()")
        return self.backward


def _as_tuple(tensors: Tensors) -> tuple[torch.Tensor, ...]:
    if isinstance(tensors, torch.Tensor):
        return (tensors,)
    if not isinstance(tensors, list | tuple):
        raise ArgumentError(f"{tensors!r} is no tensor; pass one, or a tuple in the order of declaration")
    return tuple(tensors)


def _check(name: str, tensors: Sequence[EdgeTensor], microbatches: int, slots: tuple[int | None, int | None]) -> None:
    if not tensors:
        raise SpecError(f"edge {name!r} carries no tensor; give at least one EdgeTensor")
    if not 1 <= microbatches <= MAX_COUNT:
        raise SpecError(
            f"microbatches={microbatches} of edge {name!r} must be from 1 to {MAX_COUNT}; give their number per step"
        )
    for count in slots:
        if count is not None and count < 1:
            raise SpecError(f"slots={slots} of edge {name!r} must be at least 1, or None for new tensors each time")
    first = tensors[0]
    for tensor in tensors[1:]:
        for side in ("source", "destination"):
            ours, theirs = getattr(first, side).mesh, getattr(tensor, side).mesh
            if set(ours.ranks) != set(theirs.ranks):
                raise SpecError(
                    f"the tensors of edge {name!r} have {side} meshes {ours} and {theirs}; all tensors of an edge go "
                    "between the ranks of two stages: make another edge"
                )
