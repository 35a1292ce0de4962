"""Why a model cannot be captured, in words for the person who wrote it: what, which line, and what to do."""

from __future__ import annotations

import os
import traceback

import torch
from torch import nn

from shohin.errors import CaptureError, ModelError

_OURS = tuple(os.path.dirname(f) + os.sep for f in (os.path.abspath(torch.__file__), os.path.dirname(os.path.abspath(__file__))))

_STATIC = (
    "use torch.where, a mask of fixed shape, or a constant instead; or capture the sub-modules without it "
    "(shohin.surgery.parts.understand_parts)"
)


def first_lines(error: BaseException, count: int = 3) -> str:
    """The first lines of an error's text, as one."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines[:count]) or type(error).__name__
    return text if len(text) <= 400 else text[:400] + "..."


def is_user_file(name: str) -> bool:
    """True for a source file that is neither torch's nor Shohin's."""
    return not name.startswith("<") and not os.path.abspath(name).startswith(_OURS)


def user_line(error: BaseException) -> str:
    """The innermost line of the traceback that is neither torch's nor Shohin's: " (at file:12: text)", or ""."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if is_user_file(frame.filename):
            return f" (at {frame.filename}:{frame.lineno}: {frame.line})"
    return ""


def check_kind(model: object) -> None:
    """Raises ModelError if the object is not a module that can be captured at all."""
    if not isinstance(model, nn.Module):
        raise ModelError(f"a model is a torch.nn.Module, not {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule):
        raise ModelError(
            "the model is a torch.jit.ScriptModule, which has no Python forward to follow: give the module that it was scripted from"
        )
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        raise ModelError(f"the model is wrapped in {type(model).__name__}: give the module inside, model.module")
    if isinstance(model, torch._dynamo.eval_frame.OptimizedModule):
        raise ModelError("the model is the result of torch.compile: give the module that was compiled")
    for path, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise ModelError(
                f"the sub-module {path!r} is a torch.jit.ScriptModule, which has no Python forward to follow: "
                "give the module that it was scripted from, or capture the sub-modules around it "
                "(shohin.surgery.parts.understand_parts)"
            )


def explained(error: BaseException) -> CaptureError:
    """The error of an export as a CaptureError that says what to do."""
    where, text = user_line(error), str(error)
    kind = type(error).__name__
    if kind in ("GuardOnDataDependentSymNode", "DataDependentOutputException", "UserError") and "data-dependent" in text.lower():
        if "Eq(u" in text or "Ne(u" in text:
            return CaptureError(f"the model takes a branch that depends on the values of the input{where}; {_STATIC}")
        return CaptureError(
            f"the model makes Python numbers of the values of the input, and a size or branch depends on them{where}; {_STATIC}"
        )
    if ".numpy() is not supported" in text or "__array__" in text or ("numpy" in text and isinstance(error, (RuntimeError, TypeError))):
        return CaptureError(f"the model leaves torch for numpy{where}; write this with torch operators; or {_STATIC}")
    if "dynamic shape operator" in text or "DynamicOutputShapeException" in kind:
        return CaptureError(f"the shape of a tensor depends on the values of the input{where}; {_STATIC}")
    if "is a view and is being modified inplace" in text:
        return CaptureError(f"one of several views is changed in place, which torch cannot differentiate{where}; write it without in place")
    return CaptureError(f"the model runs but cannot be captured as a graph: {first_lines(error)}{where}")
