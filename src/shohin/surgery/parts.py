"""Models that export refuses as a whole: the largest sub-modules that do export are understood and cut, one by one.

What lies between the parts runs as the user wrote it. The inputs and outputs of a part are frozen, as those of any program,
so that a cut part fits where the whole one was.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from shohin.data import Call
from shohin.errors import ModelError, PlanError, ShohinError, closest
from shohin.graph import Frozen, Graph, UnitGroup, with_costs
from shohin.plan import Plan
from shohin.program import call_of, first_lines, structural_copy, user_line
from shohin.surgery.cut import Cut, cut
from shohin.surgery.proof import Proof
from shohin.surgery.view import understand

UNCALLED = "is not called while the model runs on the example"


@dataclass(frozen=True, eq=False)
class Parts:
    """What can be chosen in the sub-modules of a model that cannot be captured as a whole.

    Args:
        graphs: path of a part ("backbone") -> its graph; no part lies inside another.
        frozen: what refused, with its reason and line, by module path; then what is frozen inside the parts.
        example: the call that the whole model runs on.
        failure: how the whole model fails on the example after the parts have run; "" if it does not.
    """

    graphs: Mapping[str, Graph]
    frozen: tuple[Frozen, ...]
    example: Call
    failure: str = ""

    @property
    def groups(self) -> tuple[UnitGroup, ...]:
        """The groups of all parts; names and tensors have the part's path in front."""
        return tuple(
            replace(group, name=_join(path, group.name), slices={_join(path, n): axes for n, axes in group.slices.items()})
            for path, graph in self.graphs.items()
            for group in graph.groups
        )

    @property
    def regions(self) -> tuple[str, ...]:
        """Names of the regions and layers of all parts, with the part's path in front."""
        return tuple(_join(path, name) for path, graph in self.graphs.items() for name in graph.skippable)

    @property
    def sizes(self) -> dict[str, int]:
        """Group name -> number of units."""
        return {group.name: group.size for group in self.groups}

    @property
    def fingerprint(self) -> str:
        """Hash of the parts' paths and fingerprints: what a plan for the whole model is made for."""
        text = ";".join(f"{path}={graph.program.fingerprint}" for path, graph in self.graphs.items())
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    def split(self, plan: Plan) -> dict[str, Plan]:
        """A plan with prefixed names as one plan for each part. Raises PlanError if it is for another model."""
        plan.check(self.fingerprint, self.sizes, self.regions)
        return self.plans(plan.widths, plan.skips)

    def plans(self, widths: Mapping[str, Iterable[int]], skips: Iterable[str] = ()) -> dict[str, Plan]:
        """One plan for each part, from choices under prefixed names (those of `groups` and `regions`).

        Raises:
            PlanError: for a name that no part has.
        """
        own: dict[str, tuple[dict[str, tuple[int, ...]], list[str]]] = {path: ({}, []) for path in self.graphs}
        for name, kept in widths.items():
            path, local = self._split(name, [g.name for g in self.groups])
            own[path][0][local] = tuple(kept)
        for name in skips:
            path, local = self._split(name, list(self.regions))
            own[path][1].append(local)
        return {path: Plan(self.graphs[path].program.fingerprint, w, tuple(s)) for path, (w, s) in own.items() if w or s}

    def _split(self, name: str, names: list[str]) -> tuple[str, str]:
        if name not in names:
            raise PlanError(f"no part has {name!r}{closest(name, names)}")
        for path, graph in self.graphs.items():
            for local in (*graph.sizes, *graph.skippable):
                if _join(path, local) == name:
                    return path, local
        raise PlanError(f"no part has {name!r}")

    def macs(self, plans: Mapping[str, Plan] | None = None) -> float:
        """Multiply-accumulates of one sample of each part."""
        return sum(graph.macs((plans or {}).get(path)) for path, graph in self.graphs.items())

    def __repr__(self) -> str:
        return f"Parts({', '.join(f'{path or repr(path)}: {graph!r}' for path, graph in self.graphs.items())}; {len(self.frozen)} frozen)"


@dataclass(frozen=True, eq=False)
class CutParts:
    """A model whose parts were cut.

    Args:
        model: the user's own class around the cut parts.
        form: "module" if every part kept its class, else "program".
        reason: why some part could not keep its class; "" if all could.
        proofs: path -> proof of the part against its view.
        cuts: path -> the part's cut.
        removed: tensor name in the whole model -> {axis: removed indices}.
    """

    model: nn.Module
    form: str
    reason: str
    proofs: Mapping[str, Proof]
    cuts: Mapping[str, Cut]
    removed: dict[str, dict[int, list[int]]]

    @property
    def proof(self) -> Proof:
        """The worst of the parts' proofs."""
        path, worst = max(self.proofs.items(), key=lambda item: (not item[1].holds, item[1].error), default=("", Proof(True, 0.0, "")))
        return replace(worst, where=f"{path}: {worst.where}" if worst.where else path)


def _join(path: str, name: str) -> str:
    return f"{path}{name}" if name.startswith("/") else f"{path}.{name}".strip(".")


def understand_parts(model: nn.Module, example: Any) -> Parts:
    """The largest sub-modules that can be captured, each with its graph.

    The model runs eagerly on the example, in evaluation mode, to see the real inputs of its sub-modules. A module that is
    called with different shapes, or not at all, is not a part; what it holds may be.

    Args:
        example: arguments of one call, as for `shohin.program.capture`; they may hold what a program cannot (lists of images).

    Raises:
        ModelError: if no sub-module with parameters can be captured: the message says why.
    """
    call = call_of(example)
    graphs: dict[str, Graph] = {}
    frozen: list[Frozen] = []
    tried: set[int] = set()
    level, failure = [""], ""
    while level:
        calls, failure = _calls(model, call, level)
        following = []
        for path in level:
            module = model.get_submodule(path)
            found = _try(module, path, calls.get(path, []))
            if isinstance(found, Graph):
                graphs[path] = found
                continue
            frozen.append(found)
            if not isinstance(module, torch.jit.ScriptModule):
                following += [_join(path, name) for name, child in module.named_children() if _worth(child, tried)]
        level = following
    graphs, shared = _without_shared(model, call, graphs)
    if not any(graph.groups or graph.regions for graph in graphs.values()):
        raise ModelError("no part of the model can be captured: " + "; ".join(f"{f.address}: {f.reason}" for f in frozen[:4]))
    inner = [Frozen(_join(path, f.address), f.reason, f.line) for path, graph in graphs.items() for f in graph.frozen]
    return Parts(graphs, (*_distinct(frozen, graphs), *shared, *inner), call, failure)


def _worth(module: nn.Module, tried: set[int]) -> bool:
    """True for a module with parameters that was not tried under another path."""
    if id(module) in tried or next(module.parameters(), None) is None:
        return False
    tried.add(id(module))
    return True


def _try(module: nn.Module, path: str, calls: list[Call]) -> Graph | Frozen:
    """The graph of a module with the inputs of its calls, or why there is none."""
    address = path or "the model"
    if not calls:
        return Frozen(address, UNCALLED)
    shapes = {_shapes(c) for c in calls}
    if len(shapes) > 1:
        return Frozen(address, f"is called with {len(shapes)} different shapes")
    try:
        return understand(module, calls[0])
    except ShohinError as error:
        line = re.search(r"\(at (.*?)\)(?:;|$)", str(error))
        return Frozen(address, str(error), line.group(1) if line else "")


def _shapes(call: Call) -> str:
    values, spec = pytree.tree_flatten((call.args, call.kwargs))
    return f"{spec}{[(tuple(v.shape), v.dtype) if isinstance(v, Tensor) else v for v in values]}"


def _distinct(frozen: list[Frozen], parts: Iterable[str]) -> list[Frozen]:
    """Refusals without those that only repeat what is said of a module inside, and without containers that nobody calls."""

    def repeats(f: Frozen) -> bool:
        inside = [o for o in frozen if o is not f and (f.address == "the model" or o.address.startswith(f.address + "."))]
        return bool(f.line) and any(o.reason == f.reason for o in inside)

    def uncalled(f: Frozen) -> bool:
        return f.reason == UNCALLED

    idle = [f.address for f in frozen if uncalled(f)]
    return [
        f
        for f in frozen
        if not repeats(f)
        and not (uncalled(f) and any(f.address.startswith(other + ".") for other in idle))
        and not (uncalled(f) and any(path.startswith(f.address + ".") for path in parts))
    ]


@contextmanager
def _eager(model: nn.Module) -> Iterator[nn.Module]:
    """A private copy in evaluation mode; random numbers are as before afterwards."""
    copy = structural_copy(model, {id(b): b.detach().clone() for b in model.buffers()}, share=True).eval()
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        yield copy


def _calls(model: nn.Module, call: Call, paths: Iterable[str]) -> tuple[dict[str, list[Call]], str]:
    """The calls of each module while the model runs, and how the run fails ("" if it does not)."""
    found: dict[str, list[Call]] = {}
    with _eager(model) as copy:
        for path in paths:
            module = copy.get_submodule(path)
            if isinstance(module, torch.jit.ScriptModule):
                found[path] = [Call((), {}, None, None)]
                continue

            def note(_: nn.Module, args: Any, kwargs: dict[str, Any], path: str = path) -> None:
                found.setdefault(path, []).append(Call(tuple(args), dict(kwargs), None, None))

            module.register_forward_pre_hook(note, with_kwargs=True)
        return found, _run(copy, call)[1]


def _run(model: nn.Module, call: Call) -> tuple[Any, str]:
    try:
        return model(*call.args, **call.kwargs), ""
    except Exception as error:  # whatever the user's forward raises is part of what is known of it
        return None, f"{type(error).__name__}: {first_lines(error, 1)}{user_line(error)}"


#: what may be read of a tensor without using its size or its values
_HARMLESS = frozenset(getattr(Tensor, name).__get__ for name in ("dtype", "device", "requires_grad", "is_cuda", "is_leaf", "layout"))


class _Readers(TorchFunctionMode):
    """Notes the parameters that torch calls use while the part that owns them is not running."""

    def __init__(self, owners: Mapping[int, str]) -> None:
        super().__init__()
        self.owners, self.running, self.outside = owners, dict[str, int](), set[int]()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in _HARMLESS:
            for value in pytree.tree_leaves((args, kwargs)):
                owner = self.owners.get(id(value))
                if owner is not None and not self.running.get(owner):
                    self.outside.add(id(value))
        return func(*args, **(kwargs or {}))


def _without_shared(model: nn.Module, call: Call, graphs: dict[str, Graph]) -> tuple[dict[str, Graph], list[Frozen]]:
    """The graphs without the groups that slice a tensor which is used outside its part too; and these groups, frozen."""
    owned = {path: {id(t) for t in graph.program.tensors.values()} for path, graph in graphs.items()}
    owners = {key: path for path, keys in owned.items() for key in keys}
    outside = {key for key in owners if sum(key in keys for keys in owned.values()) > 1}
    reader = _Readers(owners)
    with _eager(model) as copy:
        mine, theirs = dict(model.named_buffers()), dict(copy.named_buffers())
        copies = {id(theirs[name]): id(t) for name, t in mine.items() if name in theirs}
        reader.owners = {**owners, **{key: owners[original] for key, original in copies.items() if original in owners}}
        for path in graphs:
            module = copy.get_submodule(path)

            def enter(*_: Any, path: str = path) -> None:
                reader.running[path] = reader.running.get(path, 0) + 1

            def leave(*_: Any, path: str = path) -> None:
                reader.running[path] -= 1

            module.register_forward_pre_hook(enter)
            module.register_forward_hook(leave, always_call=True)
        with reader:
            _run(copy, call)
    outside |= {copies.get(key, key) for key in reader.outside}
    left, frozen = {}, []
    for path, graph in graphs.items():
        names = {name for name, t in graph.program.tensors.items() if id(t) in outside}
        stay = tuple(g for g in graph.groups if not names & set(g.slices))
        frozen += [
            Frozen(_join(path, g.name), f"{_join(path, sorted(names & set(g.slices))[0])} is used outside {path!r} too")
            for g in graph.groups
            if not any(g is kept for kept in stay)
        ]
        left[path] = graph if len(stay) == len(graph.groups) else with_costs(replace(graph, groups=stay))
    return left, frozen


def cut_parts(model: nn.Module, parts: Parts, plans: Mapping[str, Plan]) -> CutParts:
    """Cuts each part in place in a copy of the whole model; parts without a plan stay as they are.

    Args:
        plans: path of a part -> its plan (`Parts.plans` makes them).

    Raises:
        PlanError: for a path that is not a part, or a plan of another model.
        ModelError: if the model with its cut parts fails on the example where the whole one runs.
    """
    for path in plans:
        if path not in parts.graphs:
            raise PlanError(f"{path!r} is not a part of the model{closest(path, parts.graphs)}")
    cuts = {path: cut(model.get_submodule(path), parts.graphs[path], plan) for path, plan in plans.items()}
    made: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        own = tensor.detach().clone() if not _inside(tensor, parts, cuts) else tensor
        made[id(tensor)] = nn.Parameter(own, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else own
    for path, result in cuts.items():
        module = model.get_submodule(path)
        if result.form == "program":
            _keep_attributes(module, result.model)
        made[id(module)] = result.model
        state = {**dict(result.model.named_parameters(remove_duplicate=False)), **dict(result.model.named_buffers(remove_duplicate=False))}
        made.update({id(t): state[name] for name, t in parts.graphs[path].program.tensors.items() if name in state})
    whole = structural_copy(model, made)
    _check_whole(whole, parts)
    removed = {_join(path, name): axes for path, result in cuts.items() for name, axes in result.removed.items()}
    reasons = [f"{path}: {result.reason}" for path, result in cuts.items() if result.form != "module"]
    return CutParts(whole, "program" if reasons else "module", "; ".join(reasons), {p: c.proof for p, c in cuts.items()}, cuts, removed)


def _inside(tensor: Tensor, parts: Parts, cuts: Mapping[str, Cut]) -> bool:
    return any(tensor is t for path in cuts for t in parts.graphs[path].program.tensors.values())


def _keep_attributes(module: nn.Module, program: nn.Module) -> None:
    """What the surrounding code may read off the replaced module (``out_channels``, ``config``) stays readable."""
    for name, value in vars(module).items():
        if not name.startswith("_") and name != "training" and not hasattr(program, name):
            object.__setattr__(program, name, value)


def _check_whole(whole: nn.Module, parts: Parts) -> None:
    with _eager(whole) as copy:
        _, failure = _run(copy, parts.example)
    if failure and failure.split(": ")[:2] != parts.failure.split(": ")[:2]:
        raise ModelError(f"the model fails with its parts cut, which the code around them does not follow: {failure}")
