"""`shohin.quantize`."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from shohin.addresses import match
from shohin.candidate import Candidate
from shohin.data import Data
from shohin.errors import DataError
from shohin.plan import Plan
from shohin.program import capture, unfold_state
from shohin.targets import Target, get_target
from shohin.verbs.common import calibration, checked, one_of, seeded


def quantize(
    model: nn.Module,
    data: Data,
    format: str | Mapping[str, str] = "int8",
    target: str | Target = "onnxruntime",
    *,
    ranges: str = "mse",
    seed: int = 0,
) -> Candidate:
    """Static integer weights and activations, ready for `export`.

    Args:
        format: "int8" for every convolution and linear layer, or patterns of layer addresses to formats ("int8" or
            "float32"); the last pattern that matches a layer decides. A pattern that matches nothing is an error.
        target: whose rules the grids follow (pair-safe scales where its kernels saturate).
        ranges: "mse", "percentile" or "minmax".

    Returns:
        A candidate whose ``.model`` holds weights snapped to their grids (batch normalization folded into them), ``.view``
        simulates all bits and ``.evidence`` holds the grids by address.

    Raises:
        PlanError: for an unknown format or a pattern that matches nothing. DataError: without calibration batches.
    """
    from shohin.pipeline.job import load_tensors
    from shohin.program import structural_copy
    from shohin.quantization import quantizable, quantize_program

    goal = get_target(target)
    with seeded(checked(data), seed):
        program = capture(model, data.example())
        layers = quantizable(program)
        chosen = {a: "float32" for a in layers}
        for pattern, name in ({"*": format} if isinstance(format, str) else format).items():
            one_of("format", name, ("int8", "float32"))
            chosen.update(dict.fromkeys(match(pattern, layers), name))
        int8 = {a for a, f in chosen.items() if f == "int8"}
        if not data.has_batches:
            raise DataError("static quantization needs calibration batches: give Data(train=loader)")
        quantized = quantize_program(program, int8, calibration(data, seed), ranges=ranges, least_scale=goal.least_scale())
        own = {
            id(t): (nn.Parameter(t.detach().clone(), t.requires_grad) if isinstance(t, nn.Parameter) else t.detach().clone())
            for t in (*model.parameters(), *model.buffers())
        }
        snapped = structural_copy(model, own)
        load_tensors(snapped, unfold_state(quantized.folded, quantized.program.tensors, program.tensors))
        plan = Plan(program.fingerprint, formats=dict.fromkeys(sorted(int8), "int8"))
        return Candidate("quantized", plan, snapped, quantized.view(), quantized.by_address(), notes={"format": "int8", "ranges": ranges})
