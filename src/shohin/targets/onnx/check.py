"""What a runtime executes beside what the plan says, whatever the runtime: layers are found by the names that lowering left in a file."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from shohin.errors import TargetError, closest
from shohin.formats.scheme import is_scheme
from shohin.targets.base import KernelRow
from shohin.targets.onnx.lower import ALIASES, LAYERS


def metadata(path: str | Path) -> tuple[dict[str, str], dict[str, str]]:
    """Layers (weight -> tensor) and aliases (tap -> tensor) that lowering left in a file; none if Shohin did not write it.

    Raises:
        TargetError: if there is no such file.
    """
    import onnx

    if not Path(path).is_file():
        raise TargetError(f"there is no file {str(path)!r}")
    held = {p.key: p.value for p in onnx.load(str(path)).metadata_props}
    if LAYERS not in held:
        return {}, {}
    return json.loads(held[LAYERS]), json.loads(held[ALIASES])


def match_layer(text: str, names: Iterable[str]) -> str | None:
    """The layer whose weight a runtime's own name is of: the weight's name, or one derived from it by a prefix or suffix.

    Args:
        names: of the weights, the longest first.
    """
    for name in names:
        at = text.find(name)
        if at < 0:
            continue
        before, after = text[:at], text[at + len(name) :]
        if (
            (not before or before[-1] in "_/:")
            and (not after or after[0] in "_/:." or after == ".T")
            and not after.startswith(("_scale", "_zero"))
        ):
            return name
    return None


def departures(
    path: str | Path,
    expected: Mapping[str, str],
    of_layer: Callable[[str, str], KernelRow | None],
    of_tensor: Callable[[str], KernelRow | None],
    few_bits: Callable[[KernelRow], bool],
) -> list[str]:
    """Where the runtime departs from the plan.

    Args:
        expected: weight name (a layer) or tap name (the operation that makes that tensor) -> "int8", "float32" or a weight scheme
            ("weights int4 group 32").
        of_layer: weight and tensor of a layer -> the operation that computes it.
        of_tensor: tensor -> the operation that makes it.
        few_bits: True for an operation that takes weights of few bits beside float activations.

    Returns:
        One sentence for each disagreement; empty if the runtime does what the plan says.

    Raises:
        TargetError: for a name that the file does not know, or a file that Shohin did not lower.
    """
    layers, aliases = metadata(path)
    if not layers and expected:
        raise TargetError(f"{path} holds no names of layers: it was not written by Shohin, so it cannot be compared with a plan")
    tensors = _tensors(path)
    out = []
    for name, wanted in expected.items():
        if wanted not in ("int8", "float32") and not is_scheme(wanted):
            raise TargetError(f"{name!r}: expected formats are 'int8', 'float32' or a weight scheme; got {wanted!r}")
        if (weight := aliases.get(name, name)) in layers:
            found = of_layer(weight, layers[weight])
        elif (tensor := aliases.get(name, name)) in tensors:
            found = of_tensor(tensor)
        else:
            raise TargetError(f"{path} knows no layer or tensor {name!r}{closest(name, [*layers, *tensors])}")
        if found is None:
            if wanted != "float32":
                out.append(f"{name}: should be {wanted}, but no operation of the optimized graph could be recognized as it")
        elif few_bits(found) != is_scheme(wanted):
            out.append(f"{name}: should be {wanted}, but the runtime executes {found.op}")
        elif found.integer != (wanted == "int8"):
            out.append(f"{name}: should be {wanted}, but the runtime executes {found.op} ({'integer' if found.integer else 'float'})")
    return out


def _tensors(path: str | Path) -> set[str]:
    import onnx

    graph = onnx.load(str(path)).graph
    return {o for node in graph.node for o in node.output} | {i.name for i in graph.input}
