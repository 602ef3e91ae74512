"""What `make test` leaves to `make test-all`: the same once more, on something else.

Where graphs are compiled they take nearly all of the time. Of a table of parameters
`make test` runs one row, in each test another one, so that each row of a table that
many tests share is run by some; of the named cases those of `CORE`, which share what is
compiled; and of the tests that take longest those that no other one stands for.
"""

import collections
import zlib

import cases

#: One of each kind; a table of cases has these rows.
CORE = {"batch_norm_training", "mlp_gelu", "tied_embedding"}

#: By file: tests that are left out.
TESTS = {
    "optimizers/test_layer_axes.py": [
        "test_finds_the_axes_of_a_loss",
    ],
    "backend/test_tensorflow.py": [
        "test_what_vectorizes_but_does_not_run_is_looped",
    ],
    "benchmarks/test_optimizers.py": [
        "test_comparison",
        "test_runs_depend_on_the_seed_alone",
        "test_soap_follows_the_axes",
    ],
    "callbacks/test_curvature_monitor.py": [
        "test_batch_normalization_is_probed_as_it_trains",
        "test_nothing_grows",
    ],
    "callbacks/test_monitor_data.py": [
        "test_class_weight",
        "test_fresh_batches",
        "test_model_without_a_loss_of_its_own",
    ],
    "callbacks/test_monitor_frameworks.py": [
        "test_frozen_between_two_fits",
        "test_model_parallel",
    ],
    "callbacks/test_monitor_hand_over.py": [
        "test_another_model",
        "test_compiled_anew",
        "test_inside_a_loss_scale_optimizer",
        "test_layers_frozen_and_thawed",
        "test_mirrored_strategy",
    ],
    "callbacks/test_monitor_resuming.py": [
        "test_several_fits_are_one",
    ],
    "callbacks/test_monitor_tensorboard.py": [
        "test_per_variable_and_without_histograms",
    ],
    "estimators/test_tall.py": [
        "test_memory",
    ],
    "layerwise/test_anywhere.py": [
        "test_a_layer_that_is_called_on_a_constant",
        "test_a_table_that_is_used_in_reverse",
        "test_batches_of_other_lengths_than_the_first",
    ],
    "layerwise/test_exact.py": [
        "test_chunks_and_data_sets_give_the_mean_over_batches",
        "test_refuses_what_takes_too_many_products",
        "test_sequences_of_varying_length",
        "test_several_plans_and_diagonals_of_one_operator",
        "test_variables_of_equal_path",
    ],
    "layerwise/test_gauss_newton.py": [
        "test_an_output_hessian_too_large_for_memory_is_refused",
        "test_data_sets_with_a_smaller_last_batch",
        "test_interacting_samples_are_refused",
        "test_layers_of_several_types",
        "test_little_memory_gives_the_same",
        "test_the_limit_of_passes_is_that_of_the_call",
    ],
    "layerwise/test_sampled.py": [
        "test_a_loss_that_mixes_outputs_with_something_else",
        "test_layers_that_are_used_after_the_outputs_of_the_model",
        "test_what_the_control_variate_does_to_the_noise_is_known_beforehand",
    ],
    "layerwise/test_split.py": [
        "test_layers_that_are_known_by_name",
        "test_methods",
        "test_the_estimate_tells_the_kind_of_the_rest",
    ],
    "layerwise/test_statistics.py": [
        "test_a_product_of_their_own_takes_noise_out",
        "test_each_batch_has_statistics_of_its_own",
        "test_groups_and_the_control_variate_are_unbiased",
        "test_hessian_diagonal_goes_by_layer_outputs",
        "test_standard_errors_are_calibrated",
        "test_statistics_that_do_not_move_change_nothing",
        "test_the_model_is_untouched",
        "test_the_parameter_basis_has_the_statistics_inside",
    ],
    "layerwise/test_structure.py": [
        "test_batches_of_a_data_set_get_signs_of_their_own",
        "test_batches_of_several_sizes",
        "test_no_growth_over_1000_probes",
        "test_the_model_is_untouched_after_an_error",
        "test_with_xla",
    ],
    "operators/test_hessian.py": [
        "test_class_weights_are_those_of_fit",
        "test_data_sets_are_weighted_by_size",
        "test_memory_stays_flat",
        "test_metrics_and_optimizer_are_left_alone",
        "test_scipy",
        "test_stateful_rnn",
        "test_tapes_alone_agree_except_for_moments",
        "test_xla_agrees_without_max_pooling",
    ],
    "operators/test_hessian_anywhere.py": [
        "test_chunks_equal_the_whole",
        "test_nothing_is_left_behind",
    ],
    "tensorboard/test_event_file.py": [
        "test_tensorflow_is_never_loaded",
    ],
    "tensorboard/test_page.py": [
        "test_a_link_shows_what_was_chosen",
        "test_a_pane_of_zeros_says_so",
        "test_custom_scalars_begin_with_the_trace",
        "test_eigenvalue_has_the_limit_of_plain_gradient_descent",
        "test_new_records_appear_when_tensorboard_reloads",
    ],
    "tensorboard/test_speed.py": [
        "test_long_runs_of_deep_models_open_and_draw_what_changes",
        "test_many_layers_fold_and_many_runs_have_short_names",
        "test_the_answers_that_open_the_page_come_at_once",
    ],
    "test_activations.py": [
        "test_batches_and_data_sets_give_what_one_batch_gives",
        "test_batches_of_other_lengths_than_the_first",
        "test_statistics_of_the_batch_move_along",
    ],
    "test_analysis.py": [
        "test_auto_samples_what_is_dear",
        "test_data_set",
        "test_finite_differences_give_the_figures",
    ],
    "test_architectures.py": [
        "test_a_gan_is_watched_by_the_loss_of_its_generator",
        "test_adapters_count_and_what_they_adapt_does_not",
        "test_products_are_differences_of_the_gradient",
    ],
    "test_diagonal_in_axes.py": [
        "test_the_short_way_is_the_long_way",
    ],
    "test_docs.py": [
        "test_the_notebook_runs",
    ],
    "test_examples.py": [
        "test_demo_prints_what_happened",
        "test_example_finds_what_it_says_and_draws_it",
    ],
    "test_package.py": [
        "test_keras_knows_the_optimizer_of_a_saved_model",
    ],
    "test_report.py": [
        "test_a_learning_rate_for_an_optimizer_that_divides",
        "test_random_figures_add_up",
    ],
    "test_spectrum.py": [
        "test_a_training_in_which_the_subspace_turns",
    ],
    "test_split_diagonal.py": [
        "test_it_is_never_worse_than_random_signs",
    ],
}


def left_out(nodeids):
    """Those of the tests, by the names that pytest gives them, that are left out."""
    tables, left = collections.defaultdict(list), set()
    for nodeid in nodeids:
        file, _, test = nodeid.partition("::")
        name = test.partition("[")[0]
        named = cases.named_in(test)
        if name in TESTS.get(file.removeprefix("tests/"), ()):
            left.add(nodeid)
        elif not named:
            tables[file, name].append(nodeid)
        elif not CORE.issuperset(named):
            left.add(nodeid)
    for (_, name), rows in tables.items():
        row = zlib.crc32(name.encode()) % len(rows)
        left.update(rows[:row] + rows[row + 1 :])
    return left
