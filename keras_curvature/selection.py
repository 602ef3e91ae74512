"""Which variables users mean: by a pattern of names, by layer, or by themselves."""

import difflib
import fnmatch
from collections.abc import Iterable, Iterator
from typing import Any

import keras


def selected(model: Any, variables: Any) -> list[Any]:
    """The variables of a model that a selection stands for, each once.

    Args:
        model: a Keras model that has been built.
        variables: `None` for all trainable variables; a pattern, a layer or a variable;
            or a list of them. A pattern in the manner of file names (`*`, `?`, `[abc]`)
            stands for the trainable variables whose paths it matches, with the model's
            name in front or without; a layer stands for its trainable variables.

    Returns:
        A list of Keras variables, in the order of the selection.

    Raises:
        ValueError: for a pattern that matches nothing, a layer without trainable
            variables, or what is none of the three.
    """
    if variables is None:
        return list(model.trainable_variables)
    found: dict[int, Any] = {}
    for one in _as_list(variables):
        found.update((id(v), v) for v in _meant(model, one))
    return list(found.values())


def given_themselves(variables: Any) -> list[Any]:
    """The variables in a selection that need no model to be found."""
    if variables is None:
        return []
    return [v for v in _as_list(variables) if isinstance(v, keras.Variable)]


def _as_list(variables: Any) -> list[Any]:
    single = isinstance(variables, (str, keras.Variable, keras.layers.Layer))
    if single or not isinstance(variables, Iterable):
        return [variables]
    return list(variables)


def _meant(model: Any, one: Any) -> list[Any]:
    if isinstance(one, keras.Variable):
        return [one]
    if isinstance(one, keras.layers.Layer):
        if not one.trainable_variables:
            raise ValueError(
                "There is nothing to differentiate by in one of `variables`: the layer "
                "has no trainable variables. Received: the layer "
                f"{one.name!r}, {'frozen' if one.weights else 'without weights'}."
            )
        return list(one.trainable_variables)
    if not isinstance(one, str):
        raise ValueError(
            "`variables` must be Keras variables of the model, such as "
            "`model.layers[0].trainable_variables`, layers, or patterns of their "
            f'paths, such as "*/attention/*". Received: an element of type '
            f"{type(one).__name__}."
        )
    found = [v for v in model.trainable_variables if _matches(model, v, one)]
    if not found:
        raise ValueError(_nothing(model, one))
    return found


def _matches(model: Any, variable: Any, pattern: str) -> bool:
    return any(fnmatch.fnmatchcase(p, pattern) for p in _paths(model, variable))


def _paths(model: Any, variable: Any) -> tuple[str, str]:
    """The path of a variable, without the model's name in front and with it.

    Keras writes it there in models that were built late only.
    """
    path = variable.path.removeprefix(f"{model.name}/")
    return path, f"{model.name}/{path}"


def _nothing(model: Any, pattern: str) -> str:
    """That a pattern matches nothing, and what might have been meant."""
    if any(_matches(model, v, pattern) for v in model.variables):
        return (
            "A pattern in `variables` stands for trainable variables, and matches only "
            f"others. Received: {pattern!r} for the model {model.name!r}. Pass frozen "
            "variables themselves."
        )
    paths = [_paths(model, v)[0] for v in model.trainable_variables]
    near = list(dict.fromkeys(_nearest(pattern, paths)))
    return (
        "A pattern in `variables` matches the path of no trainable variable. Received: "
        f"{pattern!r} for the model {model.name!r}. The nearest are "
        f"{', '.join(map(repr, near))}."
        if near
        else f"The model {model.name!r} has no trainable variables that a pattern "
        f"could match. Received: {pattern!r} in `variables`."
    )


def _nearest(pattern: str, paths: list[str]) -> Iterator[str]:
    """Patterns of layers and paths of variables that look like what was received."""
    plain = pattern.strip("*").strip("/")
    patterns = [f"{path.rpartition('/')[0] or path}/*" for path in paths]
    # What has the word in it, whatever else; then what is spelled alike.
    yield from [path for path in patterns if plain and plain in path][:3]
    yield from difflib.get_close_matches(plain, [*patterns, *paths], 3, cutoff=0.0)
