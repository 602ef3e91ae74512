"""Nested structures of arrays, as the framework's users nest them."""

from collections.abc import Callable, Sequence
from typing import Any

import keras
from keras import tree


def flatten(structure: Any) -> tuple[list[Any], Callable[[Sequence[Any]], Any]]:
    """The arrays in a nested structure, and what puts others in their place.

    On JAX any pytree that is registered with it will do, a network of Flax for
    instance.

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
    return tree.flatten(structure), lambda new: tree.pack_sequence_as(structure, new)
