"""Nested structures of arrays, as the framework's users nest them."""

from collections.abc import Callable, Sequence
from typing import Any

import keras


def flatten(structure: Any) -> tuple[list[Any], Callable[[Sequence[Any]], Any]]:
    """The arrays in a nested structure, and what puts others in their place.

    Entries of dictionaries come in the order of their names, however deep they are, so
    that all frameworks agree. On JAX any pytree that is registered with it will do, a
    network of Flax for instance.

    Args:
        structure: nested lists, tuples and dictionaries.

    Returns:
        The list of arrays, and a function from such a list to a structure like the
        one given.
    """
    if keras.backend.backend() == "jax":
        import jax

        leaves, treedef = jax.tree_util.tree_flatten(structure)
        return leaves, lambda new: jax.tree_util.tree_unflatten(treedef, new)
    # Keras' own trees take `None` for an array, and on PyTorch order only the outermost
    # dictionary.
    import optree

    found, spec = optree.tree_flatten(structure)
    return list(found), lambda new: optree.tree_unflatten(spec, new)
