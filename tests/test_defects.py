"""Seventeen defects found inside admired code bases, and the tests that would catch each of them here."""

import ast
import functools
from pathlib import Path

import pytest

DEFECTS = {
    "the clip is inverted where the advantage is negative": [
        "test_cwrpo::test_clip_in_four_quadrants", "test_cwrpo::test_loss_and_gradient_equal_the_scalar_reference"],
    "the KL penalty is mean(new - ref), whose gradient regularises nothing": [
        "test_cwrpo::test_gradient_of_the_kl_term_points_back_to_the_reference"],
    "sampled at one temperature and scored at another": [
        "test_update::test_the_trainer_gives_sampled_tokens_the_probability_they_were_drawn_with",
        "test_cwrpo::test_token_logprobs_equal_those_from_full_logits",
        "test_train::test_truncated_sampling_is_said_to_bias_the_ratio"],
    "a test of weights that compares a tensor with itself; a norm that ignores its scale": [
        "test_qwen3::test_logits_equal_transformers", "test_policy::test_new_weights_never_meet_old_keys_and_values"],
    "padding is the end token, so that ending a turn is never trained": [
        "test_update::test_collate_pads_on_the_right_and_masks_by_position",
        "test_update::test_a_sampled_end_token_is_trained_and_feedback_is_not",
        "test_policy::test_a_sampled_end_token_is_kept_and_stops_the_turn"],
    "ids are cut out of a chat that was rendered anew": [
        "test_framing::test_rendering_history_anew_would_drop_what_was_thought_and_ours_only_appends",
        "test_framing::test_encoding_a_sample_again_would_give_other_ids",
        "test_rollout::test_every_request_continues_the_one_before_and_keeps_its_key"],
    "a missing log-probability counts as 0.0, which is probability 1": [
        "test_rollout::test_a_missing_logprob_is_an_error_and_never_zero",
        "test_cwrpo::test_a_missing_sampled_logprob_is_an_error"],
    "the mean of micro-batch means is called the token mean": [
        "test_update::test_micro_batches_order_and_padding_change_neither_step_nor_stats",
        "test_ranks::test_ranks_take_the_same_step_as_one_process_whatever_their_shares",
        "test_cwrpo::test_loss_and_stats_add_up_over_any_split_and_order"],
    "a remainder of samples is dropped by integer division": [
        "test_update::test_every_trajectory_is_in_exactly_one_micro_batch_within_the_budget",
        "test_rollout::test_as_many_trajectories_come_out_as_jobs_went_in_and_in_their_order"],
    "resuming draws one random number too few": [
        "test_train::test_a_killed_run_resumes_to_the_same_bits", "test_train::test_jobs_are_a_pure_function_of_seed_and_step"],
    "what is logged is not what was computed": [
        "test_update::test_what_is_logged_belongs_to_the_step_taken", "test_cwrpo::test_logged_means_are_what_they_are_called"],
    "checkpointing leaves LoRA on frozen embeddings without a gradient": [
        "test_lora::test_one_step_moves_every_b_and_nothing_frozen",
        "test_qwen3::test_gradient_checkpointing_changes_no_gradient_when_embeddings_are_frozen"],
    "a new adapter under an old name is served from an old cache": [
        "test_vllm_sampler::test_every_version_has_a_name_and_a_directory_of_its_own_and_the_last_one_goes",
        "test_vllm_sampler::test_a_refused_adapter_is_told_in_the_words_of_the_server_and_the_last_one_stays",
        "test_policy::test_new_weights_never_meet_old_keys_and_values"],
    "a maths grader dies off the main thread, and a broad except scores every answer 0": [
        "test_rewards::test_sixteen_threads_get_their_own_verdicts",
        "test_rewards::test_an_answer_that_takes_too_long_is_our_error_and_hurts_no_other",
        "test_house::test_no_exception_is_swallowed"],
    "a uniform group or a group of one gets nan or a huge advantage": [
        "test_cwrpo::test_a_uniform_or_singleton_group_gets_exactly_zero", "test_cwrpo::test_uniform_groups_are_named"],
    "a flag that nobody reads, a README command that names a missing file": [
        "test_train::test_every_flag_is_read", "test_train::test_readme_names_only_files_that_exist",
        "test_train::test_readme_commands_have_flags_that_exist"],
    "the logits of all positions exist at once": [
        "test_cwrpo::test_the_head_never_sees_more_than_a_chunk_nor_an_untrained_position",
        "test_qwen3::test_the_last_layer_works_only_where_states_are_wanted"],
}


@functools.cache
def functions_of(file: str) -> set[str]:
    tree = ast.parse((Path(__file__).parent / f"{file}.py").read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("defect", DEFECTS)
def test_every_defect_has_tests_that_exist(defect: str) -> None:
    assert DEFECTS[defect]
    for place in DEFECTS[defect]:
        file, _, test = place.partition("::")
        assert test in functions_of(file), place


def test_there_are_seventeen() -> None:
    assert len(DEFECTS) == 17
