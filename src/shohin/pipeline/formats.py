"""Formats: which assignments of precisions are planned with, and what each loses."""

from __future__ import annotations

from shohin.pipeline.job import Job, first
from shohin.planning.front import Precision
from shohin.program import Program, family, fold
from shohin.quantization import find_sites, quantizable, quantize_program
from shohin.quantization.sites import JOINS, POOLS, activated

#: precisions that are always planned with, where the target has them
MAIN = ("float32", "int8")
#: divergence (nats, or relative squared error) below which int8 everywhere is good enough
NEGLIGIBLE = 1e-3


def integer_operations(program: Program, layers: set[str]) -> frozenset[str]:
    """Addresses of all operations that compute on integers when the layers do: sums and poolings between them, too."""
    folded = fold(program).program
    sites = find_sites(folded, layers)
    found = set(sites.layers)
    for node in folded.graph.nodes:
        if node.op == "call_function" and family(node) in JOINS | POOLS and activated(node).name in sites.grids:
            found.add(folded.origins[node.name].address)
    return frozenset(found)


def precisions(job: Job) -> dict[str, frozenset[str]]:
    """Named assignments: float32, and where the target has integers int8 everywhere or but for the first or last layer.

    A float layer among integer ones costs two conversions, so only contiguous segments are offered.
    """
    program = job.graph.program
    out = {"float32": frozenset[str]()}
    layers = quantizable(program)
    if "quantize" not in job.methods or "int8" not in job.target.formats or not layers:
        return out
    out["int8"] = integer_operations(program, set(layers))
    if len(layers) > 2:
        out["int8, first layer float"] = integer_operations(program, set(layers[1:]))
        out["int8, last layer float"] = integer_operations(program, set(layers[:-1]))
    return out


def worthwhile(job: Job) -> list[Precision]:
    """The assignments to plan with, each with its measured loss (journaled).

    A float segment costs time: it is planned with only where int8 everywhere loses noticeably, and it saves a third of that.
    """
    kinds = precisions(job)
    losses: dict[str, float] = job.run.once("precisions", "", lambda: _losses(job, kinds))
    return [Precision(name, kinds[name], loss) for name, loss in losses.items() if name in MAIN or loss < 2 / 3 * losses["int8"]]


def _losses(job: Job, kinds: dict[str, frozenset[str]]) -> dict[str, float]:
    found = {name: _loss(job, set(kinds[name])) for name in MAIN if name in kinds}
    if found.get("int8", 0.0) > NEGLIGIBLE:
        found |= {name: _loss(job, set(int8)) for name, int8 in kinds.items() if name not in found}
    return found


def _loss(job: Job, int8: set[str]) -> float:
    """Divergence of the quantized original from the original."""
    program = job.graph.program
    layers = int8 & set(quantizable(program))
    if not layers:
        return 0.0
    return job.divergence(
        quantize_program(program, layers, first(job.calibration, job.view_samples), least_scale=job.target.least_scale()).view()
    )
