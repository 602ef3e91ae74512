"""What `make test` leaves to `make test-all`: the same on further networks.

PyTorch compiles nothing: it runs every test in `make test` too. On TensorFlow and JAX
graphs take nearly all of the time, and these tests make the most of them.
"""

import cases
import keras

#: One of each kind; a table of cases has these rows.
CORE = {
    "add_loss",
    "batch_norm_training",
    "cnn_depthwise",
    "dropout_training",
    "embedding_mask",
    "gru_unrolled",
    "mlp_gelu",
    "mlp_relu",
    "penalties",
    "subclassed",
    "tied_embedding",
    "two_outputs",
}

#: By file: tests with all their parameters, or with the ones that follow.
TESTS = {
    "benchmarks/test_optimizers.py": [
        "test_comparison",
        "test_runs_depend_on_the_seed_alone",
        "test_soap_follows_the_axes",
    ],
    "estimators/test_tall.py": ["test_memory"],
    "layerwise/test_anywhere.py": [
        "test_a_table_that_is_used_in_reverse[True]",
        "test_batches_of_other_lengths_than_the_first",
    ],
    "layerwise/test_gauss_newton.py": [
        "test_equals_the_dense_matrix[sequence]",
        "test_equals_the_dense_matrix[uncovered]",
    ],
    "layerwise/test_recording.py": [
        "test_structures[chained]",
        "test_structures[nested]",
        "test_structures[parallel]",
        "test_structures[prelu]",
        "test_structures[spectral]",
        "test_structures[tied]",
    ],
    "layerwise/test_sampled.py": [
        "test_what_the_control_variate_does_to_the_noise_is_known_beforehand",
    ],
    "layerwise/test_split.py": ["test_methods"],
    "layerwise/test_statistics.py": [
        "test_all_parts_together_are_the_diagonal[channels_first]",
        "test_all_parts_together_are_the_diagonal[masked]",
        "test_all_parts_together_are_the_diagonal[residual]",
        "test_all_parts_together_are_the_diagonal[uncovered]",
        "test_each_batch_has_statistics_of_its_own",
        "test_samples_are_unbiased[channels_first]",
        "test_samples_are_unbiased[masked]",
        "test_samples_are_unbiased[residual]",
        "test_samples_are_unbiased[uncovered]",
    ],
    "layerwise/test_structure.py": ["test_with_xla"],
    "operators/test_hessian.py": ["test_memory_stays_flat"],
    "operators/test_hessian_anywhere.py": ["test_nothing_is_left_behind"],
    "tensorboard/test_event_file.py": ["test_tensorflow_is_never_loaded"],
    "tensorboard/test_server.py": [
        "test_scalars_have_the_tags_and_values_that_were_written[slow]"
    ],
    "tensorboard/test_plugin.py": ["test_the_tab_is_active[slow]"],
    "tensorboard/test_speed.py": [
        "test_long_runs_of_deep_models_open_and_draw_what_changes",
        "test_many_layers_fold_and_many_runs_have_short_names",
        "test_the_answers_that_open_the_page_come_at_once",
    ],
    "test_activations.py": [
        "test_exact_diagonals_are_those_of_variables_in_the_outputs_place[transformer]",
        "test_sampled_diagonals_are_unbiased_and_know_their_errors[transformer]",
    ],
    "test_architectures.py": ["test_products_are_differences_of_the_gradient"],
    "test_diagonal_in_axes.py": [
        "test_against_the_dense_hessian[attention-both]",
        "test_against_the_dense_hessian[attention-right]",
        "test_against_the_dense_hessian[normalized-both]",
        "test_against_the_dense_hessian[normalized-right]",
    ],
    "test_docs.py": ["test_the_notebook_runs"],
    "test_examples.py": ["test_example_finds_what_it_says_and_draws_it"],
    "test_spectrum.py": [
        "test_whole_data_sets[diagonal-py_dataset]",
        "test_whole_data_sets[summary-py_dataset]",
    ],
    "test_split_diagonal.py": ["test_it_is_never_worse_than_random_signs"],
}


def is_thorough(nodeid):
    """Whether `make test` leaves out a test, by the name that pytest gives it."""
    if keras.backend.backend() == "torch":
        return False
    file, _, test = nodeid.partition("::")
    listed = TESTS.get(file.removeprefix("tests/"), ())
    return (
        not CORE.issuperset(cases.named_in(test))
        or test in listed
        or test.partition("[")[0] in listed
    )
