"""One export for many files: a program's narrower forms by slicing the exported graph.

An export takes seconds, nearly all of it the exporter's own preparation. Where only operations and shapes matter (timing), the
graph of the full program is exported once and narrowed to each plan: tensors are taken from the narrower program, integers are
changed where the two programs differ, skipped regions are cut out. Each result is run and compared with the narrower program,
tensor by tensor; whatever is not certain raises `CannotNarrow`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, fx

from shohin.formats import Quantizer
from shohin.program import Program, ProgramModule, interpret
from shohin.run import write_atomic
from shohin.targets.base import CannotNarrow, Lowered, Prepared
from shohin.targets.onnx.edges import array
from shohin.targets.onnx.export import Exported, Translated, optimized, translate
from shohin.targets.onnx.lower import Rules, write
from shohin.targets.onnx.rewrite import drop_outputs, drop_unused
from shohin.targets.onnxruntime.narrow import SIZES, changed_nodes, compare, cut_out, family_of, fill, regroup, set_integers, set_shapes
from shohin.targets.onnxruntime.session import open_session, options

if TYPE_CHECKING:
    import onnx


def prepare(
    program: Program,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    rules: Rules,
    opened: Callable[[Path], Callable[..., Any]],
    *,
    threads: int = 1,
) -> PreparedONNX:
    """Exports a program with every tensor that depends on its inputs kept apart.

    Args:
        program, args, kwargs: see `shohin.targets.Target.prepare`.
        rules: of the runtime that is to read the files.
        opened: runs a file in that runtime.
        threads: of ONNX Runtime, which narrowed graphs are compared in.

    Raises:
        TargetError: if it cannot be exported.
    """
    data = {name for name, x in zip(program.inputs, program.example, strict=True) if isinstance(x, Tensor)}
    taps = []
    for node in program.graph.nodes:
        if node.op == "call_function" and any(i.name in data for i in node.all_input_nodes):
            if isinstance(node.meta.get("val"), Tensor):
                taps.append(node.name)
            if not isinstance(node.meta.get("val"), (int, torch.SymInt)):
                data.add(node.name)
    names = {n: program.origins[n].address for n in taps}
    translated = translate(ProgramModule(program, taps=tuple(taps)), args, kwargs, [names[n] for n in taps])
    example = tuple(x[:2] if isinstance(x, Tensor) and x.dim() and x.shape[0] == program.batch else x for x in program.example)
    shapes = {n: tuple(v.shape) for n, v in _values(program, example, set(taps))[0].items()}
    return PreparedONNX(program, translated, names, example, shapes, rules, opened, threads)


def _values(program: Program, inputs: tuple[Any, ...], wanted: set[str]) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Values of nodes, and the flat outputs that are tensors."""
    out: dict[str, Tensor] = {}

    def visit(node: fx.Node, value: Any, args: tuple[Any, ...]) -> Any:
        if node.name in wanted:
            out[node.name] = value
        return value

    with torch.no_grad():
        flat = interpret(program, program.graph, program.tensors, inputs, visit)
    return out, [x for x in flat if isinstance(x, Tensor)]


@dataclass(eq=False)
class PreparedONNX(Prepared):
    """An exported program.

    Args:
        program: that was exported.
        translated: not optimized, with every tap as an output; never changed.
        names: node name -> tap name.
        example: flattened inputs, two samples.
        shapes: node name -> shape on the example.
        rules, opened, threads: see `prepare`.
    """

    program: Program
    translated: Translated
    names: Mapping[str, str]
    example: tuple[Any, ...]
    shapes: Mapping[str, tuple[int, ...]]
    rules: Rules
    opened: Callable[[Path], Callable[..., Any]]
    threads: int
    _optimized: dict[frozenset[str], Exported] = field(default_factory=dict)

    def variant(
        self,
        program: Program,
        path: Path,
        *,
        skips: Mapping[str, str] | None = None,
        activations: Mapping[str, Quantizer] | None = None,
        weights: Mapping[str, Quantizer] | None = None,
    ) -> Lowered:
        """See `Prepared.variant`."""
        activations, skips = dict(activations or {}), dict(skips or {})
        changed = changed_nodes(self.program, program, skips)
        sized = {n.name for n in program.graph.nodes if family_of(n) in SIZES} & self.names.keys()
        taps = {n for n in (*activations, *changed, *sized) if n not in self.program.inputs}
        if unknown := {*taps, *skips, *skips.values()} - self.names.keys() - set(self.program.inputs):
            raise CannotNarrow(f"{sorted(unknown)[0]} is not a tensor of the exported graph")
        try:
            exported = self._narrowed(program, frozenset(taps), skips, changed | sized)
            names = [self.names[n] for n in taps]
            quantizers = {self.names.get(n) or self._outside[n]: q for n, q in activations.items()}
            tensors = {name: t for name, t in program.tensors.items() if name in program.trainable}
            rest = {name: t for name, t in program.tensors.items() if name not in program.trainable}
            with tempfile.TemporaryDirectory(prefix="shohin-") as folder:
                made = write(
                    exported, Path(folder) / path.name, tensors, rest, self.rules, taps=names, activations=quantizers, weights=weights or {}
                )
                args, kwargs = torch.utils._pytree.tree_unflatten(list(self.example), program.in_spec)
                self.opened(made.path)(*args, **kwargs)
                write_atomic(path, made.path.read_bytes())
        except CannotNarrow:
            raise
        except Exception as error:  # from the exporter's optimizer or the runtime: a full lowering says it better, or works
            raise CannotNarrow(str(error)) from error
        return replace(made, path=path)

    def _narrowed(self, program: Program, taps: frozenset[str], skips: Mapping[str, str], changed: frozenset[str]) -> Exported:
        """The graph of the narrower program, with the taps that stay as outputs; compared with the program on the example."""
        alive = {n.name for n in program.graph.nodes}
        full = self._full(taps, frozenset(n for pair in skips.items() for n in pair if n not in self.program.inputs), alive)
        model, tensor = type(full.model)(), {n: full.aliases.get(name, name) for n, name in self.names.items()}
        model.CopyFrom(full.model)
        tensor.update(self._outside)
        own = full.signature.outputs
        cut_out(model, {tensor[a]: tensor[b] for a, b in skips.items()})
        shown = {o.name for o in model.graph.output}
        kept = {n: tensor[n] for n in taps if n in alive and n not in skips and tensor[n] in shown}
        drop_outputs(model, {o.name for o in model.graph.output} - set(own) - set(kept.values()))
        drop_unused(model)
        fill(model, self.program, program)
        regroup(model, self.program, program)
        values, outputs = _values(program, self.example, set(kept))
        set_integers(model, self.program, program, {n: t for n, t in kept.items() if n in changed}, self.shapes, values)
        set_shapes(model, {kept[n]: tuple(v.shape) for n, v in values.items()})
        wanted = {kept[n]: v for n, v in values.items()} | dict(zip(own, outputs, strict=True))
        self._compare(model, program, wanted)
        return Exported(model, dict(full.aliases), full.signature)

    def _compare(self, model: onnx.ModelProto, program: Program, wanted: Mapping[str, Tensor]) -> None:
        import onnx

        data = model.SerializeToString()
        try:
            onnx.shape_inference.infer_shapes(data, check_type=True, strict_mode=True, data_prop=True)
        except Exception as error:  # a class of the compiled part
            raise CannotNarrow(f"the shapes of the narrowed graph do not fit: {error}") from error
        with tempfile.TemporaryDirectory(prefix="shohin-") as folder:
            path = Path(folder) / "narrowed.onnx"
            path.write_bytes(data)
            session = open_session(path, made=options(self.threads, "none"))
        names = [o.name for o in session.get_outputs()]
        try:
            found = session.run(names, self._feed(program, [i.name for i in session.get_inputs()]))
        except Exception as error:  # the runtime's exception classes are private
            raise CannotNarrow(f"the narrowed graph does not run: {error}") from error
        compare(dict(zip(names, found, strict=True)), {n: v.detach().cpu().numpy() for n, v in wanted.items()})

    @property
    def _outside(self) -> dict[str, str]:
        """Input node -> its name in the file."""
        return dict(zip(self.program.inputs, self.program.input_names, strict=True))

    def _feed(self, program: Program, names: list[str]) -> dict[str, Any]:
        values = dict(zip(program.input_names, self.example, strict=True))
        if missing := set(names) - values.keys():
            raise CannotNarrow(f"the graph has an input {sorted(missing)[0]!r} that the program has not")
        return {name: np.ascontiguousarray(values[name].detach().cpu().numpy()) for name in names}

    def _full(self, taps: frozenset[str], ends: frozenset[str], alive: set[str]) -> Exported:
        """The full graph with taps and the ends of skipped regions: one that is at hand, if what stays of it would be the same."""
        for held, exported in self._optimized.items():
            found = {o for node in exported.model.graph.node for o in node.output}
            named = all(exported.aliases.get(self.names[n], self.names[n]) in found for n in ends)
            if named and taps <= held and not (held - taps - ends) & alive:
                return exported
        return self._with_taps(taps | ends)

    def _with_taps(self, taps: frozenset[str]) -> Exported:
        """The full graph, optimized as the exporter would with these taps."""
        if taps not in self._optimized:
            model = self.translated.model.clone()
            names = [self.names[n] for n in sorted(taps)]
            kept = {*self.translated.signature.outputs, *(self.translated.aliases.get(n, n) for n in names)}
            own = len(self.translated.signature.outputs)
            outputs = [o for i, o in enumerate(model.graph.outputs) if i < own or o.name in kept]
            model.graph.outputs.clear()
            model.graph.outputs.extend(outputs)
            made = optimized(replace(self.translated, model=model), names)
            derived = [i.name for i in made.model.graph.initializer if i.name in self.program.tensors and not _equal(i, self.program)]
            if derived:
                raise CannotNarrow(f"the exporter's optimizer computes from the parameter {derived[0]!r}")
            self._optimized[taps] = made
        return self._optimized[taps]


def _equal(initializer: onnx.TensorProto, program: Program) -> bool:
    value, held = program.tensors[initializer.name].detach().cpu().numpy(), array(initializer)
    return value.shape == held.shape and bool(np.array_equal(value, held, equal_nan=value.dtype.kind == "f"))
