"""`shohin.prune`."""

from __future__ import annotations

from typing import Any

from torch import nn

from shohin.candidate import Candidate
from shohin.data import Data
from shohin.errors import DataError, PlanError
from shohin.verbs.common import calibration, checked, one_of, seeded, static_metrics, whole


def prune(
    model: nn.Module,
    data: Data,
    keep: float = 0.5,
    of: str = "macs",
    criterion: str = "taylor",
    granularity: str = "channel",
    recover: str | None = "auto",
    *,
    epochs: int = 5,
    align: int = 8,
    uniform: bool = False,
    seed: int = 0,
) -> Candidate:
    """Removes units so that at most ``keep`` of the model's ``of`` is left.

    Args:
        keep: share in (0, 1].
        of: "macs" or "params".
        criterion: "taylor" (expected loss of removal, needs batches) or "magnitude" (squared weights of the producing
            slices; Data(example=(x,)) is enough).
        granularity: "channel" (any unit group: channels, heads, neurons).
        recover: None; "compensate" (layer-wise least squares and new normalization statistics, unlabelled batches);
            "distill" (that, then ``epochs`` of distillation from the original); or "auto": "compensate" if ``data`` has
            batches, else None.
        align: kept channels are multiples of this.
        uniform: for a model of Hugging Face ``transformers``: the same share in all layers, which its configuration can express,
            so that ``save_pretrained`` and ``from_pretrained`` work. ``align`` is not used then.
        seed: of everything random, the order of the loaders too.

    Returns:
        A candidate with ``.plan``, ``.model`` and ``.removed``.

    Raises:
        PlanError: for an unknown option, or a share that the model's groups cannot reach.
        DataError: if batches are needed and there are none.
    """
    from shohin.pipeline.compensate import compensate
    from shohin.pipeline.share import magnitudes, uniform_cut, widths_within
    from shohin.pruning.saliency import group_saliency
    from shohin.surgery import cut_sharing_values

    one_of("of", of, ("macs", "params"))
    one_of("criterion", criterion, ("taylor", "magnitude"))
    one_of("granularity", granularity, ("channel",))
    one_of("recover", recover, (None, "auto", "compensate", "distill"))
    if not 0 < keep <= 1:
        raise PlanError(f"keep must be a share in (0, 1]; got {keep}")
    if recover == "auto":
        recover = "compensate" if checked(data).has_batches else None
    if not checked(data).has_batches:
        if criterion == "taylor":
            raise DataError("criterion='taylor' needs batches: give Data(train=loader), or criterion='magnitude'")
        if recover is not None:
            raise DataError(f"recover={recover!r} needs batches: give Data(train=loader), or recover=None")
    with seeded(data, seed):
        graph = whole(model, data)
        calls = calibration(data, seed) if data.has_batches else []
        if criterion == "taylor":
            saliency = {n: s.tolist() for n, s in group_saliency(graph, data, calls, seed=seed).items()}
        else:
            saliency = magnitudes(graph)
        if uniform:
            plan, left, made = uniform_cut(model, graph, keep, of, saliency)
        else:
            plan, left = widths_within(graph, keep, of, align, saliency)
            made = cut_sharing_values(model, graph, plan)
        notes: dict[str, Any] = {
            "form": made.form,
            "form_reason": made.reason,
            "proof": made.proof.error,
            "left": left,
        }
        if recover is not None and not plan.is_identity:
            compensate(made, graph, plan, calls, seed)
        if recover == "distill" and not plan.is_identity:
            notes["training"] = _distilled(made.model, model, data, epochs, seed)
        return Candidate("pruned", plan, made.model, None, {}, None, static_metrics(graph, plan, made.model), notes, made.removed)


def _distilled(student: nn.Module, teacher: nn.Module, data: Data, epochs: int, seed: int) -> dict[str, Any]:
    from shohin.distillation import distill as distill_
    from shohin.training import TrainConfig

    result = distill_(student, teacher, data, config=TrainConfig(epochs=epochs, lr=2e-3, seed=seed), alpha=0.2 if data.has_labels else 0.0)
    return result.to_json()
