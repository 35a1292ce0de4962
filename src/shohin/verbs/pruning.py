"""`shohin.prune`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from shohin.budget import Budget
from shohin.candidate import Candidate, Measurement
from shohin.data import Data
from shohin.errors import DataError, PlanError, closest
from shohin.targets import Target
from shohin.verbs.common import calibration, checked, checked_folder, one_of, seeded, static_metrics, whole

if TYPE_CHECKING:
    from shohin.pruning.sparse import Pattern

#: what a granularity that is no pattern of zeros may be
UNITS = ("channel", "neuron", "head", "width", "depth")
RECOVERIES = (None, "auto", "compensate", "distill")


def prune(
    model: nn.Module,
    data: Data,
    keep: float | None = None,
    of: str = "macs",
    criterion: str | None = None,
    granularity: str | Sequence[str] = "channel",
    recover: str | None = "auto",
    *,
    budget: str | Budget | None = None,
    target: str | Target = "onnxruntime",
    allocation: str | None = None,
    normalization: str | None = None,
    epochs: int = 5,
    align: int = 8,
    uniform: bool = False,
    samples: int = 512,
    seed: int = 0,
    out: str | Path | None = None,
) -> Candidate:
    """Removes what contributes least so that at most ``keep`` of the model is left, or that it keeps a budget measured on a target.

    Args:
        keep: share in (0, 1]; 0.5 if neither it nor a budget is given. Of sparse weights: the share that is not zero.
        of: what ``keep`` is a share of: "macs" or "params". Sparse weights count elements.
        criterion: what decides, of `shohin.pruning.criteria.CRITERIA` for units ("taylor" by default; "magnitude" needs no batches),
            "divergence" (default) or "cosine" for depth, of `shohin.pruning.sparse.CRITERIA` for sparse weights ("auto" by default: exact OBS where it is quick, else SparseGPT).
        granularity: what goes: "channel" (any unit: channels, neurons, heads, widths), "neuron" (of feed-forward layers), "head"
            (attention heads; with their keys and values where queries share them), "width" (of a transformer's residual stream), "depth"
            (regions and layers), several of these, or zeros in the weights, which stay as large: "unstructured", "N:M" as "2:4", or
            "block RxC" as "block 1x8". A file holds sparse weights packed; whether a runtime is faster for them shows when it is measured.
        recover: None; "compensate" (layer-wise least squares and new normalization statistics, unlabelled batches);
            "distill" (that, then ``epochs`` of distillation from the original, zeros held); or "auto": "compensate" if ``data`` has
            batches, else None.
        budget: instead of ``keep``: bounds such as ``"latency <= 50 %"`` that hold on ``target``, planned on timings of whole models
            (`shohin.optimize` with pruning alone). The candidate has its file and what was measured.
        target: of the budget.
        allocation: how much goes where. Units: "planned" (default; least loss by exact programs), "sensitivity" (the same, tables scaled to
            what cutting each group alone really does), "uniform", "global". Sparse weights: "uniform" (default), "global", "erk", "lamp",
            "sensitivity".
        normalization: which units compete, for "global": "global" (default), "mean" or "max" (of scores divided by their group's),
            "isomorphic" (only groups of the same structure), "none" (each group by itself).
        align: kept channels are multiples of this.
        uniform: for a model of Hugging Face ``transformers``: the same share in all layers, which its configuration can express,
            so that ``save_pretrained`` and ``from_pretrained`` work. ``align`` is not used then.
        samples: of the calibration batches.
        seed: of everything random, the order of the loaders too.
        out: a folder for the pruned weights (sparse ones packed); with a budget the run's, which can be resumed.

    Returns:
        A candidate with ``.plan``, ``.model`` and ``.removed``. With a budget ``.notes`` has "met", and "unmet" and "reasons" where it
        is not.

    Raises:
        PlanError: for an unknown option, or a share that the model's groups cannot reach.
        DataError: if batches are needed and there are none.
        BudgetError: for a budget that cannot be read.
        RunError: if there is a file where ``out`` should be a folder.
    """
    from shohin.pipeline.pruned import Wish, prune_units, prune_weights
    from shohin.pruning.amounts import check_count, check_share

    one_of("of", of, ("macs", "params"))
    one_of("recover", recover, RECOVERIES)
    if keep is not None:
        check_share(keep)
    for name, value, least in (("align", align, 1), ("samples", samples, 1), ("epochs", epochs, 0), ("seed", seed, 0)):
        check_count(name, value, least)
    if uniform and not hasattr(model, "config"):
        raise PlanError(f"uniform=True gives widths that a configuration of transformers can express, and {type(model).__name__} has none")
    epochs, align, samples, seed = map(int, (epochs, align, samples, seed))
    kinds, pattern = _granularity(granularity, keep)
    checked(data)
    if out is not None:
        checked_folder(out)
    if budget is not None:
        if keep is not None:
            raise PlanError("give keep= or budget=, not both")
        given = {"criterion": criterion, "allocation": allocation, "normalization": normalization}
        named = next((name for name, value in given.items() if value is not None), "granularity" if kinds != ("channel",) else "")
        plain = {"of": of == "macs", "align": align == 8, "epochs": epochs == 5, "samples": samples == 512, "uniform": not uniform}
        named = named or next((name for name, default in plain.items() if not default), "")
        if named:
            raise PlanError(f"a budget is planned on the target, over all units: {named}= has nothing to decide")
        return _within(model, data, budget, target, recover, seed, out)
    share = 0.5 if keep is None else float(keep)
    wish = Wish(share, of, criterion, kinds, pattern, allocation, normalization, align, uniform, epochs, seed)
    wish.check(data.has_batches)
    if recover == "auto":
        recover = "compensate" if data.has_batches else None
    if recover is not None and not data.has_batches:
        raise DataError(f"recover={recover!r} needs batches: give Data(train=loader), or recover=None")
    with seeded(data, seed):
        graph = whole(model, data)
        calls = calibration(data, seed, samples) if data.has_batches else []
        made = (prune_units if pattern is None else prune_weights)(model, graph, data, calls, wish, recover)
        metrics = static_metrics(graph, made.plan, made.model)
        artifact = None
        if out is not None or pattern is not None:
            stored, artifact = _stored(made.model, out)
            metrics = replace(metrics, size_bytes=stored)
        return Candidate("pruned", made.plan, made.model, None, {}, artifact, metrics, made.notes, made.removed)


def _within(
    model: nn.Module, data: Data, budget: str | Budget, target: str | Target, recover: str | None, seed: int, out: str | Path | None
) -> Candidate:
    """The best candidate of `shohin.optimize` that only prunes."""
    from shohin.pipeline import optimize

    methods = ("prune", "distill") if recover == "distill" else ("prune",)
    if recover is None:
        raise PlanError("with a budget candidates are built to be measured, and compensated: recover=None is for keep=")
    found = optimize(model, data, target, budget, out=out, seed=seed, methods=methods, progress=False)
    facts: dict[str, Any] = {"met": found.met}
    facts |= {name: found.notes[name] for name in ("unmet", "reasons") if name in found.notes}
    return replace(found.best, notes={**found.best.notes, **facts})


def _stored(model: nn.Module, out: str | Path | None) -> tuple[Measurement, Path | None]:
    """Bytes of the weights on disk, zeros packed, and their file if there is a folder for it."""
    from shohin.pruning import sparse

    how = "measured: weights on disk, zeros packed"
    if out is None:
        return Measurement(float(sparse.stored_bytes(model)), how), None
    path = Path(out) / "weights.safetensors"
    return Measurement(float(sparse.write(path, model)), how), path


def _granularity(given: str | Sequence[str], keep: float | None) -> tuple[tuple[str, ...], Pattern | None]:
    """Kinds of units, or a pattern of zeros that leaves ``keep``."""
    from shohin.pruning.sparse import Pattern

    names = (given,) if isinstance(given, str) else tuple(given) if isinstance(given, Sequence) else ()
    if names and all(name in UNITS for name in names):
        return names, None
    text = names[0] if len(names) == 1 and isinstance(names[0], str) else ""
    zeros = 1 - (0.5 if keep is None else keep)
    try:
        if text == "unstructured" or (text.startswith("block ") and len(text.split()) == 2):
            return (), Pattern.parse(f"{text} {zeros}")
        pattern = Pattern.parse(text)
    except PlanError:
        raise PlanError(
            f"granularity={given!r} is not known; one or more of {', '.join(map(repr, UNITS))}, or zeros: 'unstructured', 'N:M' such as '2:4', "
            f"'block RxC' such as 'block 1x8'{closest(text, (*UNITS, 'unstructured')) if text else ''}"
        ) from None
    if keep is not None and abs(pattern.zeros - zeros) > 1e-9:
        raise PlanError(f"granularity={given!r} keeps {1 - pattern.zeros:g} of the weights; it contradicts keep={keep}")
    return (), pattern
