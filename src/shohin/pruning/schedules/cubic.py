"""How the pruned share grows: pure functions of the step, so that a resumed training needs no scheduler state."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from shohin.errors import DataError

Shares = Callable[[int], float]
"""``shares(steps done) -> share`` of elements, blocks or units that is gone, in [0, 1), never falling."""


@dataclass(frozen=True)
class Ramp:
    """A share that grows from ``start`` to ``final`` between two steps, and stays as it is before and after.

    Args:
        final: share at the end.
        begin: the last step with the share ``start``.
        end: the first step with the share ``final``.
        start: share at the beginning.
        every: the share changes at multiples of this many steps after ``begin``, and at ``end``.
        power: of what is left of the ramp: 3 falls steeply at first and slowly at the end; 1 is a straight line.

    Raises:
        DataError: if a value is outside its range.
    """

    final: float
    begin: int = 0
    end: int = 1
    start: float = 0.0
    every: int = 1
    power: float = 3.0

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.final < 1:
            raise DataError(f"a ramp needs 0 <= start <= final < 1; got start={self.start}, final={self.final}")
        if not 0 <= self.begin <= self.end:
            raise DataError(f"a ramp needs 0 <= begin <= end, in steps; got begin={self.begin}, end={self.end}")
        if self.every < 1 or self.power <= 0:
            raise DataError(f"a ramp needs every >= 1 and power > 0; got every={self.every}, power={self.power}")

    def __call__(self, step: int) -> float:
        """The share after ``step`` optimizer steps."""
        if step >= self.end:
            return self.final
        if step <= self.begin:
            return self.start
        since = (step - self.begin) // self.every * self.every
        left = (1 - since / (self.end - self.begin)) ** self.power
        return float(self.start * left + self.final * (1 - left))


def cubic(final: float, begin: int, end: int, *, start: float = 0.0, every: int = 1) -> Ramp:
    """The gradual cubic schedule (Zhu & Gupta, 2017, arXiv 1710.01878): much while the network is redundant, little at the end.

    ``s(t) = final + (start - final) (1 - (t - begin) / (end - begin))^3``; arguments as in `Ramp`.
    """
    return Ramp(final, begin, end, start, every, 3.0)


def linear(final: float, begin: int, end: int, *, start: float = 0.0, every: int = 1) -> Ramp:
    """Equal parts of the whole at equal distances; arguments as in `Ramp`."""
    return Ramp(final, begin, end, start, every, 1.0)


def one_shot(final: float, at: int = 0) -> Ramp:
    """Everything at once: nothing is gone before ``at`` steps, ``final`` from then on (at 0: from the beginning)."""
    return Ramp(final, max(at - 1, 0), at)


def geometric(final: float, rounds: int) -> tuple[float, ...]:
    """The gone share after each round when every round removes the same share of what is left (Frankle & Carbin, 2019, arXiv 1803.03635).

    Args:
        final: share that is gone after the last round, in [0, 1).
        rounds: number of rounds, at least 1.

    Returns:
        ``rounds`` shares, ascending; the last is ``final`` exactly.

    Raises:
        DataError: if a value is outside its range.
    """
    if not 0 <= final < 1 or rounds < 1:
        raise DataError(f"geometric rounds need a share in [0, 1) and at least one round; got final={final}, rounds={rounds}")
    return (*(1 - (1 - final) ** (i / rounds) for i in range(1, rounds)), final)
