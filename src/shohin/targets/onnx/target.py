"""Runtimes on the CPU that read ONNX files: what their targets share."""

from __future__ import annotations

import importlib.util
from abc import abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from shohin.targets.base import Lowered, Prepared, Ratio, Target, Timing

if TYPE_CHECKING:
    from torch import Tensor, nn

    from shohin.candidate import Measurement
    from shohin.formats import Quantizer
    from shohin.formats.scheme import Scheme
    from shohin.program import Program
    from shohin.targets.onnx.lower import Rules


class ONNXTarget(Target):
    """A runtime on the CPU that reads the ONNX files of `shohin.targets.onnx`, with grids placed by its own rules."""

    formats: ClassVar[tuple[str, ...]] = ("float32", "int8")

    @classmethod
    def available(cls) -> bool:
        """True if the runtime can be imported."""
        return importlib.util.find_spec(cls.name) is not None

    @property
    @abstractmethod
    def rules(self) -> Rules:
        """What the runtime asks of grids."""

    @property
    def vector_width(self) -> int:  # type: ignore[override]
        """Channels of one block of the kernels: 16 where there is AVX-512, 8 elsewhere. Narrower rests cost a whole block."""
        from shohin.targets import cpu

        return 16 if "avx512f" in cpu.flags() else 8

    def least_scale(self) -> Callable[[Tensor, int], Tensor] | None:
        """Scales at which no uint8 x int8 kernel saturates, on any CPU: a file gives the same answers wherever it is taken."""
        from shohin.targets.onnx.pair_safe import pair_safe_scale

        return pair_safe_scale

    def misfit(self, scheme: Scheme, kind: str) -> str:
        """See `Target.misfit` and `shohin.targets.onnx.few_bits`."""
        from shohin.targets.onnx.few_bits import misfit

        return misfit(scheme, kind)

    def environment(self) -> dict[str, Any]:
        """Conditions, processor, instruction sets and versions; JSON-able."""
        from shohin.targets import cpu

        return {**self.conditions, **cpu.environment(self.threads)}

    def lower(
        self,
        module: nn.Module,
        args: tuple[Any, ...],
        path: Path,
        *,
        kwargs: Mapping[str, Any] | None = None,
        taps: Sequence[str] = (),
        activations: Mapping[str, Quantizer] | None = None,
        weights: Mapping[str, Quantizer] | None = None,
        dynamic: Collection[str] = (),
    ) -> Lowered:
        """See `Target.lower` and `shohin.targets.onnx.lower`."""
        from shohin.targets.onnx.lower import lower

        return lower(module, args, path, self.rules, kwargs=kwargs, taps=taps, activations=activations, weights=weights, dynamic=dynamic)

    def prepare(self, program: Program, args: tuple[Any, ...], *, kwargs: Mapping[str, Any] | None = None) -> Prepared:
        """See `Target.prepare` and `shohin.targets.onnxruntime.prepare`."""
        from shohin.targets.onnxruntime.prepare import prepare

        return prepare(program, args, kwargs or {}, self.rules, self.runner, threads=self.threads)

    def measure(
        self, files: Mapping[str, Path], args: tuple[Any, ...], *, kwargs: Mapping[str, Any] | None = None, rounds: int = 200, seed: int = 0
    ) -> dict[str, Timing]:
        """See `shohin.targets.measure.measure`; the example's batch becomes the target's."""
        from shohin.targets.measure import measure

        return measure(self.name, files, args, kwargs=kwargs, rounds=rounds, seed=seed, threads=self.threads, batch=self.batch)

    def compare(
        self,
        files: Mapping[str, Path],
        args: tuple[Any, ...],
        *,
        kwargs: Mapping[str, Any] | None = None,
        reference: str | None = None,
        processes: int = 5,
        rounds: int = 200,
        seed: int = 0,
    ) -> dict[str, Ratio]:
        """Times and ratios over fresh processes: see `shohin.targets.measure.measure_in_processes`."""
        from shohin.targets.measure import measure_in_processes

        conditions = {"threads": self.threads, "batch": self.batch, "seed": seed}
        return measure_in_processes(
            self.name, files, args, kwargs=kwargs, reference=reference, processes=processes, rounds=rounds, **conditions
        )

    def memory(self, path: Path, args: tuple[Any, ...], *, kwargs: Mapping[str, Any] | None = None) -> Measurement:
        """See `shohin.targets.measure.peak_memory`."""
        from shohin.targets.measure import peak_memory

        return peak_memory(self.name, path, args, kwargs=kwargs, threads=self.threads, batch=self.batch)
