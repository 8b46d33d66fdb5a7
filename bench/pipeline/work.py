"""A stage whose compute is a sleep of a stated length, so that two cores can play many devices."""

import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True, slots=True)
class Seconds:
    """How long the forward, the gradient of the inputs and the gradient of the weights of a microbatch sleep."""

    forward: float
    input_gradient: float
    weight_gradient: float

    @property
    def backward(self) -> float:
        """Both halves."""
        return self.input_gradient + self.weight_gradient


@dataclass
class Counter:
    """Microbatches between their forward and the end of their backward."""

    live: int = 0
    peak: int = 0
    spans: list[tuple[str, float, float]] = field(default_factory=list)

    def run(self, kind: str, seconds: float, change: int) -> None:
        """Sleep, and note when."""
        if change > 0:
            self.live += change
            self.peak = max(self.peak, self.live)
        begin = time.perf_counter()
        time.sleep(seconds)
        self.spans.append((kind, begin, time.perf_counter()))
        if change < 0:
            self.live += change

    def reset(self) -> None:
        """Begin a step."""
        self.live = self.peak = 0
        self.spans.clear()


class _Trunk(torch.autograd.Function):
    """From the inputs to the outputs: sleeps F, and in the backward I."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, seconds: Seconds, counter: Counter) -> torch.Tensor:
        ctx.seconds, ctx.counter = seconds, counter
        counter.run("F", seconds.forward, 1)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        ctx.counter.run("I", ctx.seconds.input_gradient, 0)
        # A new tensor in order, as a product would be: gloo sends no other.
        return gradients[0].clone(memory_format=torch.contiguous_format), None, None


class _Branch(torch.autograd.Function):
    """From the weights to where they are used: sleeps W in the backward."""

    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, seconds: Seconds, counter: Counter) -> torch.Tensor:
        ctx.seconds, ctx.counter = seconds, counter
        return weight.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        ctx.counter.run("W", ctx.seconds.weight_gradient, -1)
        return gradients[0], None, None


class Work(nn.Module):
    """One stage, on one of its ranks: gives an output of its input's shape.

    The sleeps hang in the graph as the products of a layer do, so whoever splits the backward splits them. The first
    stage has a parameter before its trunk (its embedding), as its inputs need no gradient and yet its layers do.
    """

    def __init__(self, seconds: Seconds, is_first: bool) -> None:
        super().__init__()
        self.seconds = seconds
        self.counter = Counter()
        self.weight = nn.Parameter(torch.zeros(()))
        self.embedding = nn.Parameter(torch.zeros(())) if is_first else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Sleep."""
        if self.embedding is not None:
            x = x + self.embedding
        trunk: Any = _Trunk.apply
        branch: Any = _Branch.apply
        output: torch.Tensor = trunk(x, self.seconds, self.counter) + branch(self.weight, self.seconds, self.counter)
        return output


class Summed(nn.Module):
    """A last stage: the sum of its outputs is the loss."""

    def __init__(self, work: Work) -> None:
        super().__init__()
        self.work = work

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The loss."""
        loss: torch.Tensor = self.work(x).sum()
        return loss


def loss_of(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The same, as torch's schedules ask for it."""
    return output.sum()
