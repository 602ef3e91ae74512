"""The array framework behind the package: the one that Keras runs on.

The rest of the package imports this room, never a module inside it. `contract` says
what each name means.
"""

from typing import TYPE_CHECKING

import keras

from keras_curvature.backend.contract import (
    Caveat,
    Direction,
    Findings,
    NotTwiceDifferentiable,
    Outline,
    Recording,
    Shape,
    Tensor,
)
from keras_curvature.backend.nested import flatten

_NAME = keras.backend.backend()

# The signatures are the same; type checkers read them here.
if TYPE_CHECKING or _NAME == "tensorflow":
    from keras_curvature.backend import tensorflow as _backend
elif _NAME == "jax":
    from keras_curvature.backend import jax as _backend
elif _NAME == "torch":
    from keras_curvature.backend import torch as _backend
else:
    raise ImportError(
        "keras_curvature computes second derivatives with TensorFlow, JAX or PyTorch. "
        f"Received: keras.backend.backend()={_NAME!r}. Set the environment variable "
        "KERAS_BACKEND to one of tensorflow, jax and torch before importing keras."
    )

KEEPS_RECORDINGS = _backend.KEEPS_RECORDINGS
PRODUCTS_PER_PASS = _backend.PRODUCTS_PER_PASS
RECOMPUTES = _backend.RECOMPUTES
RUNS_UNCOMPILED = _backend.RUNS_UNCOMPILED
array = _backend.array
block_numbers = _backend.block_numbers
by_entries = _backend.by_entries
compiled = _backend.compiled
computed_bytes = _backend.computed_bytes
current_trace = _backend.current_trace
examine = _backend.examine
fold_in = _backend.fold_in
free_memory = _backend.free_memory
function_of_variables = _backend.function_of_variables
gradient = _backend.gradient
hold_cotangent = _backend.hold_cotangent
is_out_of_memory = _backend.is_out_of_memory
is_tensor = _backend.is_tensor
loop_range = _backend.loop_range
map_range = _backend.map_range
normal = _backend.normal
num_replicas = _backend.num_replicas
num_traces = _backend.num_traces
on = _backend.on
on_variables = _backend.on_variables
outline = _backend.outline
over_blocks = _backend.over_blocks
parts = _backend.parts
place_of = _backend.place_of
placed = _backend.placed
process = _backend.process
random_state_at_rest = _backend.random_state_at_rest
reading = _backend.reading
record = _backend.record
run_once = _backend.run_once
signs = _backend.signs
sum_chunks = _backend.sum_chunks
sum_over_processes = _backend.sum_over_processes
sum_range = _backend.sum_range
twice_differentiable = _backend.twice_differentiable
values = _backend.values
wide_float = _backend.wide_float

__all__ = [
    "KEEPS_RECORDINGS",
    "PRODUCTS_PER_PASS",
    "RECOMPUTES",
    "RUNS_UNCOMPILED",
    "Caveat",
    "Direction",
    "Findings",
    "NotTwiceDifferentiable",
    "Outline",
    "Recording",
    "Shape",
    "Tensor",
    "array",
    "block_numbers",
    "by_entries",
    "compiled",
    "computed_bytes",
    "current_trace",
    "examine",
    "flatten",
    "fold_in",
    "free_memory",
    "function_of_variables",
    "gradient",
    "hold_cotangent",
    "is_out_of_memory",
    "is_tensor",
    "loop_range",
    "map_range",
    "normal",
    "num_replicas",
    "num_traces",
    "on",
    "on_variables",
    "outline",
    "over_blocks",
    "parts",
    "place_of",
    "placed",
    "process",
    "random_state_at_rest",
    "reading",
    "record",
    "run_once",
    "signs",
    "sum_chunks",
    "sum_over_processes",
    "sum_range",
    "twice_differentiable",
    "values",
    "wide_float",
]
