"""Numbers as people read them. Pure functions; units are in the names, an unknown number is a dash."""

from __future__ import annotations

DASH = "–"


def number(value: float | None, digits: int = 4) -> str:
    """A plain number with ``digits`` significant digits and no exponent where it can be avoided."""
    if value is None:
        return DASH
    if value == 0 or 1e-4 <= abs(value) < 1e6:
        places = max(0, digits - 1 - _magnitude(value))
        text = f"{value:,.{places}f}"
        return text.rstrip("0").rstrip(".") if "." in text else text
    return f"{value:.{digits - 1}g}"


def _magnitude(value: float) -> int:
    return 0 if value == 0 else int(f"{value:e}".split("e")[1])


def milliseconds(value: float | None) -> str:
    """``0.412 ms``, ``85.3 ms``, ``1,204 ms``; below 0.01 ms in microseconds."""
    if value is None:
        return DASH
    if 0 < abs(value) < 0.01:
        return f"{value * 1e3:.2f} µs"
    return f"{value:,.{3 if abs(value) < 1 else 2 if abs(value) < 10 else 1 if abs(value) < 100 else 0}f} ms"


def size(value: float | None) -> str:
    """Bytes in units of 1024: ``312 KiB``."""
    if value is None:
        return DASH
    for unit, factor in (("MiB", 2**20), ("KiB", 2**10)):
        if abs(value) >= factor:
            return f"{value / factor:.3g} {unit}" if value < 1000 * factor else f"{value / factor:,.0f} {unit}"
    return f"{value:.0f} B"


def count(value: float | None) -> str:
    """``13.2 M``, ``254 k``."""
    if value is None:
        return DASH
    for unit, factor in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= factor:
            return f"{value / factor:.3g} {unit}" if value < 1000 * factor else f"{value / factor:,.0f} {unit}"
    return f"{value:.0f}"


def ratio(value: float | None, base: float | None) -> str:
    """``0.41×`` the base."""
    if value is None or not base:
        return DASH
    return f"{value / base:.2f}×"


def times(value: float | None, base: float | None, better: str, worse: str) -> str:
    """``2.4× faster``: how many times ``value`` is below ``base`` (or above it)."""
    if not value or not base:
        return DASH
    factor = base / value
    if 0.995 < factor < 1.005:
        return "unchanged"
    return f"{factor:.2g}× {better}" if factor >= 1 else f"{1 / factor:.2g}× {worse}"


def percent(value: float | None, digits: int = 1) -> str:
    """A fraction as per cent."""
    return DASH if value is None else f"{value * 100:.{digits}f} %"


class Quality:
    """How a metric is written: as per cent if it is an accuracy-like fraction, as a number otherwise."""

    def __init__(self, values: list[float], name: str) -> None:
        self.fraction = (
            bool(values) and all(0 <= v <= 1 for v in values) and any(w in name.lower() for w in ("accuracy", "agreement", "top-1"))
        )

    def text(self, value: float | None) -> str:
        """The value."""
        return percent(value, 2) if self.fraction else number(value)

    def change(self, value: float | None) -> str:
        """A difference, with its sign; of fractions in percentage points."""
        if value is None:
            return DASH
        sign = "+" if value > 0 else "−" if value < 0 else "±"
        return f"{sign}{abs(value) * 100:.2f} points" if self.fraction else f"{sign}{number(abs(value))}"
