"""Writes docs/api.md, the reference of all public names, from their docstrings.

`make api` runs this. A test tells what is missing or stale.
"""

import inspect
import pathlib
import re

import keras_curvature as kc
from keras_curvature import estimators, plots
from keras_curvature.learning_rate import LearningRate

PAGE = pathlib.Path(__file__).with_name("api.md")

#: Every public name in its place; what is returned to users belongs to them as well.
SECTIONS = {
    "Watch a training": [kc.CurvatureMonitor],
    "Ask once": [
        kc.hessian_diagonal,
        kc.activation_curvature,
        kc.hessian_trace,
        kc.hessian_frobenius_norm,
        kc.hessian_eigenvalues,
        kc.hessian_spectral_density,
        kc.hessian_matrix,
        kc.curvature_summary,
        kc.suggest_learning_rate,
        kc.critical_sharpness,
    ],
    "What is returned": [
        kc.Estimate,
        estimators.Eigenvalues,
        estimators.SpectralDensity,
        LearningRate,
    ],
    "The operator": [kc.HessianOperator],
    "Step with it": [kc.DiagonalNewton, kc.CurvatureFeed],
    "Pictures": [plots.plot_history, plots.plot_diagonal, plots.plot_spectral_density],
    "Layers of your own": [kc.LayerRule, kc.register_layer_rule],
}

HEAD = """# API reference

Written by `make api` from the docstrings. The [guide](guide.md) tells which number
answers which question. `kc` is `keras_curvature`; `plots` is `keras_curvature.plots`.
"""

_LISTS = ("Args", "Attributes", "Raises")
_HEADING = re.compile(r"^(Args|Attributes|Returns|Raises|Yields):$")
_MODULES = re.compile(r"\bkeras_curvature\.[\w.]*\.(?=\w)")
_ENTRY = re.compile(r"^ {4}(\*{0,2}[\w, *]+): (.*)$")


def members(cls):
    """Public methods and properties that are the package's own, in their order."""
    for name, member in vars(cls).items():
        if name.startswith("_") or name in getattr(cls, "__dataclass_fields__", {}):
            continue
        # Keras says what it calls, and when.
        inherited = [base for base in cls.__mro__[1:] if name in vars(base)]
        if not inherited:
            yield name, member


def unwrapped(member):
    """The function that holds a member's docstring."""
    for attribute in ("fget", "func", "__func__"):
        member = getattr(member, attribute, member)
    return member


def signature(name, thing):
    """A call with all arguments, one in each line where they are many."""
    described = inspect.signature(thing)
    parameters = [p for p in described.parameters.values() if p.name != "self"]
    if parameters and parameters[0].name == "cls":
        del parameters[0]
    line = f"{name}{described.replace(parameters=parameters)}"
    if len(line) <= 88:
        return _MODULES.sub("", line)
    parts, starred = [], False
    for parameter in parameters:
        if parameter.kind is parameter.VAR_POSITIONAL:
            starred = True
        if parameter.kind is parameter.KEYWORD_ONLY and not starred:
            parts.append("*")
            starred = True
        parts.append(str(parameter))
    arrow = described.return_annotation
    end = "" if arrow is described.empty else f" -> {inspect.formatannotation(arrow)}"
    lines = [f"{name}(", *(f"    {part}," for part in parts), f"){end}"]
    return _MODULES.sub("", "\n".join(lines))


def markdown(doc):
    """A Google-style docstring in Markdown: its lists become lists."""
    lines, section = [], None
    for line in inspect.cleandoc(doc).splitlines():
        heading = _HEADING.match(line)
        if heading:
            section = heading[1]
            lines += [f"**{section}**", ""]
        elif line and not line.startswith(" "):
            section = None
            lines.append(line)
        elif section in _LISTS and (entry := _ENTRY.match(line)):
            lines.append(f"- `{entry[1]}`: {entry[2]}")
        elif section in _LISTS and line:
            lines.append(f"  {line.strip()}")
        else:
            lines.append(line.removeprefix("    ") if section else line)
    return "\n".join(lines)


def documented(doc):
    """The names in the lists of arguments and attributes of a docstring."""
    names, section = set(), None
    for line in inspect.cleandoc(doc or "").splitlines():
        heading = _HEADING.match(line)
        if heading:
            section = heading[1]
        elif section in ("Args", "Attributes") and (entry := _ENTRY.match(line)):
            names |= {name.strip(" *") for name in entry[1].split(",")}
    return names


def missing():
    """What has no docstring, or is in none: a list of sentences."""
    things = [thing for section in SECTIONS.values() for thing in section]
    found = [
        f"{name} is in no section of docs/api.py."
        for name in kc.__all__
        if getattr(kc, name) not in things
    ]
    for thing in things:
        parts = [(thing.__name__, thing)]
        if inspect.isclass(thing):
            own = [(n, unwrapped(m)) for n, m in members(thing)]
            parts += [(f"{thing.__name__}.{n}", m) for n, m in own if callable(m)]
        for name, part in parts:
            # A dataclass makes itself a docstring where it has none.
            doc = part.__doc__ or ""
            if not doc or doc.startswith(f"{name}("):
                found.append(f"{name} has no docstring.")
            arguments = set(inspect.signature(part).parameters) - {"self", "cls"}
            if len(arguments) == 1 and "." in name:
                continue  # A method's first sentence says what it is given.
            found += [
                f"{name} does not say what `{argument}` is."
                for argument in sorted(arguments - documented(doc))
            ]
    return found


def page():
    """The whole reference as Markdown."""
    text = [HEAD]
    for title, things in SECTIONS.items():
        text.append(f"## {title}\n")
        for thing in things:
            prefix = "plots." if thing.__module__ == plots.__name__ else ""
            prefix = "kc." if thing.__name__ in kc.__all__ else prefix
            text += entry(f"{prefix}{thing.__name__}", thing, "###")
            if inspect.isclass(thing):
                for name, member in members(thing):
                    if callable(unwrapped(member)):
                        text += entry(f"{thing.__name__}.{name}", member, "####")
    return re.sub(r"\n{3,}", "\n\n", "\n".join(text)).rstrip() + "\n"


def entry(name, member, level):
    """Heading, signature and docstring of one name."""
    thing = unwrapped(member)
    code = []
    if callable(member) or isinstance(member, (classmethod, staticmethod)):
        code = ["```python", signature(name, thing), "```", ""]
    return [f"{level} `{name}`", "", *code, markdown(thing.__doc__ or ""), ""]


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
