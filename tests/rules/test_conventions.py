"""The layouts of the field, each against its index formula, element by element; and what ranks then hold.

The formulas are those of the systems themselves, in plain integers; no torch word and no piece is used in them.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest

from tricomm import Mesh, Replicate, Shard, ShardingSpec
from tricomm.rules import Expression, Rules, cat, each, fill, source, stack, within
from tricomm.rules.models import Model, megatron, torchtitan, vllm

H, HEADS, GROUPS, D = 8, 4, 2, 2
"""The example of all conventions: hidden size, heads, kv heads, head size."""

q, k, v = (source(name, (heads * D, H)) for name, heads in (("q", HEADS), ("k", GROUPS), ("v", GROUPS)))
PER_GROUP = HEADS // GROUPS

Place = tuple[Any, ...] | None
"""A source and an index in it; None for a fill."""


class Convention(NamedTuple):
    name: str
    expression: Expression
    formula: Callable[..., Place]
    """From a destination index."""
    pieces: int
    indices: dict[str, Any] | None = None


def joined(sizes: dict[str, int], row: int) -> tuple[str, int]:
    """One after the other."""
    for name, size in sizes.items():
        if row < size:
            return name, row
        row -= size
    raise AssertionError


def linear_qkv(row: int, column: int) -> Place:
    """C2: R = (h/G + 2) D rows per group: its q heads, then k, then v."""
    group, within = divmod(row, (PER_GROUP + 2) * D)
    head, d = divmod(within, D)
    if head < PER_GROUP:
        return "q", (group * PER_GROUP + head) * D + d, column
    return "kv"[head - PER_GROUP], group * D + d, column


def repeated_kv(row: int, column: int) -> Place:
    """C1, t = 4 > G = 2: slot r holds kv head r // (t / G)."""
    name, row = joined({"q": 8, "k": 8, "v": 8}, row)
    return (name, row, column) if name == "q" else (name, (row // D) // (4 // GROUPS) * D + row % D, column)


def glu_rows(n: int) -> Callable[..., Place]:
    """C4: row(x, b, j) = b 2n + x n + j."""
    places = {b * 2 * n + x * n + j: ("gu"[x], b * n + j) for x in range(2) for b in range(8 // n) for j in range(n)}
    return lambda row, column: (*places[row], column)


def rope_rows(row: int, column: int) -> Place:
    """C5: TT[a, 2p + c] = HF[a, c D/2 + p], with D = 4."""
    head, within = divmod(row, 4)
    p, c = divmod(within, 2)
    return "r", head * 4 + c * 2 + p, column


def gpt_oss_w13(e: int, row: int, column: int) -> Place:
    """Rows 0 to I - 1 are the even columns, the others the odd ones, of [E, H, 2I]."""
    return ("gu_oss", e, column, 2 * row) if row < 3 else ("gu_oss", e, column, 2 * (row - 3) + 1)


g, u = source("g", (8, H)), source("u", (8, H))
r = source("r", (16, H))
x = source("x", (24, 5))
gu_oss = source("gu_oss", (2, 5, 6))
conv = source("conv", (3, 2, 2, 2, 2))
experts = {f"{word}.{e}": source(f"{word}.{e}", (3, 4)) for word in ("gate", "up") for e in range(4)}


def w13(first: str, second: str, variable: str = "{e}") -> Expression:
    return stack([each("e", cat([source(f"{word}.{variable}", (3, 4)) for word in (first, second)]))])


def w13_places(first: str, second: str, logical: list[int]) -> Callable[..., Place]:
    return lambda e, row, column: (f"{first if row < 3 else second}.{logical[e]}", row % 3, column)


CONVENTIONS = [
    Convention("C1 q|k|v", cat([q, k, v]), lambda row, c: (*joined({"q": 8, "k": 4, "v": 4}, row), c), 3),
    Convention(
        "C1 kv heads repeated, t = 4",
        cat([q, *(s.unflatten(0, (GROUPS, 1, D)).expand(-1, 2, -1, -1).flatten(0, 2) for s in (k, v))]),
        repeated_kv,
        3,
    ),
    Convention(
        "C2 linear_qkv",
        cat([s.unflatten(0, (GROUPS, -1)) for s in (q, k, v)], dim=1).flatten(0, 1),
        linear_qkv,
        3,
    ),
    Convention("C3 gate|up", cat([g, u]), lambda row, c: (*joined({"g": 8, "u": 8}, row), c), 2),
    Convention(
        "C4 alternating by 2", cat([g, u]).unflatten(0, (2, 4, 2)).permute(1, 0, 2, 3).flatten(0, 2), glu_rows(2), 2
    ),
    Convention(
        "C4 alternating by 1", cat([s.unflatten(0, (-1, 1)) for s in (g, u)], dim=1).flatten(0, 1), glu_rows(1), 2
    ),
    Convention("C5 RoPE pairs", r.unflatten(0, (4, 2, 2)).permute(0, 2, 1, 3).flatten(0, 2), rope_rows, 1),
    Convention(
        "C6 vocabulary and LoRA tokens",
        cat([source("emb", (10, 4)), fill(0, (6, 4)), fill(0, (8, 4))]),
        lambda row, c: ("emb", row, c) if row < 10 else None,
        2,
    ),
    Convention("C7 w13", w13("gate", "up"), w13_places("gate", "up", [0, 1, 2, 3]), 8, {"e": range(4)}),
    Convention("C7 up first", w13("up", "gate"), w13_places("up", "gate", [0, 1, 2, 3]), 8, {"e": range(4)}),
    Convention(
        "C7 slots of EPLB",
        w13("gate", "up", "{p2l[e]}"),
        w13_places("gate", "up", [2, 0, 1, 2, 3, 0]),
        8,  # the two places of an expert are one piece
        {"e": range(6), "p2l": [2, 0, 1, 2, 3, 0]},
    ),
    Convention(
        "C7 round robin of local experts",
        stack([each("e", source("gate.{global_of[e]}", (3, 4)))]),
        lambda e, row, c: (f"gate.{[1, 3][e]}", row, c),
        2,
        {"e": range(2), "global_of": {0: 1, 1: 3}},
    ),
    Convention(
        "C8 I padded",
        cat([source("w2", (2, 4, 3)), fill(0, (2, 4, 5))], dim=2),
        lambda e, row, c: ("w2", e, row, c) if c < 3 else None,
        2,
    ),
    Convention(
        "C9 fused q_a and kv_a",
        cat([source("q_a", (6, 4)), source("kv_a", (3, 4))]),
        lambda row, c: (*joined({"q_a": 6, "kv_a": 3}, row), c),
        2,
    ),
    Convention(
        "C9 W_UK of kv_b, nope 2 and v 3",
        source("kv_b", (20, 5)).unflatten(0, (4, 5))[:, :2],
        lambda a, d, c: ("kv_b", a * 5 + d, c),
        1,
    ),
    Convention(
        "C9 W_UV of kv_b",
        source("kv_b", (20, 5)).unflatten(0, (4, 5))[:, 2:],
        lambda a, d, c: ("kv_b", a * 5 + 2 + d, c),
        1,
    ),
    Convention(
        "C10 q of in_proj_qkvz, K 2, D 2, vpg 2",
        x.unflatten(0, (2, -1))[:, 0:2].flatten(0, 1),
        lambda row, c: ("x", [0, 1, 12, 13][row], c),
        1,
    ),
    Convention(
        "C10 in_proj of Mamba",
        cat([source(name, (n, 3)) for name, n in (("z", 4), ("xx", 4), ("B", 2), ("C", 2), ("dt", 1))]),
        lambda row, c: (*joined({"z": 4, "xx": 4, "B": 2, "C": 2, "dt": 1}, row), c),
        5,
    ),
    Convention("C10 conv1d [c, 1, k]", source("c1", (4, 3))[:, None], lambda channel, _, tap: ("c1", channel, tap), 1),
    Convention("C12 Conv1D [in, out]", source("lin", (3, 5)).permute(1, 0), lambda i, o: ("lin", o, i), 1),
    Convention(
        "C12 gpt-oss, even and odd columns",
        gu_oss.unflatten(2, (3, 2)).permute(0, 3, 2, 1).flatten(1, 2),
        gpt_oss_w13,
        1,
    ),
    Convention(
        "C12 Llama-4, the same shape in halves",
        gu_oss.permute(0, 2, 1),
        lambda e, row, c: ("gu_oss", e, c, row),
        1,
    ),
    Convention(
        "C12 conv3d as linear",
        conv.flatten(1),
        lambda o, i: ("conv", o, i // 8, i // 4 % 2, i // 2 % 2, i % 2),
        1,
    ),
    Convention(
        "C12 layers stacked",
        stack([each("l", source("w.{l}", (2, 3)))]),
        lambda layer, row, c: (f"w.{layer}", row, c),
        4,
        {"l": range(4)},
    ),
    Convention(
        "C12 Levanter's q [G, h/G, D, H]",
        q.unflatten(0, (GROUPS, PER_GROUP, D)),
        lambda group, head, d, c: ("q", (group * PER_GROUP + head) * D + d, c),
        1,
    ),
    Convention(
        "a gate per head as one per row",
        source("gate1", (4,))[:, None].expand(-1, 3).flatten(),
        lambda row: ("gate1", row // 3),
        1,
    ),
]


@pytest.mark.parametrize("convention", CONVENTIONS, ids=[one.name for one in CONVENTIONS])
def test_a_convention_is_its_formula(convention: Convention) -> None:
    """There element by element, in as few pieces as it has; and back, if nothing is left out."""
    rules = Rules({"out": convention.expression}, drop=["*"], **(convention.indices or {}))
    bound = rules.bind()
    arrays = {
        name: np.arange(np.prod(shape)).reshape(shape) + 1000 * (n + 1)
        for n, (name, shape) in enumerate(bound.source_shapes.items())
    }
    made = rules.evaluate(arrays)["out"]
    for index in np.ndindex(made.shape):
        place = convention.formula(*index)
        assert made[index] == (0 if place is None else arrays[place[0]][place[1:]]), index
    assert len(bound.tensors[0].pieces) == convention.pieces
    back = bound.reverse(fill=-1)
    for name, array in back.evaluate({"out": made}).items():
        assert ((array == arrays[name]) | (array == -1)).all()
        carried = {convention.formula(*index) for index in np.ndindex(made.shape)}
        assert all((array[index] >= 0) == ((name, *index) in carried) for index in np.ndindex(array.shape))


SMALL = Model(layers=1, hidden=H, heads=HEADS, kv_heads=GROUPS, head_dim=D, intermediate=8, vocab=1010, rope_pairs=True)
CODES = {"q_proj": 0, "k_proj": 100, "v_proj": 200, "gate_proj": 300, "up_proj": 400}


def rows(rules: Rules, name: str) -> np.ndarray:
    """Which source row stands in each row of a destination: q 0.., k 100.., v 200.., gate 300.., up 400.."""
    shapes = rules.bind().source_shapes
    codes = {path: next((code for word, code in CODES.items() if word in path), 0) for path in shapes}
    arrays = {
        path: np.broadcast_to(np.arange(shape[0]).reshape(-1, *[1] * (len(shape) - 1)) + codes[path], shape)
        for path, shape in shapes.items()
    }
    made = rules.evaluate(arrays)[name]
    return np.asarray(made[:, 0])


def held(rules: Rules, name: str, ranks: int, *segments: int) -> list[list[int]]:
    """The same for each rank of a cut of the rows."""
    whole = rows(rules, name)
    shape = rules.bind().shapes[name]
    spec = ShardingSpec(Mesh(range(ranks), ("tp",)), (Shard(0, segments=segments or None),), shape)
    return [
        [int(whole[at]) for start, stop in spec.holding(rank)[0] for at in range(start, stop)] for rank in range(ranks)
    ]


def test_what_ranks_hold_of_qkv() -> None:
    """C1 and C2 at t = 1, 2 and 4 > G, as the systems' own ranks hold them."""
    server = "model.layers.0.self_attn.qkv_proj.weight"
    assert held(vllm(SMALL), server, 2, 8, 4, 4) == [
        [0, 1, 2, 3, 100, 101, 200, 201],
        [4, 5, 6, 7, 102, 103, 202, 203],
    ]
    assert held(vllm(SMALL, tp=4), server, 4, 8, 8, 8) == [
        [0, 1, 100, 101, 200, 201],
        [2, 3, 100, 101, 200, 201],
        [4, 5, 102, 103, 202, 203],
        [6, 7, 102, 103, 202, 203],
    ]
    trainer = "decoder.layers.0.self_attention.linear_qkv.weight"
    groups = [[0, 1, 2, 3, 100, 101, 200, 201], [4, 5, 6, 7, 102, 103, 202, 203]]
    assert held(megatron(SMALL), trainer, 1) == [groups[0] + groups[1]]
    assert held(megatron(SMALL, tp=2), trainer, 2) == groups
    assert held(megatron(SMALL, tp=4), trainer, 4) == [
        [0, 1, 2, 3],
        [100, 101, 200, 201],
        [4, 5, 6, 7],
        [102, 103, 202, 203],
    ]


def test_what_ranks_hold_of_the_mlp_and_of_rope() -> None:
    """C3 at t = 2, and C5 with D = 4."""
    fc1 = "decoder.layers.0.mlp.linear_fc1.weight"
    expected = [[300, 301, 302, 303, 400, 401, 402, 403], [304, 305, 306, 307, 404, 405, 406, 407]]
    assert held(megatron(SMALL, tp=2), fc1, 2, 8, 8) == expected
    wide = Model(layers=1, hidden=8, heads=2, kv_heads=1, head_dim=4, intermediate=4, vocab=8, rope_pairs=True)
    assert rows(torchtitan(wide), "layers.0.attention.qkv_linear.wq.weight").tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert rows(torchtitan(wide), "layers.0.attention.qkv_linear.wv.weight").tolist() == [200, 201, 202, 203]


@pytest.mark.parametrize(
    ("vocab", "megatron_rows", "server_rows"),
    [
        (128256, {1: 128256, 2: 128256, 4: 128512, 8: 129024}, 128256),
        (151936, {1: 151936, 2: 152064, 4: 152064, 8: 152576}, 151936),
        (129280, {1: 129280, 2: 129280, 4: 129536, 8: 130048}, 129280),
    ],
)
def test_vocabularies_are_padded(vocab: int, megatron_rows: dict[int, int], server_rows: int) -> None:
    """C6, for Llama-3, Qwen3 and DeepSeek-V3."""
    model = Model(layers=1, hidden=1, heads=1, kv_heads=1, head_dim=1, intermediate=1, vocab=vocab)
    for tp, expected in megatron_rows.items():
        assert megatron(model, tp=tp).bind().shapes["embedding.word_embeddings.weight"] == (expected, 1)
        assert megatron(model, tp=tp).bind().shapes["output_layer.weight"] == (expected, 1)
    assert vllm(model).bind().shapes["lm_head.weight"] == (server_rows, 1)


def test_tokens_of_adapters_are_padded_apart() -> None:
    """C6: 1010 + 16 tokens are 1024 and 64 rows."""
    name = "model.embed_tokens.weight"
    assert vllm(SMALL, lora_tokens=16).bind().shapes[name] == (1024 + 64, H)
    assert (rows(vllm(SMALL, lora_tokens=16), name)[1010:] == 0).all()


def test_experts_that_do_not_divide_are_an_explicit_layout() -> None:
    """C7: 10 experts on 4 ranks are 3, 3, 2, 2; a map says nothing of it, and pieces are cut by it all the same."""
    bound = Rules({"w": stack([each("e", source("{e}", (2, 3)))])}, e=range(10)).bind()
    edges = [(0, 3), (3, 6), (6, 8), (8, 10)]
    holdings: Any = {rank: ((edge,), ((0, 2),), ((0, 3),)) for rank, edge in enumerate(edges)}
    spec = ShardingSpec.explicit(holdings, (10, 2, 3))
    counts = [sum(len(within(piece, spec.holding(rank))) for piece in bound.tensors[0].pieces) for rank in range(4)]
    assert counts == [3, 3, 2, 2]


def test_a_cut_inside_a_head_takes_few_pieces() -> None:
    """C2 at t > G and odd cuts: never more than 2k - 1 parts of a piece of k digits, wherever the cut falls."""
    (tensor,) = (
        Rules({"qkv": cat([s.unflatten(0, (GROUPS, -1)) for s in (q, k, v)], dim=1).flatten(0, 1)}).bind().tensors
    )
    for start in range(16):
        for stop in range(start + 1, 17):
            parts = [within(piece, (((start, stop),), ((0, H),))) for piece in tensor.pieces]
            assert all(len(some) <= 2 * len(piece.digits) - 1 for some, piece in zip(parts, tensor.pieces, strict=True))
            assert sum(part.numel for some in parts for part in some) == (stop - start) * H


def test_replicated_layouts_take_pieces_whole() -> None:
    (tensor,) = Rules({"qkv": cat([q, k, v])}).bind().tensors
    spec = ShardingSpec(Mesh(range(2), ("tp",)), (Replicate(),), tensor.shape)
    assert [within(piece, spec.holding(1)) for piece in tensor.pieces] == [[piece] for piece in tensor.pieces]
