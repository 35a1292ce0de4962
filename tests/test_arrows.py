"""The house has floors: a room imports only from floors below, so that what it means never depends on who uses it."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src"
#: lowest first; rooms that share a floor do not import each other, except on the floors in TOGETHER
FLOORS = (
    ("errors", "addresses", "formats", "plan", "budget", "data", "candidate", "run"),
    ("program",),
    ("graph",),
    ("surgery",),
    ("evidence", "training", "targets", "integrations"),
    ("planning",),
    ("pruning", "quantization", "distillation"),
    ("architecture",),
    ("report",),
    ("pipeline", "verbs", "result", "extend"),
    ("cli",),
)
TOGETHER = (FLOORS[0], FLOORS[9])
FLOOR = {room: i for i, floor in enumerate(FLOORS) for room in floor}
VERBS = set(["prune", "quantize", "distill", "search", "export", "optimize", "profile", "cut", "view", "verify", "load", "understand"])


def module_name(path: Path) -> str:
    """``shohin.graph.labels`` of a file below src."""
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(module: str, source: str, is_package: bool = False, at_start: bool = False) -> list[tuple[int, str]]:
    """Line and full name of every import of the project; ``*`` ends a star import.

    ``at_start``: only what runs when the module is imported, so not what stands in functions or under TYPE_CHECKING.
    """
    package = module if is_package else module.rpartition(".")[0]
    out = []
    for node in at_import(ast.parse(source)) if at_start else ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            out += [(node.lineno, a.name) for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *([node.module] if node.module else [])])
            out += [(node.lineno, f"{base}.{a.name}") for a in node.names]
    return [(line, name) for line, name in out if name.split(".")[0] == "shohin" or name.endswith(".*")]


def at_import(tree: ast.AST) -> Iterator[ast.AST]:
    """The nodes that run when a module is imported."""
    for node in ast.iter_child_nodes(tree):
        typing_only = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        if not typing_only and not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            yield node
            yield from at_import(node)


def wrong_arrows(module: str, source: str, is_package: bool = False) -> list[str]:
    """What the imports of one module break, in words."""
    parts = module.split(".")
    wrong = []
    for line, name in imported(module, source, is_package):
        where = f"{module}:{line} imports {name}"
        target = name.split(".")
        if target[-1] == "*":
            wrong.append(f"{where}: no star imports")
        elif len(parts) == 1 or parts[1].startswith("__"):
            continue  # the package itself gathers the public names
        elif len(target) == 1 or target[1] not in FLOOR:
            if parts[1] not in FLOORS[-1]:
                wrong.append(f"{where}: rooms import from rooms, not from the package")
        elif parts[1] not in FLOOR:
            wrong.append(f"{where}: {parts[1]} has no floor; give it one in this test and in the design")
        elif target[1] != parts[1] and FLOOR[target[1]] >= FLOOR[parts[1]]:
            floor = FLOORS[FLOOR[parts[1]]]
            if not (floor in TOGETHER and target[1] in floor):
                wrong.append(f"{where}: {target[1]} is not below {parts[1]}")
    return wrong


FILES = sorted(SOURCE.rglob("*.py"))


def test_there_is_something_to_check() -> None:
    assert {"shohin", "shohin.report.page", "shohin.plan"} <= {module_name(p) for p in FILES}


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_arrows_point_down(path: Path) -> None:
    assert wrong_arrows(module_name(path), path.read_text(), path.name == "__init__.py") == []


def test_modules_do_not_import_each_other_in_circles() -> None:
    names = {module_name(p) for p in FILES}
    edges: dict[str, set[str]] = {}
    for path in FILES:
        found = imported(module_name(path), path.read_text(), path.name == "__init__.py", at_start=True)
        edges[module_name(path)] = {next((n for n in (t, t.rpartition(".")[0]) if n in names), "") for _, t in found} - {"", "shohin"}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path, name))
        if name not in done:
            for below in sorted(edges[name] - {name}):
                visit(below, (*path, name))
            done.add(name)

    for name in sorted(names):
        visit(name, ())


def test_no_room_is_named_as_a_verb() -> None:
    rooms = {p.stem for p in (SOURCE / "shohin").iterdir() if p.suffix == ".py" or p.is_dir()}
    assert rooms & VERBS == set()


def test_every_room_has_a_floor() -> None:
    rooms = {
        p.stem for p in (SOURCE / "shohin").iterdir() if (p.suffix == ".py" or (p / "__init__.py").exists()) and not p.stem.startswith("__")
    }
    assert rooms - FLOOR.keys() == set()


@pytest.mark.parametrize(
    ("module", "source", "count"),
    [
        ("shohin.graph.units", "from shohin.program.capture import x", 0),
        ("shohin.graph.units", "from .labels import x\nfrom . import costs", 0),
        ("shohin.graph.units", "from ..program import capture", 0),
        ("shohin.graph.units", "from ..surgery import view", 1),
        ("shohin.graph.units", "def f():\n    import shohin.surgery.view", 1),
        ("shohin.pruning.scores", "from shohin.distillation import losses", 1),
        ("shohin.evidence.gram", "from shohin.targets.base import Target", 1),
        ("shohin.plan", "from shohin.errors import PlanError", 0),
        ("shohin.plan", "from shohin.program import x", 1),
        ("shohin.plan", "from shohin import Plan", 1),
        ("shohin.plan", "from math import *", 1),
        ("shohin.cli", "import shohin", 0),
        ("shohin.new", "from shohin.plan import Plan", 1),
        ("shohin.pipeline", "from shohin.report import render\nfrom shohin.result import Result", 0),
        ("shohin.report.page", "from shohin.pipeline import optimize", 1),
    ],
)
def test_the_check_sees_a_wrong_arrow(module: str, source: str, count: int) -> None:
    assert len(wrong_arrows(module, source)) == count
