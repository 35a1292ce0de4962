"""A model that cannot be captured as a whole: its parts are cut in place and each is compared with its oracle."""

from __future__ import annotations

import json
import random
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from shohin.data import Call
from shohin.plan import Plan
from shohin.surgery.oracle import oracle, unspoken
from shohin.surgery.parts import CutParts, Parts, cut_parts, understand_parts
from sweep.entry import Arguments, Entry
from sweep.numbers import TOLERANCE, Wrong, against, difference, doubled, run


def check_parts(entry: Entry, record: dict[str, Any], model: nn.Module, plans: int, reload: bool) -> None:
    """Random plans and one of half width for all parts at once. Raises Wrong where a part differs from its oracle."""
    parts = understand_parts(model, Call(*doubled(entry.arguments(2, 0)), None, None))
    record.update(groups=len(parts.groups), regions=len(parts.regions), programs=sorted(parts.graphs))
    record["frozen"] = [f"{f.address}: {f.reason} ({f.line})" for f in parts.frozen if "output of the model" not in f.reason][:5]
    silent = {p: set(unspoken(model.get_submodule(p), g)) for p, g in parts.graphs.items()}
    record["silent_groups"] = sum(map(len, silent.values()))
    record["plans"] = []
    for seed in (*range(1, plans + 1), 0):
        record["stage"] = f"plan {seed}" if seed else "half"
        chosen = {path: _plan(parts, path, seed, silent[path]) for path in parts.graphs}
        made = cut_parts(model, parts, chosen)
        error = max((_compare(model, parts, made, path, plan, seed) for path, plan in chosen.items()), default=0.0)
        record["plans"].append({"form": made.form, "reason": made.reason, "proof": made.proof.error, "error": error})
    whole = {path: _plan(parts, path, 0, set()) for path in parts.graphs}
    made = cut_parts(model, parts, whole)
    record["ratio"] = round(sum(p.numel() for p in made.model.parameters()) / sum(p.numel() for p in model.parameters()), 4)
    record.update(form=made.form, reason=made.reason or "understood by parts", parts=[p for c in made.cuts.values() for p in c.parts])
    record["max_oracle_error"] = max(p["error"] for p in record["plans"])
    record["onnx"] = "ok"  # nothing to lower: the whole cannot be captured
    if reload:
        record["stage"] = "reload"
        _reload(entry, made, whole)


def _plan(parts: Parts, path: str, seed: int, leave: set[str]) -> Plan:
    """Seed 0: the first half of the units of every group; else random subsets."""
    r, widths = random.Random(seed), {}
    for group in parts.graphs[path].groups:
        if group.name in leave:
            continue
        least = min(group.size, 4 if group.normalized else 1)
        count = r.choice([group.size, r.randint(least, group.size)]) if seed else (group.size + 1) // 2
        widths[group.name] = tuple(sorted(r.sample(range(group.size), count))) if seed else tuple(range(count))
    return Plan(parts.graphs[path].program.fingerprint, widths)


def _compare(model: nn.Module, parts: Parts, made: CutParts, path: str, plan: Plan, seed: int) -> float:
    graph, cut = parts.graphs[path], made.cuts[path]
    if not cut.proof.holds:
        raise Wrong(f"{path}: the cut does not equal the view: {cut.proof.where}, {cut.proof.error:.1e}")
    reference = oracle(model.get_submodule(path), graph, plan)
    arguments = _arguments(graph.program.example, graph.program.in_spec, seed)
    found = against(reference, made.model.get_submodule(path), cut.rewritten, arguments)
    for error, where in found:
        if not error <= TOLERANCE:
            raise Wrong(f"{path}: the cut does not equal the oracle: {where}, {error:.1e}")
    return max(error for error, _ in found)


def _arguments(example: Any, spec: Any, seed: int) -> Arguments:
    generator = torch.Generator().manual_seed(seed)
    flat = [
        torch.randn(x.shape, generator=generator, dtype=torch.float64) if isinstance(x, Tensor) and x.is_floating_point() else x
        for x in example
    ]
    args, kwargs = pytree.tree_unflatten(flat, spec)
    return tuple(args), kwargs


def _reload(entry: Entry, made: CutParts, plans: dict[str, Plan]) -> None:
    """Weights and plans to disk and back, into a cut of another model."""
    with tempfile.TemporaryDirectory() as folder:
        save_file({k: v.detach().clone().contiguous() for k, v in made.model.state_dict().items()}, str(Path(folder) / "cut.safetensors"))
        (Path(folder) / "plans.json").write_text(json.dumps({path: plan.to_json() for path, plan in plans.items()}))
        torch.manual_seed(1)
        other = entry.build().eval().double()
        parts = understand_parts(other, Call(*doubled(entry.arguments(2, 0)), None, None))
        read = {path: Plan.from_json(value) for path, value in json.loads((Path(folder) / "plans.json").read_text()).items()}
        again = cut_parts(other, parts, read)
        again.model.load_state_dict(load_file(str(Path(folder) / "cut.safetensors")))
    for path, graph in parts.graphs.items():
        arguments = _arguments(graph.program.example, graph.program.in_spec, 6)
        first, second = (run(m.model.get_submodule(path), arguments)[0] for m in (again, made))
        error, where = difference(first, second, "output")
        if not error <= TOLERANCE:
            raise Wrong(f"saved and loaded, {path}: {where}, {error:.1e}")
