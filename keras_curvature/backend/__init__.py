"""The array framework behind the package.

The rest of the package imports this room, never a module inside it. Each Keras
backend defines the same handful of functions; see the modules `tensorflow` and
`tensorflow_*` for their contracts.
"""

import keras

if keras.backend.backend() == "tensorflow":
    from keras_curvature.backend.tensorflow import (
        array,
        compiled,
        current_trace,
        device_of,
        fold_seed,
        is_tensor,
        num_replicas,
        num_traces,
        on_device,
        placed,
        random_normal,
        random_signs,
        random_signs_like,
        values_of,
    )
    from keras_curvature.backend.tensorflow_graphs import (
        is_used,
        reaches,
        silent_errors,
    )
    from keras_curvature.backend.tensorflow_loops import (
        loop_over_range,
        map_over_range,
        sum_over_chunks,
        sum_over_range,
    )
    from keras_curvature.backend.tensorflow_tapes import (
        GradientProducts,
        exact_second_derivatives,
        finite_difference_products,
        gradient,
        with_constant_cotangent,
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
    "random_signs_like",
    "reaches",
    "silent_errors",
    "sum_over_chunks",
    "sum_over_range",
    "values_of",
    "with_constant_cotangent",
]
