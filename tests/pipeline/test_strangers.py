"""Models of a stranger's kind, trained some steps against one process: recurrent, with two towers, U-shaped with masks.

Their modules know nothing of pipelines, and the optimiser is torch's own.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from tests.pipeline.chain import TIMEOUT_SECONDS
from tricomm import Mesh, Replicate, ShardingSpec
from tricomm.launch import Ranks
from tricomm.pipeline import EdgeTensor, Executor, Schedule, Stage, eager_one_f_one_b, gpipe, one_f_one_b, zero_bubble

ROWS, MICROBATCHES, STEPS = 4, 4, 4
WIDTH, LENGTH, WORDS = 8, 6, 20


@dataclass(frozen=True)
class Part:
    """A stage: how its module is made, and the names and shapes of what it gives (False: without a gradient)."""

    make: Callable[[], nn.Module]
    inputs: tuple[str, ...]
    outputs: Mapping[str, tuple[tuple[int, ...], torch.dtype]]


# ---- recurrent: the state of one layer begins the next, and lengths mask the loss


class Reads(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.lstm = nn.Embedding(WORDS, WIDTH), nn.LSTM(WIDTH, WIDTH, batch_first=True)

    def forward(self, tokens):
        out, (hidden, cell) = self.lstm(self.embedding(tokens))
        return out, hidden, cell


class Continues(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(WIDTH, WIDTH, batch_first=True)

    def forward(self, out, hidden, cell):
        again, (hidden, _) = self.lstm(out, (hidden, cell))
        return torch.relu_(again), hidden


class Writes(nn.Module):
    def __init__(self):
        super().__init__()
        self.gru, self.head = nn.GRU(WIDTH, WIDTH, batch_first=True), nn.Linear(WIDTH, WORDS)

    def forward(self, again, last, targets):
        out, _ = self.gru(again, last)
        return nn.functional.cross_entropy(self.head(out).flatten(0, 1), targets.flatten())


REAL, STATE = ((ROWS, LENGTH, WIDTH), torch.float64), ((1, ROWS, WIDTH), torch.float64)
RECURRENT = (
    Part(Reads, ("tokens",), {"out": REAL, "hidden": STATE, "cell": STATE}),
    Part(Continues, ("out", "hidden", "cell"), {"again": REAL, "last": STATE}),
    Part(Writes, ("again", "last", "targets"), {}),
)


# ---- two towers that meet in a third stage; one is partly frozen


class Image(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Flatten())
        self.out = nn.Linear(36, WIDTH)
        self.body[0].requires_grad_(False)

    def forward(self, pixels):
        return self.out(self.body(pixels))


class Text(nn.Module):
    def __init__(self):
        super().__init__()
        self.bag, self.out = nn.EmbeddingBag(WORDS, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, tokens):
        return self.out(self.bag(tokens))


class Meets(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, image, text, weight):
        image, text = (nn.functional.normalize(one, dim=-1) for one in (image, text))
        logits = self.scale.exp() * image @ text.T
        both = [nn.functional.cross_entropy(one, torch.arange(ROWS), reduction="none") for one in (logits, logits.T)]
        return (sum(both) * weight).mean()


POINT = ((ROWS, WIDTH), torch.float64)
TOWERS = (
    Part(Image, ("pixels",), {"image": POINT}),
    Part(Text, ("tokens",), {"text": POINT}),
    Part(Meets, ("image", "text", "weight"), {}),
)


# ---- U-shaped: skips from the way down to the way up, a mask that goes along, an auxiliary output with its own loss


class Goes(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(1, WIDTH, 3, padding=1)

    def forward(self, signal, lengths):
        keep = torch.arange(8)[None, :] < lengths[:, None]
        x = self.conv(signal) * keep[:, None]
        return nn.functional.max_pool1d(x, 2), x, keep


class Turns(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix = nn.TransformerEncoderLayer(WIDTH, 2, 16, dropout=0.0, batch_first=True)

    def forward(self, down, keep):
        y = self.mix(down.transpose(1, 2), src_key_padding_mask=~keep[:, ::2]).transpose(1, 2)
        return y * keep[:, None, ::2], y.mean((1, 2))


class Comes(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(2 * WIDTH, 1, 3, padding=1)

    def forward(self, low, guess, skip, keep, target):
        up = torch.cat([nn.functional.interpolate(low, scale_factor=2.0), skip], dim=1)
        wrong = (self.conv(up)[:, 0] - target) * keep
        return wrong.square().sum() / keep.sum() + 0.1 * (guess - target.mean(1)).square().mean()


U_SHAPED = (
    Part(
        Goes,
        ("signal", "lengths"),
        {
            "down": ((ROWS, WIDTH, 4), torch.float64),
            "skip": ((ROWS, WIDTH, 8), torch.float64),
            "keep": ((ROWS, 8), torch.bool),
        },
    ),
    Part(Turns, ("down", "keep"), {"low": ((ROWS, WIDTH, 4), torch.float64), "guess": ((ROWS,), torch.float64)}),
    Part(Comes, ("low", "guess", "skip", "keep", "target"), {}),
)

MODELS = {"recurrent": RECURRENT, "two towers": TOWERS, "u-shaped": U_SHAPED}


def batch_of(name: str, step: int) -> dict[str, list[torch.Tensor]]:
    torch.manual_seed(100 + step)

    def each(make: Callable[[], torch.Tensor]) -> list[torch.Tensor]:
        return [make() for _ in range(MICROBATCHES)]

    def words() -> torch.Tensor:
        return torch.randint(0, WORDS, (ROWS, LENGTH))

    if name == "recurrent":
        return {"tokens": each(words), "targets": each(words)}
    if name == "two towers":
        pixels = each(lambda: torch.randn(ROWS, 1, 8, 8, dtype=torch.float64))
        return {"pixels": pixels, "tokens": each(words), "weight": each(lambda: torch.rand(ROWS).double())}
    signal = each(lambda: torch.randn(ROWS, 1, 8, dtype=torch.float64))
    lengths = each(lambda: torch.randint(2, 9, (ROWS,)))
    return {"signal": signal, "lengths": lengths, "target": each(lambda: torch.randn(ROWS, 8, dtype=torch.float64))}


def made(parts: Sequence[Part]) -> list[nn.Module]:
    torch.manual_seed(0)
    return [part.make().double() for part in parts]


def adam(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([one for one in module.parameters() if one.requires_grad], lr=1e-2, foreach=False)


def reference(name: str) -> tuple[list[float], list[dict[str, torch.Tensor]]]:
    """THE DEFINITION: (loss of each step, state of each part at the end), in one process."""
    parts = MODELS[name]
    modules = made(parts)
    optimizers = [adam(module) for module in modules]
    losses = []
    for step in range(STEPS):
        data, total = batch_of(name, step), 0.0
        for number in range(MICROBATCHES):
            values = {key: value[number] for key, value in data.items()}
            for part, module in zip(parts, modules, strict=True):
                found = module(*(values[key] for key in part.inputs))
                names = tuple(part.outputs) or ("loss",)
                values.update(zip(names, found if isinstance(found, tuple) else (found,), strict=True))
            (values["loss"] / MICROBATCHES).backward()
            total += float(values["loss"].detach()) / MICROBATCHES
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(total)
    return losses, [module.state_dict() for module in modules]


def edges_of(parts: Sequence[Part]) -> list[tuple[int, int]]:
    return [
        (source, destination)
        for source, one in enumerate(parts)
        for destination, other in enumerate(parts)
        if set(one.outputs) & set(other.inputs)
    ]


def pipelined(rank: int, name: str, schedule: Schedule) -> tuple[list[float], dict[str, torch.Tensor] | None]:
    """(losses, state of this rank's stage)."""
    parts, meshes = MODELS[name], [Mesh([number], ("x",)) for number in range(len(MODELS[name]))]
    modules = made(parts)
    stages = []
    for number, (part, mesh) in enumerate(zip(parts, meshes, strict=True)):
        module = modules[number] if rank == number else None
        loss = None if part.outputs else (Replicate(),)
        stages.append(Stage(mesh, part.inputs, tuple(part.outputs) or ("loss",), module, loss))
    edges: dict[tuple[int, int], dict[str, EdgeTensor]] = {}
    for source, destination in edges_of(parts):
        for key, (shape, dtype) in parts[source].outputs.items():
            if key in parts[destination].inputs:
                spec = ShardingSpec(meshes[source], (Replicate(),), shape, dtype)
                gradient = () if dtype.is_floating_point else None
                tensor = EdgeTensor(spec, ShardingSpec(meshes[destination], (Replicate(),)), gradient)
                edges.setdefault((source, destination), {})[key] = tensor
    losses = []
    with Executor(schedule, stages, edges, timeout_seconds=TIMEOUT_SECONDS) as executor:
        optimizer = adam(modules[rank]) if rank < len(parts) else None
        for step in range(STEPS):
            loss = executor.step(batch_of(name, step))
            if loss is not None:
                losses.append(float(loss))
            if optimizer is not None:
                optimizer.step()
                optimizer.zero_grad()
    return losses, modules[rank].state_dict() if rank < len(parts) else None


SCHEDULES = {
    "gpipe": lambda edges: gpipe(3, MICROBATCHES, edges=edges),
    "1f1b": lambda edges: one_f_one_b(3, MICROBATCHES, edges=edges),
    "eager, split": lambda edges: eager_one_f_one_b(3, MICROBATCHES, split=True, weight_delay=1, edges=edges),
    "zero bubble": lambda edges: zero_bubble(3, MICROBATCHES, edges=edges),
}


@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize("name", MODELS)
def test_models_of_a_stranger_train_as_in_one_process(ranks: Ranks, name: str, kind: str) -> None:
    losses, states = reference(name)
    results = ranks.run(pipelined, name, SCHEDULES[kind](edges_of(MODELS[name])))
    for module, state in zip(made(MODELS[name]), states, strict=True):
        assert any(not torch.equal(value, state[key]) for key, value in module.state_dict().items()), "all stages learn"
    torch.testing.assert_close(results[2][0], losses, rtol=1e-9, atol=1e-12)
    for (_, found), wanted in zip(results, states, strict=False):
        for key, value in wanted.items():
            torch.testing.assert_close(
                found[key], value, rtol=1e-9, atol=1e-12, msg=lambda text, key=key: f"{key}: {text}"
            )
