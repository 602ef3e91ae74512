"""The array framework behind the package: one module per Keras backend.

The rest of the package imports this room, never a module inside it. A backend
module defines the same handful of functions; see
`keras_curvature.backend.tensorflow` for their contracts.
"""

import keras

if keras.backend.backend() == "tensorflow":
    from keras_curvature.backend.tensorflow import (
        GradientProducts,
        array,
        compiled,
        current_trace,
        device_of,
        exact_second_derivatives,
        finite_difference_products,
        fold_seed,
        gradient,
        is_tensor,
        loop_over_range,
        map_over_range,
        num_replicas,
        num_traces,
        on_device,
        placed,
        random_normal,
        random_signs,
        sum_over_chunks,
        sum_over_range,
        values_of,
        with_constant_cotangent,
    )
    from keras_curvature.backend.tensorflow_graphs import (
        is_used,
        reaches,
        silent_errors,
    )
else:
    raise ImportError(
        "keras_curvature computes second derivatives with TensorFlow and needs "
        "Keras to run on it. "
        f"Received: keras.backend.backend()={keras.backend.backend()!r}. "
        "Set the environment variable KERAS_BACKEND=tensorflow (or "
        '"backend": "tensorflow" in ~/.keras/keras.json) before importing keras.'
    )

__all__ = [
    "GradientProducts",
    "array",
    "compiled",
    "current_trace",
    "device_of",
    "exact_second_derivatives",
    "finite_difference_products",
    "fold_seed",
    "gradient",
    "is_tensor",
    "is_used",
    "loop_over_range",
    "map_over_range",
    "num_traces",
    "num_replicas",
    "on_device",
    "placed",
    "random_normal",
    "random_signs",
    "reaches",
    "silent_errors",
    "sum_over_chunks",
    "sum_over_range",
    "values_of",
    "with_constant_cotangent",
]
