"""Where operations come from: module, address, source line; and what lies outside a program."""

from __future__ import annotations

import logging
import re
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn

from shohin.addresses import number
from shohin.program.program import Origin
from shohin.program.refusals import is_user_file


def family(node: fx.Node) -> str:
    """The operator family of a node: the name without a trailing underscore ("conv2d", "add"), with the namespace of an
    operator that is not torch's own ("mylib::relu"): what it is called says nothing of what it does.
    """
    target = node.target
    name = str(target._schema.name if hasattr(target, "_schema") else getattr(target, "__name__", target))
    return name.removeprefix("aten::").rstrip("_")


def origins_of(graph: fx.Graph) -> dict[str, Origin]:
    """Operation node name -> `Origin`."""
    nodes = [n for n in graph.nodes if n.op == "call_function"]
    modules = [module_path(n) for n in nodes]
    addresses = number(zip(modules, map(family, nodes), strict=True))
    return {n.name: Origin(a, m, line_of(n)) for n, a, m in zip(nodes, addresses, modules, strict=True)}


def module_path(node: fx.Node) -> str:
    """Path of the module whose forward runs the operation."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    path = stack[-1][0] if stack else ""
    return "" if path.startswith("_empty_nn_module_stack") else re.sub(r"@\d+", "", path)


def line_of(node: fx.Node) -> str:
    """The user's source line ("model.py:12 in forward: x = x.view(...)"), or ""."""
    frames = re.findall(r'File "([^"]+)", line (\d+), in (\S+)\n\s+(.*)', node.meta.get("stack_trace") or "")
    frames = [f for f in frames if "/torch/nn/" not in f[0]] or frames
    if not frames:
        return ""
    file, line, function, text = frames[-1]
    return f"{file.rsplit('/', 1)[-1]}:{line} in {function}: {text.strip()}"


def hook_remarks(model: nn.Module) -> Iterator[str]:
    """One sentence for each module with hooks."""
    for path, module in model.named_modules():
        hooks = len(module._forward_hooks) + len(module._forward_pre_hooks)
        if hooks:
            yield f"{path or 'the model'} has {hooks} forward hook(s): what they computed is part of the program, what they recorded is not"


def static_inputs(graph: fx.Graph, inputs: list[str], batch: int) -> list[str]:
    """Names of the inputs whose batch is a number in the graph."""
    found = []
    for node in graph.nodes:
        value = node.meta.get("val")
        known = node.op == "placeholder" and node.name in inputs and isinstance(value, Tensor) and value.dim()
        if known and is_settled(value.shape[0]) and int(value.shape[0]) == batch:
            found.append(node.name)
    return found


def is_settled(size: Any) -> bool:
    """True if a size is a number, also where torch still writes it as a symbol."""
    return isinstance(size, int) or bool(size.node.expr.is_number)


class _Watch(logging.Handler):
    """Notes the user's line at the moment when torch gives up a symbolic size."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if "set_replacement" in str(record.msg) and str(record.args[1] if isinstance(record.args, tuple) else "").isdigit():
            for frame in reversed(traceback.extract_stack()):
                if is_user_file(frame.filename) and frame.filename != logging.__file__:
                    self.lines.append(f"{frame.filename.rsplit('/', 1)[-1]}:{frame.lineno} in {frame.name}: {frame.line}")
                    return


@contextmanager
def _watching() -> Iterator[_Watch]:
    logger, watch = logging.getLogger(torch.fx.experimental.symbolic_shapes.__name__), _Watch()
    level, propagate, others = logger.level, logger.propagate, list(logger.handlers)
    for handler in others:
        logger.removeHandler(handler)
    logger.addHandler(watch)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield watch
    finally:
        logger.removeHandler(watch)
        for handler in others:
            logger.addHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate


def line_that_fixes(export: Callable[[], Any]) -> str:
    """The first user line at which an export gives up a symbolic batch; "" if none is found. Exports again."""
    with _watching() as watch:
        export()
    return watch.lines[0] if watch.lines else ""
