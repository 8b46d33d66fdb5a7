"""The house rules of DESIGN.md, read from the source: who imports whom, how long things are, and what is global."""

import ast
import importlib
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

import tricomm

ROOT = Path(__file__).resolve().parent.parent
MAX_FILE_LINES = 420
MAX_BODY_LINES = 60
MAX_FOLDER_FILES = 15

# A module may import what stands in an earlier row, and its own package; never its own row or a later one.
LAYERS = [
    ["errors", "kernels", "launch", "stats"],
    ["interop", "kinds"],
    ["compiled", "layout"],
    ["rules"],
    ["hooks", "plan"],
    ["options", "packing"],
    ["transport"],
    ["autograd"],
    ["resharder"],
    ["reshard"],
    ["redistribute"],
    ["connect", "pipeline"],
    ["demo", "draw"],
    ["cli"],
    ["", "__main__"],
    ["examples"],
]
# The same inside of a package.
LAYERS_WITHIN = {
    "autograd": [["layouts"], ["tape"], ["gradients"]],
    "resharder": [["costs", "repeat", "staying"], ["connected"], ["selections"], ["calls"], ["resharder"]],
    "pipeline": [
        ["schedule"],
        ["costs"],
        ["tune"],
        ["run"],
        ["torch_checks", "torch_dtensors"],
        ["torch_stage"],
        ["torch_adapter"],
    ],
    "plan": [
        ["network", "parts", "reduction", "refine"],
        ["tasks"],
        ["stacks"],
        ["senders"],
        ["routes"],
        ["move"],
        ["cost"],
        ["arguments", "choice"],
        ["ends", "product"],
        ["describe"],
        ["program"],
        ["verify"],
        ["plan"],
        ["planner"],
    ],
}
WITHOUT_TORCH = {"errors", "hooks", "kinds", "stats", "layout", "rules", "plan", "draw"}
WITHOUT_TORCH |= {"pipeline.schedule", "pipeline.costs", "pipeline.tune"}
# The demo compares with isend and irecv written by hand, and examples are what users write.
WITH_DISTRIBUTED = {
    "transport.coordination.coordinator",
    "transport.channel",
    "transport.gloo",
    "connect.store",
    "connect.world",
    "transport.group",
    "transport.accelerator",
    "launch",
    "interop",
    "pipeline.run.executor",
    "pipeline.torch_adapter",
    "pipeline.torch_stage",
    "demo",
    "examples",
}
DETECTION = ("layout.topology", "detect")


class Import(NamedTuple):
    """``module`` (without "tricomm.") imports ``target`` inside ``function`` ("" at module level)."""

    module: str
    function: str
    target: str

    def is_of(self, package: str) -> bool:
        return self.target == package or self.target.startswith(package + ".")


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def module_name(path: Path) -> str:
    """Without "tricomm."; the folder kernels/ is installed as tricomm.kernels."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts[1:] if parts[0] == "tricomm" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sources("tricomm", "kernels")}
BENCH = {module_name(path): path for path in sources("bench")}


def read_imports(module: str, node: ast.AST, function: str = "", typing: bool = False) -> Iterator[Import]:
    """THE DEFINITION: every import below a node, wherever it stands; those for type checkers only if ``typing``."""
    if not typing and isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
        children: list[ast.stmt] = node.orelse
        yield from (found for child in children for found in read_imports(module, child, function))
        return
    if isinstance(node, ast.Import):
        yield from (Import(module, function, alias.name) for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0, f"{module}: relative import; write the full name"
        for alias in node.names:
            # "from a import b" may name a module; then that is what is imported.
            whole = f"{node.module}.{alias.name}"
            is_module = whole.removeprefix("tricomm.") in MODULES or whole in BENCH or whole == "torch.distributed"
            yield Import(module, function, whole if is_module else str(node.module))
    elif isinstance(node, ast.Attribute) and node.attr == "distributed" and ast.unparse(node) == "torch.distributed":
        yield Import(module, function, "torch.distributed")
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        function = node.name
    for child in ast.iter_child_nodes(node):
        yield from read_imports(module, child, function, typing)


@cache
def imports() -> list[Import]:
    return [found for module, path in MODULES.items() for found in read_imports(module, parsed(path))]


def layer(name: str, layers: list[list[str]] = LAYERS) -> int:
    assert any(name in row for row in layers), f"{name} stands in no row of the layers; give it one"
    return next(index for index, row in enumerate(layers) if name in row)


def inside(found: Import) -> str | None:
    """The module of tricomm that is imported, or None."""
    return found.target.removeprefix("tricomm").removeprefix(".") if found.is_of("tricomm") else None


def test_imports_point_one_way() -> None:
    for found in imports():
        target = inside(found)
        if target is None:
            continue
        here, there = found.module.split("."), target.split(".")
        told = f"tricomm.{found.module} imports tricomm.{target}"
        if here[0] != there[0]:
            assert layer(there[0]) < layer(here[0]), told
        elif here[0] in LAYERS_WITHIN and len(here) > 1 and here[1] != there[1]:
            assert layer(there[1], LAYERS_WITHIN[here[0]]) < layer(here[1], LAYERS_WITHIN[here[0]]), told


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Modules that import each other, each the next and the last the first; [] if there are none."""
    while graph:
        leaves = {module for module, targets in graph.items() if not targets & graph.keys()}
        if not leaves:
            path = [min(graph)]
            while path[-1] not in path[:-1]:
                path.append(min(graph[path[-1]] & graph.keys()))
            return path[path.index(path[-1]) : -1]
        graph = {module: targets for module, targets in graph.items() if module not in leaves}
    return []


def test_files_do_not_import_each_other_in_a_circle_not_even_for_types() -> None:
    graph: dict[str, set[str]] = {module: set() for module in MODULES}
    for module, path in MODULES.items():
        for found in read_imports(module, parsed(path), typing=True):
            target = inside(found)
            if target in MODULES:
                graph[module].add(target)
    assert circle(graph) == []
    of_bench = {
        module: {found.target for found in read_imports(module, parsed(path), typing=True)} & BENCH.keys()
        for module, path in BENCH.items()
    }
    assert of_bench["bench.cluster.cli"] >= {"bench.cluster.network", "bench.cluster.calibrate"}
    assert circle(of_bench) == []


def test_a_circle_is_found() -> None:
    text = """
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    from tricomm.plan.plan import Plan
"""
    (found,) = [one for one in read_imports("plan.verify", ast.parse(text), typing=True) if inside(one)]
    graph = {
        "plan.plan": {"plan.verify", "errors"},
        "plan.verify": {str(inside(found))},
        "errors": set(),
        "cli": {"plan.plan"},
    }
    assert sorted(circle(graph)) == ["plan.plan", "plan.verify"]
    assert circle({**graph, "plan.verify": set()}) == []


def under(module: str, names: set[str]) -> bool:
    return any(module == name or module.startswith(name + ".") for name in names)


MAKERS = {"arange", "as_tensor", "asarray", "empty", "eye", "full", "linspace", "ones", "rand", "randint", "randn"}
MAKERS |= {"randperm", "scalar_tensor", "tensor", "zeros"}


def test_tensors_are_made_on_a_device_that_is_said() -> None:
    """A user may have set another default device, on which nobody sends, receives, or reads an answer."""
    found = [
        f"{path}:{call.lineno}"
        for path in sorted((ROOT / "tricomm").rglob("*.py"))
        if path.parent.name != "examples" and path.name != "demo.py"
        for call in ast.walk(ast.parse(path.read_text()))
        if isinstance(call, ast.Call)
        and isinstance(call.func, ast.Attribute)
        and call.func.attr in MAKERS
        and ast.unparse(call.func.value) == "torch"
        and not any(keyword.arg in ("device", None) for keyword in call.keywords)
    ]
    assert found == []


def test_planning_needs_no_torch() -> None:
    for found in imports():
        if under(found.module, WITHOUT_TORCH) and (found.module, found.function) != DETECTION:
            outside = [name for name in ("torch", "triton", "tricomm.kernels") if found.is_of(name)]
            assert not outside, f"tricomm.{found.module} imports {found.target}"


def test_torch_distributed_stays_where_it_belongs() -> None:
    for found in imports():
        if found.is_of("torch.distributed.tensor"):
            assert under(found.module, {"interop", "examples"}), f"tricomm.{found.module} imports {found.target}"
        elif found.is_of("torch.distributed") and (found.module, found.function) != DETECTION:
            assert under(found.module, WITH_DISTRIBUTED), f"tricomm.{found.module} imports {found.target}"


def test_kernels_know_torch_and_triton_and_nobody_else_knows_triton() -> None:
    for found in imports():
        if under(found.module, {"kernels"}):
            own = inside(found) is None or found.is_of("tricomm.kernels")
            assert own, f"kernels: {found.module} imports {found.target}"
        else:
            assert not found.is_of("triton"), f"tricomm.{found.module} imports {found.target}"


TRITON = ("kernels.jit", "kernels.jit_casts", "kernels.jit_shifted", "kernels.jit_table")


def test_kernels_import_triton_only_where_it_is_needed() -> None:
    for found in imports():
        needs = found.is_of("triton") or any(found.is_of(f"tricomm.{module}") for module in TRITON)
        assert not needs or found.function or found.module in TRITON, f"{found.module} imports {found.target}"


def test_the_reader_of_imports_sees_them_all() -> None:
    text = """
import torch.distributed as dist
from torch import distributed
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    import triton
else:
    import numpy
def late():
    try:
        from tricomm import reshard, errors
        torch.distributed.barrier()
    finally:
        pass
"""
    found = [(one.function, one.target) for one in read_imports("x", ast.parse(text))]
    assert found[:4] == [("", "torch.distributed"), ("", "torch.distributed"), ("", "typing"), ("", "numpy")]
    assert found[4:] == [("late", "tricomm.reshard"), ("late", "tricomm.errors"), ("late", "torch.distributed")]
    assert {("layout.topology", "detect", "torch.distributed"), ("plan.planner", "", "tricomm.plan.tasks")} <= set(
        imports()
    )
    assert len(MODULES) > 30


def test_files_are_short() -> None:
    counts = {path: len(path.read_text().splitlines()) for path in sources("tricomm", "kernels", "bench", "tests")}
    assert {str(path.relative_to(ROOT)): count for path, count in counts.items() if count > MAX_FILE_LINES} == {}


def test_folders_are_small_and_say_what_lives_there() -> None:
    for folder in {path.parent for path in sources("tricomm", "kernels", "bench", "tests")}:
        files = [path.name for path in folder.glob("*.py")]
        assert len(files) <= MAX_FOLDER_FILES, f"{folder.relative_to(ROOT)} has {len(files)} files"
        if "tests" not in folder.parts:
            assert ast.get_docstring(parsed(folder / "__init__.py")), (
                f"{folder}/__init__.py does not say what lives here"
            )


def test_functions_are_short() -> None:
    long = {}
    for module, path in (MODULES | BENCH).items():
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or 0) - node.body[0].lineno + 1
                if lines > MAX_BODY_LINES:
                    long[f"{module}.{node.name}"] = lines
    assert long == {}


def test_kernels_at_the_top_of_a_checkout_say_what_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT)
    with pytest.raises(ImportError, match=r"is the package tricomm\.kernels .*pip install -e \."):
        importlib.import_module("kernels")


def test_only_tricomm_is_installed_with_the_kernels_inside() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert settings["package-dir"] == {"": ".src"}
    assert [path.name for path in (ROOT / ".src").iterdir() if not path.name.endswith(".egg-info")] == ["tricomm"]
    assert (ROOT / ".src" / "tricomm").resolve() == ROOT / "tricomm"
    assert (ROOT / "tricomm" / "kernels").resolve() == ROOT / "kernels"
    packages = {path.parent for path in (ROOT / "tricomm").rglob("*.py")}
    assert all((package / "__init__.py").is_file() for package in packages)


def test_public_names_are_sorted_and_exist() -> None:
    assert tricomm.__all__ == sorted(set(tricomm.__all__))
    assert [name for name in tricomm.__all__ if not hasattr(tricomm, name)] == []


MUTABLE_DISPLAYS = (ast.List, ast.Dict, ast.Set, ast.ListComp, ast.DictComp, ast.SetComp)
MUTABLE_CALLS = {"list", "dict", "set", "bytearray", "defaultdict", "deque", "Counter", "OrderedDict", "ChainMap"}
MUTABLE_CALLS |= {"WeakKeyDictionary", "WeakValueDictionary", "WeakSet", "local", "Lock", "RLock", "count"}
MUTATING_METHODS = {"append", "extend", "insert", "add", "update", "setdefault", "pop", "popitem", "clear", "remove"}


def is_mutable(value: ast.expr | None) -> bool:
    if isinstance(value, ast.Call):
        return ast.unparse(value.func).split(".")[-1].split("[")[0] in MUTABLE_CALLS
    return isinstance(value, MUTABLE_DISPLAYS)


def module_level(node: ast.AST) -> Iterator[ast.stmt]:
    """The statements that run on import, also those inside of if, try, with and for."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.stmt):
            yield child
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda):
            yield from module_level(child)


def mutable_globals(tree: ast.Module) -> set[str]:
    names: set[str] = set()
    for node in module_level(tree):
        if isinstance(node, ast.Assign | ast.AnnAssign) and is_mutable(node.value):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {ast.unparse(target) for target in targets}
    return names - {"__all__"}


def written(tree: ast.Module) -> set[str]:
    """Names of which something is stored in, deleted from, or changed by a method."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Subscript) and not isinstance(node.ctx, ast.Load):
            names.add(ast.unparse(node.value))
        elif isinstance(node, ast.AugAssign):
            names.add(ast.unparse(node.target))
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in MUTATING_METHODS:
            names.add(ast.unparse(node.func.value))
    return names


@pytest.mark.parametrize("module", MODULES)
def test_modules_keep_no_state(module: str) -> None:
    tree = parsed(MODULES[module])
    kept = mutable_globals(tree)
    assert {name for name in kept if name != name.upper()} == set(), "only constants, in capitals"
    assert kept & written(tree) == set(), "a constant is not written"
    assert not any(isinstance(node, ast.Global) for node in ast.walk(tree)), "no global statement"


def test_the_reader_of_state_sees_it_all() -> None:
    text = """
CONSTANT: dict[str, int] = {"a": 1}
cache = {}
if True:
    seen: set[int] = set()
groups, held = collections.defaultdict(list), 1
waiting = collections.deque[int]()
fine = tuple([1])
def function():
    local = []
    CONSTANT["b"] = 2
    cache.update({})
"""
    tree = ast.parse(text)
    assert mutable_globals(tree) == {"CONSTANT", "cache", "seen", "waiting"}
    assert written(tree) == {"CONSTANT", "cache"}
