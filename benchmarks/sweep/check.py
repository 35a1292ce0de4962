"""One model through the whole sweep: capture, understand, cut by several plans, compare with the oracle, ONNX Runtime, save and load."""

from __future__ import annotations

import copy
import json
import random
import tempfile
import time
import traceback
import warnings
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from shohin.data import Call
from shohin.errors import ModelError
from shohin.graph import Graph, understand_program
from shohin.plan import Plan
from shohin.program import capture
from shohin.surgery import Cut, confirm, cut
from shohin.surgery.oracle import lively, oracle, unspoken
from shohin.targets import Target
from sweep.entry import Entry
from sweep.numbers import TOLERANCE, Exact, Wrong, against, casts, difference, doubled, embedding_tables, outputs_of, single
from sweep.parts import check_parts

#: relative, in float32
ONNX_TOLERANCE = 5e-4
#: relative, in float64: the same operations on the same numbers, which may lie otherwise in memory
RELOAD_TOLERANCE = 1e-13


def check(entry: Entry, plans: int = 3, onnx: bool = True, reload: bool = True) -> dict[str, Any]:
    """Everything that is recorded of a model; ``wrong`` names what differs, ``error`` what could not be done."""
    record: dict[str, Any] = {"name": entry.name, "family": entry.family, "note": entry.note, "wrong": "", "error": "", "stage": "build"}
    started = time.perf_counter()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _check(entry, record, plans, onnx, reload)
        record["stage"] = ""
    except Wrong as error:
        record["wrong"] = str(error)
    except Exception as error:
        record["error"] = f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
        record["trace"] = [f"{f.filename.rsplit('/', 3)[-1]}:{f.lineno} {f.line}" for f in traceback.extract_tb(error.__traceback__)[-4:]]
    record["seconds"] = round(time.perf_counter() - started, 1)
    return record


def _check(entry: Entry, record: dict[str, Any], plans: int, onnx: bool, reload: bool) -> None:
    model = _model(entry)
    example = doubled(entry.arguments(2, 0))
    record["parameters"], record["embeddings"] = _sizes(model, embedding_tables(model))
    record["stage"] = "capture"
    try:
        with _timing(record, "capture_seconds"), _timing_export(record):
            program = capture(model, Call(*example, None, None))
    except ModelError:  # or it does not run to its end: torchvision has no kernels for regions here
        check_parts(entry, record, model, min(plans, 1), reload)  # large models, each part of which is proved as well
        return
    record["stage"] = "understand"
    with _timing(record, "understand_seconds"):
        graph = confirm(understand_program(program))
    with Exact() if casts(program) else nullcontext():
        if casts(program):  # compared in float64 throughout; what is timed is the model as it is
            graph = confirm(understand_program(capture(model, Call(*example, None, None))))
        result, plan = _plans(entry, record, model, graph, plans)
    if onnx:
        record["stage"] = "onnx"
        record["onnx"] = _onnx(entry, _single(entry, result, plan))
        if record["onnx"].startswith("wrong"):
            raise Wrong(f"ONNX Runtime: {record['onnx']}")
    if reload:
        record["stage"] = "reload"
        torch.manual_seed(1)
        other = entry.build().eval().double()  # its computed buffers are the model's: rounded to float32
        with Exact() if casts(program) else nullcontext():
            _reload(entry, other, result, plan)


def _plans(entry: Entry, record: dict[str, Any], model: nn.Module, graph: Graph, plans: int) -> tuple[Cut, Plan]:
    """Random plans, then the half-width plan; each against the oracle. Returns the last."""
    record.update(groups=len(graph.groups), regions=len(graph.regions))
    inside = [f for f in graph.frozen if "output of the model" not in f.reason]
    record["frozen"] = [f"{f.address}: {f.reason} ({f.line})" for f in inside[:5]]
    record["stage"] = "oracle"
    silent = unspoken(model, graph)
    record["silent"] = [f"{k}: {v}" for k, v in silent.items()][:5]
    record["silent_groups"] = len(silent)
    record["plans"] = []
    for seed in range(1, plans + 1):
        record["stage"] = f"plan {seed}"
        plan = random_plan(graph, seed, set(silent))
        _compare(entry, record, model, graph, plan, _cut(record, model, graph, plan), seed)
    record["stage"] = "half"
    plan = half_plan(graph)
    with _timing(record, "cut_seconds"):
        result = _cut(record, model, graph, plan)
    after, left = _sizes(result.model, embedding_tables(model))
    record["ratio"] = round((after - left) / max(record["parameters"] - record["embeddings"], 1), 4)
    record.update(form=result.form, reason=result.reason, parts=list(result.parts))
    if not silent:
        _compare(entry, record, model, graph, plan, result, 9)
    else:
        spoken = Plan(plan.fingerprint, {k: v for k, v in plan.widths.items() if k not in silent})
        _compare(entry, record, model, graph, spoken, _cut(record, model, graph, spoken), 9)
    record["max_oracle_error"] = max((p["error"] for p in record["plans"]), default=0.0)
    record["max_proof_error"] = max((p["proof"] for p in record["plans"]), default=0.0)
    return result, plan


def _model(entry: Entry) -> nn.Module:
    torch.manual_seed(0)
    return lively(entry.build(), 0).double()


def _sizes(model: nn.Module, names: set[str]) -> tuple[int, int]:
    """(all parameters, those of embedding tables), tied ones once."""
    tables = {id(p): p.numel() for n, p in model.named_parameters(remove_duplicate=False) if n in names}
    return sum(p.numel() for p in model.parameters()), sum(tables.values())


def random_plan(graph: Graph, seed: int, leave: set[str] = frozenset()) -> Plan:  # type: ignore[assignment]
    """Random subsets of most groups; seed 1 keeps one unit of each of them (of normalized ones four)."""
    r = random.Random(seed)
    widths = {}
    for group in graph.groups:
        if group.name in leave:
            continue
        least = min(group.size, 4 if group.normalized else 1)  # the statistics of one channel say nothing
        count = least if seed == 1 else r.choice([group.size, r.randint(least, group.size), r.randint(least, group.size)])
        widths[group.name] = tuple(sorted(r.sample(range(group.size), count)))
    return Plan(graph.program.fingerprint, widths)


def half_plan(graph: Graph) -> Plan:
    """The first half of the units of every group, rounded up."""
    return Plan(graph.program.fingerprint, {g.name: tuple(range((g.size + 1) // 2)) for g in graph.groups})


def _cut(record: dict[str, Any], model: nn.Module, graph: Graph, plan: Plan) -> Cut:
    result = cut(model, graph, plan)
    record["plans"].append({"form": result.form, "reason": result.reason, "proof": result.proof.error, "error": 0.0})
    if not result.proof.holds:
        raise Wrong(f"the cut does not equal the view: {result.proof.where}, {result.proof.error:.1e}")
    return result


def _compare(entry: Entry, record: dict[str, Any], model: nn.Module, graph: Graph, plan: Plan, result: Cut, seed: int) -> None:
    for error, where in against(oracle(model, graph, plan), result.model, result.rewritten, doubled(entry.arguments(2, seed))):
        record["plans"][-1]["error"] = max(record["plans"][-1]["error"], error)
        if not error <= TOLERANCE:
            raise Wrong(f"the cut does not equal the oracle: {where}, {error:.1e} (form {result.form})")


def _single(entry: Entry, result: Cut, plan: Plan) -> nn.Module:
    """The cut model in float32. Programs hold the types of their constants, so what is not the user's own code is cut once more."""
    if result.form == "module" and not result.parts:
        with suppress(RuntimeError):  # a class that keeps what it computed cannot be copied once it has run
            return copy.deepcopy(result.model).float()
    model = _model(entry).float()
    graph = confirm(understand_program(capture(model, Call(*single(entry.arguments(2, 0)), None, None))))
    return cut(model, graph, Plan(graph.program.fingerprint, plan.widths), form=result.form).model


def _onnx(entry: Entry, model: nn.Module) -> str:
    """ "ok", "wrong: ..." or why there is no file."""
    target = Target("onnxruntime")
    model.eval()
    args, kwargs = single(entry.arguments(2, 5))
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        path = Path(folder) / "cut.onnx"
        try:
            target.lower(model, args, path, kwargs=kwargs)
            runner = target.runner(path)
        except Exception as error:
            return f"no file: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
        error, where = difference(outputs_of(runner(*args, **kwargs)), outputs_of(model(*args, **kwargs)), "output")
    return "ok" if error <= ONNX_TOLERANCE else f"wrong: {where}, {error:.1e}"


def _reload(entry: Entry, other: nn.Module, result: Cut, plan: Plan) -> None:
    """Weights and plan to disk and back, into a cut of another model, with other weights."""
    arguments = doubled(entry.arguments(2, 6))
    with tempfile.TemporaryDirectory() as folder:
        state = {k: v.detach().clone().contiguous() for k, v in result.model.state_dict().items()}
        save_file(state, str(Path(folder) / "cut.safetensors"))
        (Path(folder) / "plan.json").write_text(json.dumps(plan.to_json()))
        graph = confirm(understand_program(capture(other, Call(*doubled(entry.arguments(2, 0)), None, None))))
        again = cut(other, graph, Plan.from_json(json.loads((Path(folder) / "plan.json").read_text())), form=result.form)
        if again.form != result.form:
            raise Wrong(f"the same plan gave form {result.form}, then {again.form}: {again.reason}")
        loaded = OrderedDict(load_file(str(Path(folder) / "cut.safetensors")))
        loaded._metadata = getattr(result.model.state_dict(), "_metadata", {})  # type: ignore[attr-defined]  # some classes ask for it
        again.model.load_state_dict(loaded)
    with torch.no_grad():
        error, where = difference(
            outputs_of(again.model(*arguments[0], **arguments[1])), outputs_of(result.model(*arguments[0], **arguments[1])), "output"
        )
    if not error <= RELOAD_TOLERANCE:
        raise Wrong(f"saved and loaded: {where}, {error:.1e}")


@contextmanager
def _timing(record: dict[str, Any], key: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    record[key] = round(time.perf_counter() - started, 3)


@contextmanager
def _timing_export(record: dict[str, Any]) -> Iterator[None]:
    """The time of torch.export itself."""
    original = torch.export.export

    def timed(*args: Any, **kwargs: Any) -> Any:
        with _timing(record, "export_seconds"):
            return original(*args, **kwargs)

    torch.export.export = timed
    try:
        yield
    finally:
        torch.export.export = original
