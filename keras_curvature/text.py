"""Numbers as text, in one short notation wherever the package prints some."""


def number(value: float, digits: int = 3) -> str:
    """A number of a few significant digits: `0.0123`, `12.3`, `1.23e-4`, `1.23e4`.

    Args:
        value: the number.
        digits: how many of them are shown.
    """
    if not value:
        return "0"
    rounded = f"{value:.{digits - 1}e}"
    mantissa, _, exponent = rounded.partition("e")
    if not exponent:
        return rounded  # Infinite, or not a number.
    if -4 < int(exponent) < 4:
        return f"{float(rounded):.{max(digits - 1 - int(exponent), 0)}f}"
    return f"{mantissa}e{int(exponent)}"


def with_error(value: float | None, error: float | None) -> str:
    """`1.23 ± 0.05`: three digits, and one of the error where there is one."""
    if value is None:
        return "not known"
    return number(value) + (f" ± {number(error, 1)}" if error else "")


def percent(share: float) -> str:
    """A share in whole percents, and never `-0%`."""
    text = f"{share:.0%}"
    return "0%" if text == "-0%" else text
