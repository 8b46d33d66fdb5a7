"""Rules with everything that rules can say, and a bound map."""

from tricomm.rules import Rules, cat, each, fill, source, stack

RULES = Rules(
    {
        "l{l}.slots": stack([each("s", source("l{l}.e{logical[s]}")), source("shared")]),
        "copy.{l}.{e}": source("l{l}.e{e}", (2,)).unsqueeze(0).expand(3, -1).to("float64"),
        "word.{word_of[l]}.{flag}": source("l{l}.e0")[..., 0:1][None, 0],
        "one.{e}": source("wide")["{e}", ::2, 1:].permute(1, 0),
    },
    drop=["unused.*", source("wide")],
    l=range(2),
    e=range(3),
    s=range(5),
    logical=[0, 1, 2, 0, 1],
    word_of={0: "zero", 1: "one"},
    flag=[True, 1, "1.0"],
) + Rules({"padded": cat([source("shared").unflatten(-1, (2, -1)).flatten(), fill(-0.5, (6,)), fill(0, (0,))], dim=-1)})
SHAPES = {f"l{layer}.e{e}": (2,) for layer in range(2) for e in range(3)} | {"shared": (2,), "wide": (5, 4, 3)}
SHAPES |= {"unused.w": (7,)}
BOUND = Rules(
    {
        "l.{l}.qkv": cat([source("l.{l}.q"), source("l.{l}.k").unflatten(0, (2, 2)).permute(1, 0, 2).flatten(0, 1)]),
        "pad": cat([source("e").to("bfloat16"), fill(1.5, (2, 4))]),
    },
    l=range(3),
).bind(
    {f"l.{layer}.{x}": (6 if x == "q" else 4, 4) for layer in range(3) for x in "qk"} | {"e": (4, 4)},
    {f"l.{layer}.{x}": "float32" for layer in range(3) for x in "qk"} | {"e": "float32"},
)
