"""A target: a runtime on a device with its conditions. One class per runtime, in a room of its own.

Life cycle, in this order (each step needs only the file that the step before made):

1. ``available()``: can it run here?
2. ``lower(module, args, path, ...)``: writes the file that ships and says what it holds (`Lowered`).
3. ``runner(path)``: a callable with the torch model's signature that runs *that file*, so quality is measured on it.
4. ``measure({name: path}, args)``: time of several files in one interleaving (`Timing`); ``memory(path, args)``: peak memory.
5. ``inspect(path)``: what the runtime really executes (`KernelRow`), and ``check(path, expected)``: where that differs from the plan.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from shohin.errors import TargetError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from shohin.candidate import Measurement
    from shohin.formats import Bits, Quantizer, Scheme
    from shohin.program import Program


class CannotNarrow(TargetError):
    """A narrower form of a prepared model cannot be made for sure: lower it in full."""


class Prepared(ABC):
    """A program that was exported once, from which files of its narrower forms are made fast."""

    @abstractmethod
    def variant(
        self,
        program: Program,
        path: Path,
        *,
        skips: Mapping[str, str] | None = None,
        activations: Mapping[str, Quantizer] | None = None,
        weights: Mapping[str, Quantizer] | None = None,
    ) -> Lowered:
        """Writes the file that ``lower`` would write for ``program``; its outputs are compared with the program's.

        Args:
            program: the prepared program through a plan: the same node and tensor names, smaller tensors, changed integers.
            path: of the file.
            skips: output -> input node name of each region that is skipped.
            activations: node or input name -> per-tensor quantizer.
            weights: parameter name -> quantizer.

        Raises:
            CannotNarrow: if it is not certain that the file would be the same.
        """


@dataclass(frozen=True)
class Timing:
    """The time of one run of a file.

    Args:
        value: milliseconds.
        spread: relative repeatability: the difference between the two halves of the same interleaving (or the
            interquartile range over processes), divided by the value. Smaller differences between files mean nothing.
        how: the method, in words.
        conditions: threads, batch, rounds, clock, runtime version; JSON-able.
    """

    value: float
    spread: float
    how: str
    conditions: Mapping[str, Any] = field(default_factory=dict)

    def measurement(self) -> Measurement:
        """As a metric of a candidate."""
        from shohin.candidate import Measurement

        return Measurement(self.value, f"measured: {self.how}", dict(self.conditions), self.spread)

    def to_json(self) -> dict[str, Any]:
        """A JSON-able dictionary."""
        return {"value": self.value, "spread": self.spread, "how": self.how, "conditions": dict(self.conditions)}


@dataclass(frozen=True)
class Ratio:
    """How a file's time compares with a reference measured in the same interleavings.

    Args:
        timing: median over processes.
        ratio: median over processes of time / reference time.
        low, high: smallest and largest ratio over processes.
    """

    timing: Timing
    ratio: float
    low: float
    high: float

    def to_json(self) -> dict[str, Any]:
        """A JSON-able dictionary."""
        return {"timing": self.timing.to_json(), "ratio": self.ratio, "low": self.low, "high": self.high}


@dataclass(frozen=True)
class KernelRow:
    """One node of the graph that the runtime executes.

    Args:
        op: the runtime's own operator ("QLinearConv", "FusedConv"...).
        integer: True if it computes on (or moves) integer codes.
        outputs: names of its output tensors.
        layer: qualified name of the weight it contracts with, or None.
        name: the node's name.
    """

    op: str
    integer: bool
    outputs: tuple[str, ...]
    layer: str | None = None
    name: str = ""


@dataclass(frozen=True)
class Lowered:
    """A file that was written.

    Args:
        path: the file.
        size_bytes: its size.
        activations: the quantizers that the file holds, by the names that were asked for. A view must use these: the
            runtime's rules may have narrowed one (``adjusted``).
        adjusted: name -> what was changed and why, for each activation quantizer that is not the one asked for.
        layers: qualified weight name -> name of the tensor that the layer computes.
        aliases: tap name -> name of the tensor in the file, where the tap is another name of an input, output or other tap;
            and parameter name -> first name of the same (tied) parameter.
        notes: facts that cost speed or exactness, in sentences.
    """

    path: Path
    size_bytes: int
    activations: Mapping[str, Quantizer]
    adjusted: Mapping[str, str]
    layers: Mapping[str, str]
    aliases: Mapping[str, str]
    notes: tuple[str, ...] = ()


class Target(ABC):
    """A runtime on a device with its conditions.

    ``Target("onnxruntime", threads=1, batch=1)`` gives the target of that name; each target is a subclass.

    Args:
        name: the target's name.
        threads: of the runtime, while running and timing.
        batch: samples per timed run.

    Raises:
        TargetError: for an unknown name, a runtime that is not installed, or conditions that are not positive.
    """

    vector_width: ClassVar[int] = 8
    formats: ClassVar[tuple[str, ...]] = ()
    dynamic: ClassVar[bool] = False
    name: str
    threads: int
    batch: int

    def __new__(cls, name: str = "", threads: int = 1, batch: int = 1) -> Target:
        """The subclass of that name, if called on `Target` itself."""
        if cls is Target:
            from shohin.targets.registry import find

            cls = find(name)
        return object.__new__(cls)

    def __init__(self, name: str = "", threads: int = 1, batch: int = 1) -> None:
        for what, value in (("threads", threads), ("batch", batch)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise TargetError(f"target {name!r}: {what} must be a whole number of at least 1; got {value!r}")
        self.threads, self.batch = threads, batch

    def __repr__(self) -> str:
        return f"Target({self.name!r}, threads={self.threads}, batch={self.batch})"

    @property
    def conditions(self) -> dict[str, Any]:
        """Threads and batch, JSON-able."""
        return {"target": self.name, "threads": self.threads, "batch": self.batch}

    @classmethod
    @abstractmethod
    def available(cls) -> bool:
        """True if the runtime can be imported here."""

    @abstractmethod
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
        """Writes the file that ships, atomically.

        Args:
            module: in eval mode; returns ``(outputs..., *taps)`` if ``taps`` are named, otherwise the model's outputs.
            args, kwargs: an example call. Dimension 0 of the tensors stays free.
            path: of the file.
            taps: names of the extra outputs, which name tensors inside the model and are not outputs of the file.
            activations: tap or input name -> per-tensor quantizer.
            weights: parameter name -> quantizer.
            dynamic: of these the weights of linear layers that round their input in the range that it has itself.

        Raises:
            TargetError: if the module cannot be lowered or a name matches nothing.
        """

    def prepare(self, program: Program, args: tuple[Any, ...], *, kwargs: Mapping[str, Any] | None = None) -> Prepared | None:
        """Exports a program once, for many files of its narrower forms. None (here) if this target lowers each in full.

        Args:
            program: with folded batch normalizations, as it would be lowered.
            args, kwargs: an example call.

        Raises:
            TargetError: if the program cannot be lowered.
        """
        return None

    @abstractmethod
    def runner(self, path: Path) -> Callable[..., Any]:
        """Runs a file: a callable with the torch model's signature and output structure."""

    @abstractmethod
    def measure(
        self, files: Mapping[str, Path], args: tuple[Any, ...], *, kwargs: Mapping[str, Any] | None = None, rounds: int = 200, seed: int = 0
    ) -> dict[str, Timing]:
        """Times files against each other, in one random interleaving. Milliseconds per run."""

    @abstractmethod
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
        """Times files against a reference in several fresh processes, one interleaving in each."""

    @abstractmethod
    def environment(self) -> dict[str, Any]:
        """Conditions, processor, instruction sets and versions; JSON-able."""

    def least_scale(self) -> Callable[[Tensor, int], Tensor] | None:
        """(weight, groups) -> the least scale of each output channel at which integer kernels are exact here; None if any is."""
        return None

    def misfit(self, scheme: Scheme, kind: str) -> str:
        """Why this target cannot run weights held so natively beside float activations, with what it can; "" if it can.

        Args:
            kind: of the layer, "linear", "convolution" or "depthwise"; "table" of an embedding.
        """
        return f"the target {self.name!r} has no kernels for weights of few bits; it has {', '.join(self.formats)}"

    def unfit(self, bits: Bits) -> str:
        """Why this target cannot run layers on such integers natively, with what it can; "" if it can."""
        if "int8" not in self.formats:
            return f"the target {self.name!r} has no integer kernels; it has {', '.join(self.formats)}"
        if bits.dynamic and not self.dynamic:
            return f"{self.name!r} has no kernels that round an input in its own range: ask for 'int8', or for the target 'onnxruntime'"
        if bits.activations.bits == 8:
            return ""
        near = "'int8'" if bits.weights.bits == 8 else f"'int8' or 'w{bits.weights.bits}a8' (weights in the same kernels, held in 8 bits)"
        return f"the kernels of {self.name!r} read activations of 8 bits: ask for {near}, or give target=None to simulate {str(bits)!r}"

    @abstractmethod
    def memory(self, path: Path, args: tuple[Any, ...], *, kwargs: Mapping[str, Any] | None = None) -> Measurement:
        """Peak memory of loading and running a file, in bytes."""

    @abstractmethod
    def inspect(self, path: Path) -> list[KernelRow]:
        """What the runtime really executes, node by node."""

    @abstractmethod
    def check(self, path: Path, expected: Mapping[str, str]) -> list[str]:
        """Where the runtime departs from the plan, in sentences. ``expected``: weight or tap name -> "int8", "float32" or a weight scheme."""
