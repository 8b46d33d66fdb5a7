"""A backward in two steps gives the gradients of the whole one, and computes no product twice."""

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from tricomm.pipeline.run.backward import StageBackward

PRODUCTS = {"mm", "addmm", "bmm", "convolution_backward", "convolution", "native_layer_norm_backward"}


class Products(TorchDispatchMode):
    """Counts the operators that cost something."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in PRODUCTS:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        return x + self.down(torch.nn.functional.gelu(self.up(self.norm(x))))


class Twice(nn.Module):
    """One layer twice in a row: its bias and its norm leave the trunk in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.other = Block(), nn.Linear(8, 8)

    def forward(self, x):
        return self.other(self.block(self.block(x)))


class Derived(nn.Module):
    """A weight made from another, both used: one branch leads into another."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.gain = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.ones(8))

    def forward(self, x):
        scaled = self.weight * self.gain
        return torch.tanh(x * scaled[0]) @ scaled.cos().T + scaled.sum() + x * self.gain


class Square(torch.autograd.Function):
    """Of a custom function, everything is computed at once; it must not be asked twice."""

    calls = 0

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x * weight**2

    @staticmethod
    def backward(ctx, gradient):
        Square.calls += 1
        x, weight = ctx.saved_tensors
        return gradient * weight**2, (gradient * x * 2 * weight).sum(0)


class Custom(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.first, self.last = nn.Parameter(torch.randn(8)), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self.last(Square.apply(self.first(x), self.weight))


class Several(nn.Module):
    """Outputs that pass the input on, that depend on parameters only, that need no gradient, and views of one."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.alone = nn.Linear(8, 16), nn.Parameter(torch.randn(4))

    def forward(self, x):
        first, second = self.linear(x).chunk(2, dim=-1)
        twice = self.alone * 2
        return first, x, twice, x.detach() > 0, second.exp() * self.alone[0], twice, self.linear.weight


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv1d(4, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.SiLU(), nn.Conv1d(8, 4, 1))

    def forward(self, x):
        return self.net(x)


class Unused(nn.Module):
    """Parameters that are frozen or not used, and an input on which nothing depends."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen, self.used, self.idle = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.frozen.requires_grad_(False)

    def forward(self, x, y):
        return self.used(self.frozen(x)) + y.detach()


MODULES: list[tuple[Callable[[], nn.Module], int]] = [
    (Block, 1),
    (Twice, 1),
    (Derived, 1),
    (Custom, 1),
    (Several, 1),
    (Convolutions, 1),
    (Unused, 2),
    (lambda: nn.Sequential(Block(), Block(), nn.Flatten(0)), 1),
    (lambda: nn.MultiheadAttention(8, 2, batch_first=True), 3),
    (nn.Identity, 1),
]


def prepared(make: Callable[[], nn.Module], inputs: int):
    torch.manual_seed(3)
    module = make().double()
    leaves = [torch.randn(5, 4, 8, dtype=torch.float64).requires_grad_() for _ in range(inputs)]
    outputs = module(*leaves)
    outputs = tuple(out for out in (outputs if isinstance(outputs, tuple) else (outputs,)) if out is not None)
    gradients = [torch.randn(out.shape, dtype=torch.float64) for out in outputs]
    return module, leaves, outputs, gradients


@pytest.mark.parametrize(("make", "inputs"), MODULES)
def test_two_steps_give_what_one_gives(make, inputs) -> None:
    module, leaves, outputs, gradients = prepared(make, inputs)
    pairs = [(out, g) for out, g in zip(outputs, gradients, strict=True) if out.requires_grad]
    torch.autograd.backward([out for out, _ in pairs], [g for _, g in pairs])
    expected = {name: parameter.grad for name, parameter in module.named_parameters()}
    module, again, outputs, _ = prepared(make, inputs)
    split = StageBackward(again, outputs)
    found = split.input_gradients(gradients)
    del outputs
    for leaf, gradient in zip(leaves, found, strict=True):
        assert (leaf.grad is None) == (gradient is None)
        assert leaf.grad is None or torch.equal(leaf.grad, gradient)
    split.weight_gradients()
    for name, parameter in module.named_parameters():
        assert (expected[name] is None) == (parameter.grad is None), name
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-13, atol=1e-13, msg=name)


@pytest.mark.parametrize(("make", "inputs"), MODULES)
def test_nothing_is_computed_twice_and_weights_come_second(make, inputs) -> None:
    counts = []
    for how in ("whole", "split"):
        _, leaves, outputs, gradients = prepared(make, inputs)
        pairs = [(out, g) for out, g in zip(outputs, gradients, strict=True) if out.requires_grad]
        with Products() as whole:
            if how == "whole":
                torch.autograd.backward([out for out, _ in pairs], [g for _, g in pairs])
            else:
                split = StageBackward(leaves, outputs)
                split.input_gradients(gradients)
                first = Counter(whole.counts)
                split.weight_gradients()
        counts.append(whole.counts)
    matrix_products = {name: count for name, count in counts[0].items() if name in ("mm", "bmm", "addmm")}
    assert {name: counts[1][name] for name in matrix_products} == matrix_products
    if make is Block:
        assert first["mm"] == 2, "one product per linear layer"
        assert counts[1]["mm"] == 4


@pytest.mark.parametrize(("make", "inputs"), MODULES)
def test_the_whole_backward_needs_no_outputs(make, inputs) -> None:
    module, leaves, outputs, gradients = prepared(make, inputs)
    pairs = [(out, g) for out, g in zip(outputs, gradients, strict=True) if out.requires_grad]
    torch.autograd.backward([out for out, _ in pairs], [g for _, g in pairs])
    expected = {name: parameter.grad for name, parameter in module.named_parameters()}
    module, again, outputs, _ = prepared(make, inputs)
    whole = StageBackward(again, outputs)
    del outputs, pairs
    for leaf, gradient in zip(leaves, whole.run(gradients), strict=True):
        assert (leaf.grad is None) == (gradient is None)
        assert leaf.grad is None or torch.equal(leaf.grad, gradient)
    for name, parameter in module.named_parameters():
        assert (expected[name] is None) == (parameter.grad is None), name
        assert parameter.grad is None or torch.equal(parameter.grad, expected[name]), name


def test_a_custom_function_runs_once() -> None:
    for how in ("whole", "split"):
        module, leaves, outputs, gradients = prepared(Custom, 1)
        Square.calls = 0
        if how == "split":
            split = StageBackward(leaves, outputs)
            split.input_gradients(gradients)
            assert module.weight.grad is not None
            assert module.first.weight.grad is None
            split.weight_gradients()
        assert Square.calls == (how == "split")


def test_a_stage_without_inputs_does_all_in_the_second_step() -> None:
    module = Block().double()
    outputs = (module(torch.randn(3, 8, dtype=torch.float64)),)
    split = StageBackward([], outputs)
    assert split.input_gradients([torch.ones_like(outputs[0])]) == ()
    assert all(parameter.grad is None for parameter in module.parameters())
    split.weight_gradients()
    assert all(parameter.grad is not None for parameter in module.parameters())


def test_hooks_on_parameters_run_once_and_after_all() -> None:
    module, leaves, outputs, gradients = prepared(Block, 1)
    seen: list[str] = []
    for name, parameter in module.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: seen.append(name))
    split = StageBackward(leaves, outputs)
    split.input_gradients(gradients)
    assert seen == []
    split.weight_gradients()
    assert sorted(seen) == sorted(name for name, _ in module.named_parameters())
