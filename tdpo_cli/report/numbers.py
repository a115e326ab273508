"""Numbers for a reader: axis ticks, sensible digits, missing values."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise

MINUS = "\N{MINUS SIGN}"
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def finite(value: object) -> float | None:
    """The number, or None for null, NaN, infinity and whatever is not a number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return value if math.isfinite(value) else None


def known(values: Iterable[float | None]) -> list[float]:
    """Those that are not missing."""
    return [value for value in values if value is not None]


def ticks(low: float, high: float, count: int = 5, whole: bool = False) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten in [low, high], low < high: at least two, at most `count` + 1 for a `count` of 5 or more.

    `whole` asks for integers, of which there may be none.
    """
    step = _step((high - low) / max(count, 5))  # at most 2.5 times what is asked for: two steps always fit
    if whole:
        step = max(1.0, step)
    # a hair of tolerance: 0.3 / 0.1 is 2.9999...
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [_clean(i * step, step) for i in range(first, last + 1)]


def tick_labels(values: Sequence[float], percent: bool = False) -> tuple[list[str], str]:
    """Labels with the decimals that the step needs, and a common factor such as ×10⁻⁴, or nothing, to stand above the axis."""
    if percent:
        values = [100 * value for value in values]
    largest = max((abs(value) for value in values), default=0.0)
    exponent = 0
    if largest and not percent and not 1e-3 <= largest < 1e5:
        exponent = math.floor(math.log10(largest) + 1e-9)
    scaled = [value / 10.0**exponent for value in values]
    step = min((b - a for a, b in pairwise(scaled)), default=1.0)
    decimals = max(0, -math.floor(math.log10(step) + 1e-9)) if step > 0 else 0
    labels = [_minus(f"{value:.{decimals}f}") + ("%" if percent else "") for value in scaled]
    return labels, f"×10{str(exponent).translate(_SUPERSCRIPT)}" if exponent else ""


def short(value: float | None, digits: int = 3) -> str:
    """0.512, 1,234, 1.3×10⁻⁵, or a dash for none."""
    if value is None:
        return "–"
    if value == 0:
        return "0"
    exponent = math.floor(math.log10(abs(value)))
    if exponent < -3 or exponent >= 6:
        mantissa, _, power = f"{value:.{digits - 1}e}".partition("e")
        return _minus(f"{mantissa}×10{str(int(power)).translate(_SUPERSCRIPT)}")
    return _minus(f"{value:,.{max(0, digits - 1 - exponent)}f}")


def signed(value: float | None, decimals: int = 2) -> str:
    """+1.20, −0.31, 0.00, or a dash for none."""
    if value is None:
        return "–"
    text = f"{value:+.{decimals}f}"
    return _minus(text) if text.strip("+-0.") else text[1:]


def signed_sd(value: float | None) -> str:
    return "–" if value is None else f"{signed(value)} sd"


def change(value: float | None, digits: int = 3) -> str:
    """As `short`, with a plus sign where something rose."""
    return ("+" if value is not None and value > 0 else "") + short(value, digits)


def share(value: float | None, decimals: int = 0) -> str:
    """0.83 -> 83%, or a dash for none."""
    return "–" if value is None else _minus(f"{100 * value:.{decimals}f}%")


def spread(values: Sequence[int], count: int) -> list[int]:
    """At most `count` of the values, evenly, the first and the last among them."""
    if count >= len(values):
        return list(values)
    if count <= 1:
        return list(values[-1:])[:count]
    return [values[round(i * (len(values) - 1) / (count - 1))] for i in range(count)]


def _step(rough: float) -> float:
    power = 10.0 ** math.floor(math.log10(rough))
    return next(factor * power for factor in (1, 2, 5, 10) if rough <= factor * power * (1 + 1e-9))


def _clean(value: float, step: float) -> float:
    """0.30000000000000004 -> 0.3"""
    return round(value, max(0, 2 - math.floor(math.log10(step)))) + 0.0


def _minus(text: str) -> str:
    return text.replace("-", MINUS)
