"""Refused moves by rules: each names the rule, or the tensor."""

from typing import Any

from tests.refusals.common import COLUMNS, GRID, ROWS, Refusal
from tricomm import ArgumentError, Partial, PlanError, ShardingSpec, SpecError, make_plan
from tricomm.options import Options
from tricomm.plan.ends.mapped import _parts
from tricomm.rules import Rules, cat, fill, source
from tricomm.rules.views.settle import settled

NAMES = Rules({"wq": source("q"), "wk": cat([source("k"), fill(0, (4, 4))])})
KEPT = ShardingSpec(ROWS.mesh, ROWS.placements, (4, 4), "float32")
BEFORE = {"q": ROWS, "k": KEPT}
AFTER = {"wq": COLUMNS, "wk": COLUMNS}
ONLY = {"q": ROWS}
PADDED = Rules({"wq": cat([source("q"), fill(0, (1, 4))])})
PERMUTED = Rules({"wq": source("q").permute(1, 0)})
HALF = ShardingSpec.explicit({0: (((0, 4),), ((0, 4),))}, (8, 4), "float32")
NOTHING = ShardingSpec.explicit({0: ((), ((0, 4),))}, (8, 4), "float32")
TWICE = ShardingSpec.explicit({2: (((0, 2), (8, 9), (0, 2)), ((0, 4),))}, (9, 4), "float32")
SUMMED = ShardingSpec(GRID, (Partial(), ROWS.placements[0]), (8, 4), "float32")
PARTIAL = ShardingSpec(COLUMNS.mesh, (Partial(),))
FOLDED = Rules({"w": source("q").unflatten(0, (4, 2)).permute(1, 0, 2).flatten(0, 1)[1:]}, drop=["q"])


def plan(rules: Any = NAMES, before: Any = BEFORE, after: Any = AFTER) -> Any:
    return make_plan(before, after, rules=rules)


def bound(*names: str, dtype: str = "float32") -> Any:
    """A map of one tensor to its like, bound to sources of these names."""
    shapes = dict.fromkeys(names, (8, 4))
    return Rules({"wq": source("q")}, drop=["*"]).bind(shapes, dict.fromkeys(shapes, dtype))


def contributions() -> Any:
    """A piece of contributions that placements cannot say."""
    return plan(FOLDED, {"q": SUMMED}, {"w": COLUMNS})


def parts(laid: ShardingSpec, rules: Rules) -> Any:
    """The parts of the first piece of a rule, of which the destination is on two ranks."""
    (tensor,) = rules.bind({"q": (8, 4)}).tensors
    there = ShardingSpec(COLUMNS.mesh, COLUMNS.placements, tensor.shape, "float32")
    return _parts(tensor.pieces[0], laid, there)


# fmt: off
REFUSALS: dict[str, Refusal] = {
    "rules that are none": (lambda: plan("wq = q"), ArgumentError,
        "rules='wq = q'", "must be Rules", "write Rules({"),
    "an option of rules that are none": (lambda: Options(rules=3), ArgumentError,  # type: ignore[arg-type]
        "rules=3", "must be Rules", "write Rules({"),
    "rules for one tensor": (lambda: plan(NAMES, ROWS, COLUMNS), ArgumentError,
        "source=ShardingSpec", "rules are between many tensors", "give {name: ShardingSpec}"),
    "rules bound to a source that is not there": (lambda: plan(bound("q", "x"), ONLY, {"wq": COLUMNS}), SpecError,
        "read 'x'", "which the source has not", "bind them anew"),
    "rules bound to another dtype": (lambda: plan(bound("q", dtype="int8"), ONLY, {"wq": COLUMNS}), SpecError,
        "'q' of (8, 4) int8", "(8, 4) float32", "bind them to the shapes and dtypes"),
    "rules bound without a source": (lambda: plan(bound("q"), {**ONLY, "x": ROWS}, {"wq": COLUMNS}), SpecError,
        "without source 'x'", "bound without", "bind them with it"),
    "a name that no rule makes": (lambda: plan(after={**AFTER, "wv": COLUMNS}), SpecError,
        "destination 'wv'", "made by no rule", "write a rule for it"),
    "a name that nobody asked for": (lambda: plan(after={"wq": COLUMNS}), SpecError,
        "rule 'wk' makes 'wk'", "which the destination has not", "leave out the rule"),
    "only fills": (lambda: plan(Rules({"z": fill(0, (2, 2))}, drop=["q"]), ONLY, {"z": COLUMNS}), SpecError,
        "rule 'z', tensor 'z'", "made of fills alone", "give one in its layout"),
    "another shape than the rule's": (lambda: plan(after={**AFTER, "wq": KEPT}), SpecError,
        "rule 'wq', tensor 'wq'", "makes shape (8, 4), and its layout says (4, 4)", "correct one of them"),
    "two casts": (lambda: plan(Rules({"wq": source("q").to("bfloat16")}), ONLY, {"wq": HALF}), SpecError,
        "rule 'wq'", "casts to bfloat16, and its layout says float32", "cast in one place only"),
    "a destination that is partial": (lambda: plan(after={**AFTER, "wq": PARTIAL}), SpecError,
        "rule 'wq'", "is Partial", "reshard to Replicate() or Shard(dim)"),
    "a place that no walk reaches": (lambda: plan(PADDED, ONLY, {"wq": TWICE}), SpecError,
        "rule 'wq', tensor 'wq'", "some of them several times", "stack() or expand()"),
    "the same of a piece": (lambda: settled(PADDED.bind({"q": (8, 4)}).tensors[0].pieces[0], ROWS, TWICE), SpecError,
        "holds coordinates ((0, 2), (8, 9), (0, 2)) of dim 0", "some of them several times", "stack() or expand()"),
    "a source of which nobody holds some": (lambda: plan(PERMUTED, {"q": HALF}, {"wq": COLUMNS}), PlanError,
        "rule for wq <- q", "are held by no rank", "add them"),
    "a source that nobody holds": (lambda: plan(PERMUTED, {"q": NOTHING}, {"wq": COLUMNS}), PlanError,
        "rule 'wq', tensor 'wq'", "that no rank of", "add them to a holding"),
    "the same of a piece of it": (lambda: parts(NOTHING, PERMUTED), PlanError,
        "it needs elements, from [0, 0] on", "that no rank of", "take them out of the destination"),
    "the same of a piece of contributions": (lambda: parts(SUMMED, FOLDED), SpecError,
        "no whole part", "contributions are added before", "reshard it to Shard or Replicate first"),
    "contributions in parts": (contributions, SpecError,
        "rule 'w', tensor 'w'", "contributions are added before", "reshard it to Shard or Replicate first"),
}
# fmt: on
