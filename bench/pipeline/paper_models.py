"""The models of the paper's section 5.2 by their sizes: operations of each stage, and the tensors between stages.

Sizes are those of the paper's artifact (facts/paper.md, 5.2). What it does not say is derived here and said in
``ASSUMPTIONS``; nothing is fitted to the paper's results.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

ASSUMPTIONS = (
    "hosts: 4 V100 with NVLink (40 GB/s between two devices) and one NIC of 10 Gb/s; latency 30 us, 30 us to post",
    "recomputation (remat): F is 1, the gradient of inputs with its recomputation 2, that of weights 1 forward of work",
    "GPT: fp16, sequences of 1024, vocabulary 51200; a layer's forward is 24 b s h^2 (1 + s / 6 h) operations, the "
    "logits of the last stage 2 b s h V, without recomputation",
    "GPT: a boundary is (sequences, 1024, h) in fp16, batch cut over dp, a copy on each rank of tp; so are gradients",
    "GPT 1.3B: the two devices of a stage are on a host of their own (on one host there would be no slow hop)",
    "GPT 2.6B in 4 stages: two stages share a host, so one of three hops crosses the network",
    "U-Transformer: layers, widths (c, 2c, 4c, 4c at 32, 16, 8, 4 pixels) and boundaries as alpa/model/unet_2d.py has "
    "them, 16 encoder states of 4c; fp32; cut after layer 7 (1B) or 8 (2B) of 0 to 12; what crosses is the hidden "
    "state and each long skip that is needed after the cut",
    "U-Transformer: how Alpa lays a tensor out in a stage is not known: both batch cut over its devices, and copies",
    "gradient all-reduce within a stage, optimizer, data loading and host time are left out for all alike",
)


Skips = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Tensor:
    """Elements per sample of what crosses a cut, as rows and columns."""

    name: str
    rows: int
    columns: int


@dataclass(frozen=True)
class Model:
    """A model cut into stages.

    Attributes:
        name, dtype: as the artifact has them.
        parameters: by the sizes below.
        forward_flops: per stage and sample.
        plain_flops: per stage and sample, forward operations whose activations are kept: they are not done again.
        cuts: per cut, the tensors that cross it.
    """

    name: str
    dtype: str
    parameters: int
    forward_flops: tuple[float, ...]
    plain_flops: tuple[float, ...]
    cuts: tuple[tuple[Tensor, ...], ...]


def gpt(name: str, hidden: int, layers: int, stages: int, sequence: int = 1024, vocabulary: int = 51200) -> Model:
    """A GPT in equal stages; the last one also computes the logits."""
    layer = 24 * sequence * hidden**2 * (1 + sequence / (6 * hidden))
    logits = 2 * sequence * hidden * vocabulary
    plain = (0.0,) * (stages - 1) + (float(logits),)
    parameters = layers * (12 * hidden**2 + 13 * hidden) + (vocabulary + sequence + 2) * hidden
    cut = (Tensor("hidden", sequence, hidden),)
    return Model(name, "float16", parameters, (layer * layers / stages,) * stages, plain, (cut,) * (stages - 1))


def u_transformer(name: str, width: int, last_of_first_stage: int) -> Model:
    """The U-Transformer in two stages."""
    layers = _u_layers(width)
    parts = layers[: last_of_first_stage + 1], layers[last_of_first_stage + 1 :]
    flops = tuple(2 * sum(layer.multiplies for layer in part) for part in parts)
    parameters = sum(layer.parameters for layer in layers)
    return Model(name, "float32", parameters, flops, (0.0, 0.0), (_crossing(layers, last_of_first_stage),))


@dataclass(frozen=True)
class _Layer:
    """One of the 13 layers.

    Attributes:
        multiplies: multiply-adds per sample.
        parameters: of its weights.
        hidden: (channels, pixels of a side) of its output.
        gives, takes: channels and pixels of the long skips that it gives, and that it needs.
    """

    multiplies: float
    parameters: int
    hidden: tuple[int, int] = (0, 0)
    gives: tuple[tuple[int, int], ...] = ()
    takes: tuple[tuple[int, int], ...] = ()


def _u_layers(width: int) -> list[_Layer]:
    """Where alpa/model/unet_2d.py marks boundaries: the first convolution; 4 levels down; 2 in the middle; one layer a
    level up, and two at the last; the last convolution. Widening by a convolution after each level.
    """
    c, d = width, 4 * width  # the narrowest, and the widest, which is also that of time and encoder states
    top, upper, lower, bottom = (c, 32), (2 * c, 16), (4 * c, 8), (4 * c, 4)

    def both(before: int, level: tuple[int, int]) -> list[_Layer]:
        return [_residual(before, *level, d), _transformer(*level, d)]

    def layer(parts: Sequence[_Layer], hidden: tuple[int, int], gives: Skips = (), takes: Skips = ()) -> _Layer:
        return replace(_sum(parts), hidden=hidden, gives=gives, takes=takes)

    first = [_convolution(3, c, 32), _linear(c, d), _linear(d, d)]
    return [
        layer(first, top, gives=(top,)),
        layer([*both(c, top), _convolution(c, c, 16)], (c, 16), gives=(top,)),
        layer([*both(c, upper), _convolution(2 * c, 2 * c, 8)], (2 * c, 8), gives=(upper,)),
        layer([*both(2 * c, lower), _convolution(d, d, 4)], bottom, gives=(lower,)),
        layer([_residual(d, *bottom, d)], bottom, gives=(bottom,)),
        layer(both(d, bottom), bottom),
        layer([_residual(d, *bottom, d)], bottom),
        layer(both(2 * d, bottom), bottom, takes=(bottom,)),
        layer([_convolution(d, d, 8), *both(2 * d, lower)], lower, takes=(lower,)),
        layer([_convolution(d, d, 16), *both(6 * c, upper)], upper, takes=(upper,)),
        layer([_convolution(2 * c, 2 * c, 32), _residual(3 * c, *top, d)], top, takes=(top,)),
        layer([_residual(2 * c, *top, d)], top, takes=(top,)),
        layer([_convolution(c, 4, 32)], (4, 32)),
    ]


def _crossing(layers: Sequence[_Layer], last: int) -> tuple[Tensor, ...]:
    """What a cut hands over: the output of its last layer, and the skips that are needed after it."""
    channels, side = layers[last].hidden
    skips = [Tensor("skip", size * size, wide) for layer in layers[last + 1 :] for wide, size in layer.takes]
    return (Tensor("hidden", side * side, channels), *skips)


def _residual(before: int, channels: int, size: int, embedding: int) -> _Layer:
    parts = [_convolution(before, channels, size), _convolution(channels, channels, size), _linear(embedding, channels)]
    parts += [_convolution(before, channels, size, kernel=1)] if before != channels else []
    return _sum(parts)


def _transformer(channels: int, size: int, states_width: int, states: int = 16) -> _Layer:
    """Self-attention, cross-attention to the encoder states, a gated feed-forward of 4 times the width."""
    tokens = size * size
    weights = (2 + 4 + 2 + 12) * channels**2
    state_weights = 2 * states_width * channels
    mixing = 2 * tokens * tokens * channels + 2 * tokens * states * channels
    return _Layer(tokens * weights + states * state_weights + mixing, weights + state_weights)


def _convolution(before: int, channels: int, size: int, kernel: int = 3) -> _Layer:
    weights = kernel * kernel * before * channels
    return _Layer(size * size * weights, weights)


def _linear(before: int, channels: int) -> _Layer:
    return _Layer(before * channels, before * channels)


def _sum(parts: Sequence[_Layer]) -> _Layer:
    return _Layer(sum(part.multiplies for part in parts), sum(part.parameters for part in parts))
