"""Format quantities briefly, and in the same way in the terminal and on the page.

A no-break space joins a number and its unit, so that no line ends between them.
"""

import math

NO_BREAK = "\N{NO-BREAK SPACE}"
ABSENT = "–"  # shown instead of a quantity that does not exist

_MINUTE, _HOUR = 60, 3600


def loss(value: float) -> str:
    """Format nats per token.

    >>> loss(4.12345)
    '4.123'
    """
    return f"{value:.3f}"


def percent(fraction: float) -> str:
    r"""Format a fraction in whole percent, and in tenths of a percent below ten.

    >>> percent(0.8149), percent(0.0312), percent(1.0)
    ('81\xa0%', '3.1\xa0%', '100\xa0%')
    """
    value = 100 * fraction
    return _joined(f"{value:.1f}" if 0 < value < 9.95 else f"{value:.0f}", "%")


def ratio(value: float) -> str:
    """Format a ratio.

    >>> ratio(1.2345)
    '1.23×'
    """
    return f"{value:.2f}×"


def count(value: float) -> str:
    """Format a number of tokens or steps with three digits.

    >>> count(412), count(1_638_400), count(13_107_200_000)
    ('412', '1.64M', '13.1B')
    """
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 0.9995 * size:
            return _three_digits(value / size) + unit
    return f"{value:.0f}"


def duration(seconds: float) -> str:
    r"""Format a time.

    >>> duration(0.25), duration(84.2), duration(724)
    ('0.250\xa0s', '84.2\xa0s', '12\xa0min\xa004\xa0s')
    """
    if seconds < 2 * _MINUTE:
        return _joined(_three_digits(seconds), "s")
    if seconds < 2 * _HOUR:
        minutes, rest = divmod(round(seconds), _MINUTE)
        return _joined(minutes, "min", f"{rest:02d}", "s")
    hours, rest = divmod(round(seconds / _MINUTE), 60)
    return _joined(hours, "h", f"{rest:02d}", "min")


def size(count_bytes: float) -> str:
    r"""Format bytes in binary units.

    >>> size(0), size(900), size(5_242_880)
    ('0\xa0B', '900\xa0B', '5.00\xa0MiB')
    """
    value = float(count_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1000:
            return _joined(f"{value:.0f}" if unit == "B" else _three_digits(value), unit)
        value /= 1024
    return _joined(_three_digits(value), "TiB")


def _joined(*words: object) -> str:
    return NO_BREAK.join(map(str, words))


def _three_digits(value: float) -> str:
    if value == 0 or not math.isfinite(value):
        return f"{value:.0f}"
    digits = 2 - math.floor(math.log10(abs(float(f"{value:.3g}"))))
    return f"{value:.{min(max(digits, 0), 3)}f}"
