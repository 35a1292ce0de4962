"""The ONNX Runtime target on the CPU."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from shohin.targets.base import KernelRow, Lowered, Prepared, Ratio, Target, Timing

if TYPE_CHECKING:
    from torch import Tensor, nn

    from shohin.candidate import Measurement
    from shohin.formats import Quantizer
    from shohin.formats.scheme import Scheme
    from shohin.program import Program


class ORTTarget(Target):
    """ONNX Runtime, CPU execution provider, with ``threads`` intra-op threads that do not spin."""

    name = "onnxruntime"
    formats: ClassVar[tuple[str, ...]] = ("float32", "int8")

    @classmethod
    def available(cls) -> bool:
        """True if onnxruntime can be imported."""
        return importlib.util.find_spec("onnxruntime") is not None

    @property
    def vector_width(self) -> int:  # type: ignore[override]
        """Channels of one block of the integer kernels: 16 where there is AVX-512, 8 elsewhere. Narrower rests cost a whole block."""
        from shohin.targets import cpu

        return 16 if "avx512f" in cpu.flags() else 8

    @property
    def saturates(self) -> bool:
        """True if this CPU's uint8 x int8 kernels saturate, so that pair-safe scales are needed."""
        from shohin.targets import cpu

        return cpu.saturates_u8s8(cpu.flags())

    def least_scale(self) -> Callable[[Tensor, int], Tensor] | None:
        """Pair-safe scales where this CPU's uint8 x int8 kernels saturate."""
        from shohin.targets.onnxruntime.pair_safe import pair_safe_scale

        return pair_safe_scale if self.saturates else None

    def misfit(self, scheme: Scheme, kind: str) -> str:
        """See `Target.misfit` and `shohin.targets.onnxruntime.few_bits`."""
        from shohin.targets.onnxruntime.few_bits import misfit

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
    ) -> Lowered:
        """See `Target.lower` and `shohin.targets.onnxruntime.lower`."""
        from shohin.targets.onnxruntime.lower import lower

        return lower(module, args, path, kwargs=kwargs, taps=taps, activations=activations, weights=weights)

    def prepare(self, program: Program, args: tuple[Any, ...], *, kwargs: Mapping[str, Any] | None = None) -> Prepared:
        """See `Target.prepare` and `shohin.targets.onnxruntime.prepare`."""
        from shohin.targets.onnxruntime.prepare import prepare

        return prepare(program, args, kwargs or {}, threads=self.threads)

    def runner(self, path: Path) -> Callable[..., Any]:
        """A `shohin.targets.onnxruntime.session.Runner` over the file."""
        from shohin.targets.onnxruntime.session import Runner

        return Runner(path, threads=self.threads)

    def measure(
        self, files: Mapping[str, Path], args: tuple[Any, ...], *, kwargs: Mapping[str, Any] | None = None, rounds: int = 200, seed: int = 0
    ) -> dict[str, Timing]:
        """See `shohin.targets.onnxruntime.measure.measure`; the example's batch becomes the target's."""
        from shohin.targets.onnxruntime.measure import measure

        return measure(files, args, kwargs=kwargs, rounds=rounds, seed=seed, threads=self.threads, batch=self.batch)

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
        """Times and ratios over fresh processes: see `shohin.targets.onnxruntime.measure.measure_in_processes`."""
        from shohin.targets.onnxruntime.measure import measure_in_processes

        conditions = {"threads": self.threads, "batch": self.batch, "seed": seed}
        return measure_in_processes(files, args, kwargs=kwargs, reference=reference, processes=processes, rounds=rounds, **conditions)

    def memory(self, path: Path, args: tuple[Any, ...], *, kwargs: Mapping[str, Any] | None = None) -> Measurement:
        """See `shohin.targets.onnxruntime.measure.peak_memory`."""
        from shohin.targets.onnxruntime.measure import peak_memory

        return peak_memory(path, args, kwargs=kwargs, threads=self.threads, batch=self.batch)

    def inspect(self, path: Path) -> list[KernelRow]:
        """See `shohin.targets.onnxruntime.inspect.inspect`."""
        from shohin.targets.onnxruntime.inspect import inspect

        return inspect(path)

    def check(self, path: Path, expected: Mapping[str, str]) -> list[str]:
        """See `shohin.targets.onnxruntime.inspect.check`."""
        from shohin.targets.onnxruntime.inspect import check

        return check(path, expected)
