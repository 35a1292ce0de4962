"""Candidates from a run folder: checked by checksums, never unpickled."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from shohin.budget import Budget
from shohin.candidate import Candidate, Metrics
from shohin.data import Data
from shohin.errors import RunError, TargetError
from shohin.formats import Bits, Quantizer, is_bits, is_dynamic, is_scheme
from shohin.graph import Graph
from shohin.pipeline.job import load_tensors, own_tensors
from shohin.plan import Plan
from shohin.program import Folded, Program, fold, with_graph
from shohin.quantization import Dynamic, Quantized, dynamic_layers, find_sites, tables, weights_by_address
from shohin.result import Result
from shohin.run import Run, checksum, read_json, read_tensors
from shohin.surgery import cut_sharing_values, understand


def load(folder: str | Path, model: nn.Module | None = None, example: Any = None) -> Result:
    """The result of a finished or interrupted run.

    Args:
        folder: the run folder.
        model: the original model; with it (and ``example``: the arguments of one call, or a `shohin.Data`) each candidate's ``.model`` is cut
            again from its plan and its weights are loaded, and ``.view`` simulates its bits. Without it ``.model`` is None; files and metrics are there.

    Raises:
        RunError: if the folder is damaged, not a run, or no candidate was finished.
    """
    run = Run(folder)
    graph = None
    if model is not None:
        if example is None:
            raise RunError("load(folder, model=...) needs example=(x,), the arguments of one call, to rebuild the candidates")
        if isinstance(example, Data):
            example = example.example()
        graph = understand(model, (example,) if isinstance(example, Tensor) else example)
        if graph.program.fingerprint != run.config["fingerprint"]:
            raise RunError(
                f"{run.folder} belongs to another model (fingerprint {run.config['fingerprint'][:12]}, given {graph.program.fingerprint[:12]})"
            )
    candidates = load_candidates(run, model, graph)
    if "baseline" not in candidates:
        raise RunError(f"{run.folder} holds no finished candidate yet; run the same command again to go on")
    entries = [e["data"] for e in run.entries if e["stage"] == "result"]
    if entries:
        last = entries[-1]
        gone = {last["best"], *last["front"]} - candidates.keys()
        if gone:
            raise RunError(f"{run.folder} lacks the candidate {sorted(gone)[0]!r} of its result; run the same command again to rebuild it")
        notes = {"reasons": last["reasons"], "unmet": last["unmet"], "finished": True, "prediction": last.get("prediction")}
        return Result(
            run.folder, candidates[last["best"]], candidates["baseline"], [candidates[n] for n in last["front"]], candidates, notes
        )
    return _unfinished(run, candidates)


def _unfinished(run: Run, candidates: dict[str, Candidate]) -> Result:
    """Best so far by what is known: what keeps the bounds on size and drop, then quality, then size. Latency is measured last."""
    lower = bool(run.config.get("lower_is_better"))
    budget, base = Budget.from_json(run.config.get("budget", {})), candidates["baseline"].metrics.values()

    def order(c: Candidate) -> tuple[bool, float, float]:
        values = c.metrics.values()
        missed = budget.violations(values, base, lower_is_better=lower).keys() & {"size_bytes", "drop"}
        return not missed, (-1.0 if lower else 1.0) * values["quality"], -values["size_bytes"]

    best = max(candidates.values(), key=order)
    notes = {"reasons": ["the run was interrupted; the same command goes on"], "unmet": [], "finished": False}
    return Result(run.folder, best, candidates["baseline"], list(candidates.values()), candidates, notes)


def load_candidates(run: Run, model: nn.Module | None, graph: Graph | None) -> dict[str, Candidate]:
    """All finished candidates of a folder by name; the baseline first."""
    found = {}
    for path in sorted((run.folder / "candidates").glob("*/candidate.json")):
        candidate = _load(path, model, graph)
        found[candidate.name] = candidate
    return {n: found[n] for n in sorted(found, key=lambda n: (n != "baseline", n))}


def _load(path: Path, model: nn.Module | None, graph: Graph | None) -> Candidate:
    data = read_json(path)
    folder = path.parent
    try:
        for file, digest in data["checksums"].items():
            if Path(file).name != file:
                raise RunError(f"{path} names a file outside its folder: {file!r}")
            if not (folder / file).exists() or checksum(folder / file) != digest:
                raise RunError(
                    f"{folder / file} is damaged or missing (checksum); delete the folder {folder} to build this candidate again"
                )
        name, plan = str(data["name"]), Plan.from_json(data["plan"])
        if name != folder.name:
            raise RunError(f"{path} is of a candidate {name!r}, but lies in {folder.name!r}")
        metrics = Metrics.from_json(data["metrics"])
        evidence = {n: Quantizer.from_json(q) for n, q in data["evidence"].items()}
        removed = {n: {int(a): list(g) for a, g in axes.items()} for n, axes in data["removed"].items()}
        notes = dict(data["notes"])
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise RunError(f"{path} is damaged: {error!r}") from None
    candidate = Candidate(name, plan, None, None, evidence, folder / "model.onnx", metrics, notes, removed)
    if model is not None and graph is not None:
        _rebuild(candidate, model, graph, folder / "model.safetensors")
    return candidate


def _rebuild(candidate: Candidate, model: nn.Module, graph: Graph, weights: Path) -> None:
    """The module and the view of a candidate, from its plan, weights and grids."""
    plan, before = candidate.plan, graph.program
    if candidate.name == "baseline":
        candidate.model = model
        return
    made = cut_sharing_values(model, graph, Plan(plan.fingerprint, plan.widths, plan.skips))
    candidate.model = made.model.eval()
    load_tensors(made.model, read_tensors(weights))
    if plan.formats:
        sliced = made.rewritten.sliced()
        own = own_tensors(made.model, dict.fromkeys(before.names.values()))
        candidate.view = requantized(with_graph(before, made.rewritten.graph, {**sliced, **own}), candidate).view()


def requantized(program: Program, candidate: Candidate) -> Quantized:
    """The quantized form of a program that holds a candidate's snapped weights, with the grids of the candidate's evidence.

    Raises:
        TargetError: if a format of the candidate is only simulated.
    """
    folded, evidence, formats = fold(program), candidate.evidence, candidate.plan.formats
    for address, form in formats.items():
        if not is_bits(form) and not is_scheme(form):
            raise TargetError(f"{address} is {form!r}, which no runtime here has kernels for: it is only simulated, by candidate.view")
    sites = find_sites(folded.program, {address for address, form in formats.items() if is_bits(form) and not is_dynamic(form)})
    origins, known = folded.program.origins, {a: w.name for a, w in weights_by_address(folded.program).items()} | tables(folded.program)
    addresses = {n: origins[n].address if n in origins else n for n in sites.grids}
    activations = {n: evidence[a] for n, a in addresses.items() if a in evidence}
    alone = [known[address] for address, form in formats.items() if is_scheme(form)]
    moving = dynamic_layers(folded.program, {address: Bits.parse(form) for address, form in formats.items() if is_dynamic(form)})
    weights = {name: evidence[name] for name in (*sites.layers.values(), *alone, *(name for name, _ in moving.values()))}
    tensors = {**folded.program.tensors, **{n: q.fake(folded.program.tensors[n].detach()).detach() for n, q in weights.items()}}
    inputs = {node: Dynamic(bits.activations) for node, (_, bits) in moving.items()}
    return Quantized(Folded(replace(folded.program, tensors=tensors), folded.folded), activations, weights, sites, inputs)
