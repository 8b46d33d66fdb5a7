"""Two small models as lists of units that can be cut into stages anywhere: a GPT and a U-Transformer.

Units compute with tensor parallelism over an axis of their mesh (columns, then rows, as Megatron does) and with data
parallelism over another. With one rank they are the plain model: the reference.
"""

import gc
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn import functional

from tricomm import Mesh, Partial, Replicate, Shard, ShardingSpec, local_shard
from tricomm.pipeline.run.edges.tensor import EdgeTensor
from tricomm.pipeline.run.stage import LOSS, Stage

# ---- tensor parallelism inside of a stage, by the user's own means


@dataclass(frozen=True)
class Line:
    """The ranks along one axis of a mesh; ``group`` is None if there is only one."""

    index: int = 0
    size: int = 1
    group: Any = None

    def cut(self, full: torch.Tensor, dim: int, segments: tuple[int, ...] | None = None) -> torch.Tensor:
        """This rank's part of a parameter."""
        spec = ShardingSpec(Mesh(range(self.size), ("line",)), (Shard(dim, segments),), tuple(full.shape))
        return local_shard(full, spec, self.index)


ALONE = Line()


@lru_cache
def lines(mesh: Mesh, axis: str) -> Line:
    """This rank's line. Every rank of the process group calls it, as new groups need them all."""
    mine = ALONE
    index = mesh.axis(axis)
    rows: dict[tuple[int, ...], list[int]] = {}
    for rank in mesh.ranks:
        coordinate = list(mesh.coordinate(rank))
        coordinate[index] = 0
        rows.setdefault(tuple(coordinate), []).append(rank)
    for ranks in rows.values():
        group = dist.new_group(ranks) if len(ranks) > 1 else None
        if dist.get_rank() in ranks:
            mine = Line(ranks.index(dist.get_rank()), len(ranks), group)
    return mine


def end_groups(rank: int) -> None:
    """End all process groups of this process but that of all ranks: torch's threads of each wake 100 times a second."""
    lines.cache_clear()
    left = [group for group in dist.distributed_c10d._world.pg_map if group is not dist.group.WORLD]
    for group in left:
        dist.destroy_process_group(group)
    if left:
        gc.collect()
        for kept in gc.get_objects():
            if type(kept) is DeviceMesh:  # by torch's caches, and its groups by it
                getattr(kept, "_pg_registry", {}).clear()


class Enter(torch.autograd.Function):
    """Into a part where each rank of the line computes a share: the gradients are summed."""

    @staticmethod
    def forward(ctx, x, line):
        ctx.line = line
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.clone()
        dist.all_reduce(gradient, group=ctx.line.group)
        return gradient, None


class Leave(torch.autograd.Function):
    """Out of it: the shares are summed."""

    @staticmethod
    def forward(ctx, x, line):
        total = x.clone()
        dist.all_reduce(total, group=line.group)
        return total

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


class Gather(torch.autograd.Function):
    """The last dim, put together from the parts of all ranks."""

    @staticmethod
    def forward(ctx, x, line):
        ctx.line = line
        parts = [torch.empty_like(x) for _ in range(line.size)]
        dist.all_gather(parts, x.contiguous(), group=line.group)
        return torch.cat(parts, dim=-1)

    @staticmethod
    def backward(ctx, gradient):
        return ctx.line.cut(gradient, gradient.dim() - 1), None


def over(function: type[torch.autograd.Function], x: torch.Tensor, line: Line) -> torch.Tensor:
    return x if line.size == 1 else function.apply(x, line)


class Weights(nn.Module):
    """Makes parameters that are the same for every way to cut them, and remembers how they were cut."""

    def __init__(self, line: Line) -> None:
        super().__init__()
        self.line = line
        self.cuts: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {}

    def make(self, name: str, full: torch.Tensor, dim: int | None = None, segments=None) -> None:
        cut = (lambda full: full) if dim is None else partial(self.line.cut, dim=dim, segments=segments)
        self.cuts[name] = cut
        self.register_parameter(name, nn.Parameter(cut(full).clone()))


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64) / math.sqrt(math.prod(shape[1:]) or 1)


# ---- GPT

VOCABULARY, WIDTH, HEADS, CONTEXT = 32, 16, 4, 16


class Embedding(Weights):
    def __init__(self, line: Line) -> None:
        super().__init__(line)
        self.make("embedding", random(VOCABULARY, WIDTH))
        self.make("place", random(CONTEXT, WIDTH))

    def forward(self, tokens):
        return functional.embedding(tokens, self.embedding) + self.place[: tokens.shape[1]]


class Attention(Weights):
    """Causal unless it is told otherwise; heads are divided among the ranks of the line."""

    def __init__(self, line: Line, causal: bool = True) -> None:
        super().__init__(line)
        self.causal = causal
        self.make("gain", torch.ones(WIDTH, dtype=torch.float64))
        self.make("qkv", random(3 * WIDTH, WIDTH), 0, (WIDTH,) * 3)
        self.make("out", random(WIDTH, WIDTH), 1)
        self.make("bias", random(WIDTH))

    def forward(self, x):
        inside = over(Enter, functional.layer_norm(x, (WIDTH,), self.gain), self.line)
        q, k, v = (
            part.unflatten(-1, (HEADS // self.line.size, -1)).transpose(1, 2)
            for part in functional.linear(inside, self.qkv).chunk(3, dim=-1)
        )
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal).transpose(1, 2).flatten(2)
        return x + over(Leave, functional.linear(mixed, self.out), self.line) + self.bias


class Feedforward(Weights):
    def __init__(self, line: Line) -> None:
        super().__init__(line)
        self.make("gain", torch.ones(WIDTH, dtype=torch.float64))
        self.make("up", random(4 * WIDTH, WIDTH), 0)
        self.make("up_bias", random(4 * WIDTH), 0)
        self.make("down", random(WIDTH, 4 * WIDTH), 1)

    def forward(self, x):
        inside = over(Enter, functional.layer_norm(x, (WIDTH,), self.gain), self.line)
        inside = functional.gelu(functional.linear(inside, self.up, self.up_bias))
        return x + over(Leave, functional.linear(inside, self.down), self.line)


class Head(Weights):
    """Logits by the embedding, its words divided among the ranks of the line, and their loss."""

    def __init__(self, line: Line) -> None:
        super().__init__(line)
        self.make("gain", torch.ones(WIDTH, dtype=torch.float64))
        self.make("embedding", random(VOCABULARY, WIDTH), 0)

    def forward(self, x, targets):
        inside = over(Enter, functional.layer_norm(x, (WIDTH,), self.gain), self.line)
        logits = over(Gather, functional.linear(inside, self.embedding), self.line)
        return functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


# ---- U-Transformer: convolutions and attention, and skips from the way down to the way up

CHANNELS, LENGTH = WIDTH, 16


class Convolutions(Weights):
    """Channels are divided among the ranks of the line between the two convolutions."""

    def __init__(self, line: Line) -> None:
        super().__init__(line)
        self.make("gain", torch.ones(CHANNELS, dtype=torch.float64))
        self.make("up", random(2 * CHANNELS, CHANNELS, 3), 0)
        self.make("down", random(CHANNELS, 2 * CHANNELS, 3), 1)

    def forward(self, x):
        inside = over(Enter, functional.group_norm(x, 4, self.gain), self.line)
        inside = functional.silu(functional.conv1d(inside, self.up, padding=1))
        return x + over(Leave, functional.conv1d(inside, self.down, padding=1), self.line)


class Inward(Weights):
    def __init__(self, line: Line) -> None:
        super().__init__(line)
        self.make("kernel", random(CHANNELS, 2, 3))

    def forward(self, image):
        return functional.conv1d(image, self.kernel, padding=1)


class Down(Convolutions):
    """Half as long; what it was before goes over the skip."""

    def forward(self, x):
        x = super().forward(x)
        return functional.avg_pool1d(x, 2), x


class Middle(Attention):
    def __init__(self, line: Line) -> None:
        super().__init__(line, causal=False)

    def forward(self, x):
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


class Up(Convolutions):
    """As long as the skip that it takes in."""

    def __init__(self, line: Line) -> None:
        super().__init__(line)
        self.make("merge", random(CHANNELS, 2 * CHANNELS, 1))

    def forward(self, x, skip):
        both = torch.cat([functional.interpolate(x, scale_factor=2.0), skip], dim=1)
        return super().forward(functional.conv1d(both, self.merge))


class Outward(Weights):
    def __init__(self, line: Line) -> None:
        super().__init__(line)
        self.make("kernel", random(2, CHANNELS, 3))

    def forward(self, x, noise):
        return functional.mse_loss(functional.conv1d(x, self.kernel, padding=1), noise)


# ---- models as lists of units, and stages as parts of the list


@dataclass(frozen=True)
class Unit:
    make: Callable[[Line], Weights]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class Model:
    """Units in order; ``shapes`` of the tensors between them for a microbatch of some size, by name."""

    units: tuple[Unit, ...]
    shape_of: Callable[[str], tuple[int | str, ...]]
    tied: tuple[tuple[int, str], ...] = ()
    """(unit, parameter) of the copies of a tied parameter."""


def gpt(length: int | str = CONTEXT, batch: int | str = 4) -> Model:
    body = [Attention, Feedforward] * 3
    units = [Unit(Embedding, ("tokens",), ("x0",))]
    units += [Unit(make, (f"x{i}",), (f"x{i + 1}",)) for i, make in enumerate(body)]
    units += [Unit(Head, (f"x{len(body)}", "targets"), (LOSS,))]
    return Model(tuple(units), lambda _: (batch, length, WIDTH), ((0, "embedding"), (len(units) - 1, "embedding")))


def u_transformer(batch: int = 4) -> Model:
    units = (
        Unit(Inward, ("image",), ("x0",)),
        Unit(Down, ("x0",), ("x1", "skip0")),
        Unit(Down, ("x1",), ("x2", "skip1")),
        Unit(Middle, ("x2",), ("x3",)),
        Unit(Middle, ("x3",), ("x4",)),
        Unit(Up, ("x4", "skip1"), ("x5",)),
        Unit(Up, ("x5", "skip0"), ("x6",)),
        Unit(Outward, ("x6", "noise"), (LOSS,)),
    )
    half, quarter = LENGTH // 2, LENGTH // 4
    long = {"x0": LENGTH, "skip0": LENGTH, "x6": LENGTH, "x1": half, "skip1": half, "x5": half}
    return Model(units, lambda name: (batch, CHANNELS, long.get(name, quarter)))


class Part(nn.Module):
    """Some units of a model in a row."""

    def __init__(self, model: Model, span: range, line: Line, dtype: torch.dtype) -> None:
        super().__init__()
        self.units = [model.units[index] for index in span]
        self.inputs, self.outputs = names_of(model, span)
        made = {}
        for index in span:
            torch.manual_seed(100 if any(index == unit for unit, _ in model.tied) else index)
            made[str(index)] = model.units[index].make(line)
        self.parts = nn.ModuleDict(made).to(dtype)

    def forward(self, *inputs):
        known = dict(zip(self.inputs, inputs, strict=True))
        for unit, part in zip(self.units, self.parts.values(), strict=True):
            found = part(*(known[name] for name in unit.inputs))
            known.update(zip(unit.outputs, found if isinstance(found, tuple) else (found,), strict=True))
        found = tuple(known[name] for name in self.outputs)
        return found if len(found) > 1 else found[0]

    def expected(self, full: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """This rank's parts of what is given for the parameters of the whole model."""
        return {
            f"parts.{index}.{name}": cut(full[f"parts.{index}.{name}"])
            for index, part in self.parts.items()
            for name, cut in part.cuts.items()
        }


def names_of(model: Model, span: range) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(inputs from outside, outputs that are needed outside) of some units."""
    inside = [model.units[index] for index in span]
    made = [name for unit in inside for name in unit.outputs]
    needed = [name for unit in inside for name in unit.inputs if name not in made]
    later = {name for unit in model.units[span.stop :] for name in unit.inputs} | {LOSS}
    return tuple(dict.fromkeys(needed)), tuple(name for name in made if name in later)


def spans_of(units: int, stages: int) -> list[range]:
    bounds = [round(units * stage / stages) for stage in range(stages + 1)]
    return [range(bounds[stage], bounds[stage + 1]) for stage in range(stages)]


def layout(mesh: Mesh, shape: Sequence[int | str] | None, dtype: torch.dtype) -> ShardingSpec:
    """The batch is divided over "dp"; the ranks of "tp" hold the same."""
    fixed = tuple(shape) if shape is not None and all(isinstance(size, int) for size in shape) else None
    placements = tuple(Shard(0) if axis == "dp" else Replicate() for axis in mesh.axis_names)
    return ShardingSpec(mesh, placements, fixed, dtype)


def sum_over_dp(module: nn.Module, line: Line) -> None:
    for parameter in module.parameters():
        if line.size > 1:
            dist.all_reduce(parameter.grad, group=line.group)


def cut_into_stages(model: Model, meshes: Sequence[Mesh], dtype: torch.dtype):
    """(stages, edges, span of units of each stage): what an Executor takes."""
    spans = spans_of(len(model.units), len(meshes))
    names = [names_of(model, span) for span in spans]
    stages = []
    for span, mesh, (inputs, outputs) in zip(spans, meshes, names, strict=True):
        tp, dp = lines(mesh, "tp"), lines(mesh, "dp")
        module = Part(model, span, tp, dtype) if dist.get_rank() in mesh else None
        loss = None
        if LOSS in outputs:
            loss = tuple(Partial("avg") if axis == "dp" else Replicate() for axis in mesh.axis_names)
        stages.append(Stage(mesh, inputs, outputs, module, loss, after_backward=partial(sum_over_dp, line=dp)))
    edges: dict[tuple[int, int], dict[str, EdgeTensor]] = {}
    for source, (_, outputs) in enumerate(names):
        for destination, (inputs, _) in enumerate(names):
            for name in [name for name in outputs if name in inputs]:
                shape = model.shape_of(name)
                ends = (layout(meshes[source], shape, dtype), layout(meshes[destination], shape, dtype))
                changing = () if ends[0].shape is not None else shape
                edges.setdefault((source, destination), {})[name] = EdgeTensor(*ends, shape=changing)
    return stages, edges, spans
