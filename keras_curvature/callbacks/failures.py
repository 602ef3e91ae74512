"""Errors that must not end a training: told once, in words that help."""

import contextlib
import re
import warnings


class Failures:
    """Turns errors into warnings, one for each reason.

    Args:
        on_error: `"warn"`, or `"raise"` to let errors through.
    """

    def __init__(self, on_error):
        self._on_error = on_error
        self._told = set()

    @contextlib.contextmanager
    def survived(self, what):
        """A context whose errors become warnings.

        Args:
            what: function without arguments that returns what was attempted.
        """
        try:
            yield
        except Exception as error:
            if self._on_error == "raise":
                raise
            self.tell(
                f"{what()} failed and training goes on without it "
                f'({type(error).__name__}: {reason(error)}). Pass on_error="raise" to '
                "stop instead.",
                type(error).__name__ + reason(error),
            )

    def tell(self, message, about):
        """Warns, unless it did `about` the same before.

        Args:
            message: the warning.
            about: what makes two warnings the same, apart from numbers in it.
        """
        # Steps, sizes and addresses differ from probe to probe.
        about = re.sub(r"0x\w+|\d+", "", about)
        if about not in self._told:
            self._told.add(about)
            warnings.warn(message, stacklevel=3)


def reason(error):
    """What an error says, in one line: no colours, no traces of graphs."""
    text = re.sub(r"\x1b\[\d*m", "", str(getattr(error, "message", error)))
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if lines and lines[0].startswith("Graph execution error"):
        told = [
            line
            for line in lines[1:]
            if not line.startswith(("Detected at", "File ", "<stack"))
        ]
        lines = told or lines
    return " ".join(lines)[:2000]


def about_data(error):
    """Whether the data that a function was given is the likely reason."""
    # TensorFlow's error for a label out of range, among others.
    return (
        isinstance(error, (TypeError, ValueError))
        or type(error).__name__ == "InvalidArgumentError"
    )
