"""docs/faults.md: each fault, the behaviour that is expected, and the outcome of the tests that cause the fault.

python -m scripts.pages.faults                 runs the tests and writes the page
python -m scripts.pages.faults --junit FILE    writes it from a run of all tests: pytest -n auto --junitxml=FILE
python -m scripts.pages.faults --check         exits 1 if the table names a test that does not exist
"""

import argparse
import platform
import re
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from data_gen.base.cli import run_for_reader

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "faults.md"
F, C, S, T, R, W, D, N, K = (
    "project/test_faults.py",
    "engine/output/test_checkpoint.py",
    "engine/output/test_saver.py",
    "engine/output/test_tensor_rows.py",
    "engine/data/test_rows.py",
    "engine/formats/test_source_faults.py",
    "engine/distributed/test_ranks.py",
    "project/test_not_finite.py",
    "engine/data/test_row_kinds.py",
)
G, A = "data_gen/test_generate.py", "engine/data/test_dataset.py"
V, B, L = "engine/serving/test_server.py", "engine/comparing/test_vote_file.py", "engine/comparing/test_endpoints.py"
RUNS, FOLDER = "engine/training/test_adapter_runs.py", "engine/formats/test_adapters.py"
FAULTS = [  # fault, expected, tests
    ("kill -9 at each write point of a save", "the newest whole state resumes; temporaries go", [
        (C, "test_kill_at_every_write_point_leaves_a_whole_state"),
        (S, "test_a_kill_of_any_writer_at_any_point_leaves_a_whole_state"),
        (D, "test_a_rank_that_is_killed_ends_the_run_which_resumes")]),
    ("kill -9 in a step", "weights and losses bit-equal to an unbroken run; of ranks within 1e-5", [
        (F, "test_kill_9_then_resume_is_bit_equal"), (F, "test_kill_9_at_random_moments_then_resume_is_bit_equal"),
        (D, "test_a_rank_that_is_killed_ends_the_run_which_resumes")]),
    ("kill -9 in rotation", "at least one whole state", [(F, "test_kill_9_then_resume_is_bit_equal")]),
    ("SIGTERM, SIGINT or SIGHUP in a step, evaluation, preparation, save", "ranks agree, save once, exit 143", [
        (F, "test_a_signal_saves_once_and_exits_143_and_the_run_goes_on_bit_equal"),
        (F, "test_a_signal_while_data_is_prepared_exits_143_at_once"),
        (F, "test_a_closed_terminal_saves_and_the_run_goes_on_bit_equal"),
        (D, "test_sigterm_to_torchrun_saves_once_and_resumes")]),
    ("a second signal", "exit at once, the old state whole", [
        (F, "test_a_second_signal_leaves_at_once_with_the_old_state_whole")]),
    ("disk full in a save", "the old state kept, the temporary gone, a warning; at the last save exit 1", [
        (F, "test_a_full_disk_costs_a_save_not_the_run"),
        (F, "test_a_full_disk_at_the_last_save_exits_1_with_the_state_intact"),
        (S, "test_one_writers_full_disk_fails_the_save_of_all")]),
    ("too little disk at the start", "refused, needed and free bytes named", [
        (F, "test_too_little_disk_is_said_before_the_first_step")]),
    ("--out unwritable, or holds something else", "exit 2 before the model loads", [
        (F, "test_a_folder_that_holds_something_else_is_left_alone"),
        (F, "test_a_folder_that_cannot_be_written_is_refused_before_the_model_loads")]),
    ("two runs, one --out", "the second exits 2", [(F, "test_two_runs_cannot_share_a_folder")]),
    ("a truncated or bit-flipped state", "named; falls back, or exit 3 where it was chosen", [
        (F, "test_a_broken_newest_state_falls_back"), (C, "test_each_file_of_several_is_verified")]),
    ("safetensors with a huge header, overlapping offsets", "a clean error, bounded memory", [
        (W, "test_truncated_shards_and_bad_headers"), (W, "test_a_header_that_claims_a_real_gigabyte")]),
    ("wrong shapes, vocabulary unlike the tokenizer's", "all mismatches listed before allocation", [
        (W, "test_every_mismatch_at_once"),
        (F, "test_a_tokenizer_of_another_model_is_refused_before_anything_is_allocated")]),
    ("missing shard or key, extra key", "exit 3 listing all", [
        (W, "test_missing_shard_and_what_else_is_wrong"), (W, "test_every_mismatch_at_once")]),
    ("an index with ../x, an absolute path, a link out", "rejected", [
        (W, "test_index_with_paths"), (W, "test_links_that_lead_out")]),
    ("a malicious .pth", "refused, its payload never runs", [(W, "test_malicious_pth")]),
    ("a missing Meta shard, bad params.json", "exit 3", [(W, "test_meta_shards_and_params")]),
    ("another number of ranks on resume", "resharded, the same order of rows; indivisible: exit 2 with valid counts", [
        (D, "test_two_ranks_then_one_then_four_are_one_run"), (D, "test_what_ranks_cannot_do_is_told"),
        (T, "test_any_number_of_readers_finds_what_any_number_wrote")]),
    ("settings or data changed on resume", "refused unless --allow-changed", [
        (F, "test_changed_settings_and_data_are_refused_unless_allowed")]),
    ("a rank raises, dies, stalls", "the group ends non-zero in bounded time naming it; a restart resumes", [
        (D, "test_a_failure_of_one_rank_is_told_once_by_that_rank"),
        (D, "test_a_rank_that_is_killed_ends_the_run_which_resumes"),
        (D, "test_a_rank_that_hangs_is_named_and_ends_the_run"), (D, "test_a_restart_by_torchrun_resumes_by_itself"),
        ("engine/distributed/test_launch.py", "test_two_machines_lose_one_and_then_a_rank")]),
    ("NaN or Inf", "no rank updates; at most N skipped, then exit 4 with rows; none is read or written", [
        (F, "test_a_loss_that_is_no_number_changes_nothing_and_ends_the_run_with_4"),
        (N, "test_a_run_that_ends_in_steps_without_a_loss_ends_with_4_and_loses_nothing"),
        (N, "test_a_base_that_is_not_finite_is_named_by_every_command"),
        (N, "test_no_model_that_is_not_finite_is_written"),
        (S, "test_a_state_that_is_not_finite_is_written_by_no_writer"),
        (D, "test_a_loss_that_is_no_number_on_one_rank_updates_none")]),
    ("a loss spike", "a warning; opt-in rollback", [
        (F, "test_a_loss_spike_is_told_with_its_rows_and_changes_nothing"),
        (F, "test_a_loss_spike_is_undone_on_request"),
        (F, "test_spikes_in_a_row_that_going_back_does_not_end_end_the_run_with_4"),
        (D, "test_a_spike_is_undone_by_all_ranks")]),
    ("out of memory", "the peak and the next smaller settings; halves once", [
        (F, "test_out_of_memory_halves_the_micro_batch_once_says_so_and_goes_on"),
        (F, "test_out_of_memory_again_ends_the_run_with_what_would_help"),
        (D, "test_out_of_memory_on_one_rank_ends_the_run_and_the_restart_halves")]),
    ("an empty dataset, all rows dropped", "exit 3 with counts", [(F, "test_bad_data_exits_3")]),
    ("a row over the maximum length", "truncated and counted", [
        (A, "test_long_rows_are_cut_and_rows_without_loss_are_dropped_and_both_are_counted")]),
    ("a row with no loss token left", "dropped and counted", [
        (A, "test_long_rows_are_cut_and_rows_without_loss_are_dropped_and_both_are_counted")]),
    ("invalid UTF-8, BOM, lone surrogate", "file:line; --skip-bad-rows counts", [
        (R, "test_invalid_utf8_is_found_to_the_byte"), (R, "test_byte_order_mark_blanks_and_an_unlike_name"),
        (F, "test_bad_rows_can_be_skipped_and_are_counted")]),
    ("duplicate keys, wrong types, missing fields", "an error naming file and row", [(R, "test_a_bad_row")]),
    ("a 20 MB line, deep nesting", "the row rejected, memory bounded", [
        (R, "test_a_huge_row_is_dropped_alone_in_little_memory"), (R, "test_nesting_up_to_the_limit")]),
    ("</s>, <s>, [PAD], <|im_end|> in text", "plain text tokens", [
        (A, "test_text_that_spells_a_special_token_stays_text")]),
    ("an unknown flag or value", "exit 2, the nearest one suggested", [
        ("engine/base/test_flags.py", "test_bad_flags")]),
    ("no GPU, no Triton, no bf16", "the reference path, said once", [
        (F, "test_the_reference_path_is_said_once"), (F, "test_cuda_is_not_silently_the_cpu")]),
    ("an API's 429, 500, time-out", "retried with backoff; nothing paid twice", [
        (G, "test_faults_and_concurrency_change_nothing"), (G, "test_a_server_that_is_down_for_a_while")]),
    ("401, quota gone, model gone", "stops at once", [
        (G, "test_what_no_retry_mends_stops_it_at_once_and_keeps_what_there_is")]),
    ("truncated output, malformed JSON, refusal", "whole items kept, counted, goes on", [
        ("data_gen/rows/test_curator.py", "test_every_way_of_losing_a_task_is_told"),
        ("data_gen/rows/test_curator.py", "test_an_answer_cut_off_keeps_its_whole_tasks")]),
    ("the API key is missing", "exit 2 first; keys never logged or written", [
        (G, "test_no_key_is_told_before_anything_is_done"), (G, "test_the_key_is_nowhere")]),
    ("data_gen: kill -9 anywhere", "nothing recorded is lost or paid twice", [
        (G, "test_killed_again_and_again_it_is_the_same_dataset_and_nothing_recorded_is_asked_twice"),
        (G, "test_what_is_paid_is_in_the_dataset_however_the_run_ends"),
        ("data_gen/api/test_seals.py", "test_every_bit_flip_is_found_or_changes_nothing")]),
    ("the spend cap is reached", "stops, resumable", [
        (G, "test_the_cap_stops_it_and_a_larger_one_goes_on"),
        ("data_gen/api/test_collector.py", "test_the_cap_is_never_passed_by_a_cent")]),
    ("server: a huge or slow body, bad JSON", "413, 408, 400", [
        (V, "test_sizes_paces_and_places"), (V, "test_a_wrong_body_is_refused_with_its_parameter")]),
    ("concurrent requests, disconnects", "a bounded queue, 503; generation cancelled", [
        (V, "test_64_streams_at_once_are_each_their_own"),
        (V, "test_who_comes_when_the_queue_is_full_is_told_when_to_come_again"),
        (V, "test_who_leaves_frees_the_place"), (V, "test_an_answer_ends_when_its_client_has_left")]),
    ("XSS in prompt or output, a foreign Origin", "text only, CSP, loopback, Origin and Host checked", [
        ("engine/serving/test_page.py", "test_html_of_users_and_models_is_text"),
        (V, "test_the_page_may_load_nothing_from_elsewhere"), (V, "test_foreign_pages_get_nothing")]),
]  # fmt: skip
Z = "engine/formats/test_stand_ins.py"
E = "engine/text/test_tokenizer_elsewhere.py"
P, H = "engine/text/test_chat_templates.py", "engine/text/test_own_template.py"
BILL, LOOP = "data_gen/api/test_bill.py", "data_gen/api/test_collector.py"
LATER = {  # number: found since, by trying public reports of other projects' users
    41: ("a key that changes what a row means", "obeyed, or refused by name; other keys counted and told", [
          (K, "test_what_cannot_be_obeyed_is_refused_by_name"),
          (K, "test_a_weight_of_0_takes_the_loss_from_an_answer_and_nothing_else"),
          (K, "test_alpacas_system_and_history_are_in_the_prompt"), (K, "test_other_keys_are_counted"),
          (K, "test_tools_under_the_checkpoints_own_template")]),
    42: ("a model of a chat style in transformers, vLLM or llama.cpp", "the prompt and the stop of training", [
          ("engine/test_round_trip.py", "test_transformers_asks_and_stops_as_we_do"),
          (P, "test_transformers_makes_the_prompt_of_training"), (P, "test_what_ends_an_answer_is_said"),
          (P, "test_spaces_before_texts"), (P, "test_one_template_is_left_where_a_base_has_two"),
          (H, "test_ids_are_those_of_transformers_before_and_after_the_export"),
          (H, "test_the_day_is_the_same_every_day_and_travels"), (H, "test_what_is_refused")]),
    43: ("a tokenizer that others would read otherwise after export", "a tokenizer.json with the ids of training", [
          (E, "test_a_tokenizer_model_alone_is_saved_as_what_training_used"),
          (E, "test_a_gguf_of_sentencepiece_keeps_pieces_scores_and_types"),
          (E, "test_scores_that_a_tokenizer_json_cannot_say_are_told"), (E, "test_a_chat_has_the_ids_of_transformers"),
          (E, "test_a_gguf_is_cut_as_llama_cpp_cuts_it"),
          (E, "test_a_gguf_that_does_not_say_how_text_is_cut_is_told")]),
    44: ("files that contradict each other (RoPE, BOS)", "the format's own reader's reading, or refused by name", [
          ("engine/formats/test_rope.py", "test_contradictions_are_read_as_transformers_reads_them_or_refused"),
          ("engine/formats/test_rope.py", "test_rope_scaling_goes_before_rope_parameters_with_the_theta_beside_it"),
          ("engine/formats/test_rope.py", "test_factor_of_meta_models"),
          ("engine/formats/test_rope.py", "test_gguf_scaling_is_read_as_llama_cpp_reads_it"),
          (E, "test_the_bos_of_training_is_that_of_transformers"),
          (E, "test_an_older_map_that_names_another_bos_is_overruled_by_the_template"),
          (E, "test_a_template_of_two_tokens_is_refused")]),
    45: ("hidden usage, an error inside a 200, a server that ignores what was asked",
         "the most that was told is billed; classified as the error it is; said once", [
          (BILL, "test_the_most_that_a_usage_can_mean"),
          (BILL, "test_dollars_that_the_server_names_count_where_they_are_more"),
          (BILL, "test_the_bill_told_is_never_under_what_the_server_billed"),
          ("data_gen/api/test_errors.py", "test_an_error_inside_a_200_is_that_error"),
          (LOOP, "test_a_bill_that_is_not_what_it_seems_is_told_once"),
          (LOOP, "test_a_server_that_takes_a_format_and_ignores_it_is_told_once"),
          (LOOP, "test_answers_of_reasoning_alone_end_the_run_before_the_money_is_gone"),
          (G, "test_a_server_that_ignores_the_format_is_told_once")]),
    46: ("files that are not what they seem", "one line that says what it is and what to do", [
          (Z, "test_git_lfs_pointers_in_place_of_weights"), (Z, "test_a_git_lfs_pointer_in_place_of_a_tokenizer"),
          (Z, "test_an_adapter_alone"), (Z, "test_a_part_of_a_split_gguf"), (Z, "test_shards_without_their_index"),
          (Z, "test_fp8_and_other_quantised_folders_take_one_line"), (Z, "test_the_command_exits_3_with_what_to_do"),
          (K, "test_a_file_that_is_not_what_it_seems_is_told_in_one_line"), (K, "test_a_file_of_each_kind"),
          (K, "test_sharegpt"), (K, "test_parquet_without_its_library")]),
    47: ("a slow or busy machine",
         "no request is given up by a clock that the machine's load sets; time grows as a line", [
          ("data_gen/api/test_client.py", "test_a_process_that_did_not_run_has_not_waited"),
          (LOOP, "test_time_in_which_the_process_did_not_run_is_not_the_servers_silence"),
          ("data_gen/test_growth.py", "test_time_grows_as_a_line_does")]),
    48: ("votes: kill -9, a torn line, a full disk, a vote sent twice", "what was told is kept, each counts once", [
          (B, "test_no_acknowledged_vote_is_lost_to_sigkill"),
          (B, "test_a_vote_that_was_cut_off_is_taken_out_and_told"),
          (B, "test_a_full_disk_leaves_the_file_as_it_was"), (B, "test_a_file_of_something_else_is_refused_and_stays"),
          (L, "test_a_vote_counts_once_though_it_is_sent_again"), (L, "test_votes_sent_at_once_count_once"),
          ("engine/test_serve.py", "test_votes_on_two_files_outlive_sigkill")]),
    49: ("a flipped bit or a cut end of weights, a state, a tokenizer, a token cache, rows, run.json, votes, a ledger",
         "refused with the file's name, exit 3, or read as before; what no checksum covers is counted apart", [
          ("scripts/test_fuzz.py", "test_damage_is_refused_or_harmless"),
          ("engine/formats/test_gguf.py", "test_no_flipped_bit_of_a_tensors_place_loads_other_weights"),
          ("engine/formats/test_gguf.py", "test_a_damaged_key_is_not_its_default"),
          ("engine/formats/test_torch_zip.py", "test_no_flipped_bit_loads_other_tensors"),
          ("engine/formats/test_torch_zip.py", "test_a_record_that_is_shorter_than_its_tensor"),
          (C, "test_a_manifest_whose_facts_are_of_another_type"),
          ("engine/training/test_resume.py", "test_a_damaged_record_of_a_run_is_named_and_nothing_is_lost"),
          ("data_gen/page/test_report.py", "test_a_damaged_run_is_named"),
          ("data_gen/api/test_seals.py", "test_a_schema_that_is_no_utf8_is_damage"),
          ("engine/text/test_tokenizer_parts.py", "test_what_is_no_token_id"),
          ("engine/base/test_errors.py", "test_reading_names_the_file_and_leaves_our_own_errors")]),
    50: ("a few bytes that claim a large model", "refused before anything is allocated", [
          ("engine/formats/test_torch_zip.py", "test_tensors_that_are_larger_than_what_is_stored")]),
    51: ("text made to take long: one long piece, very many answers, blanks", "time grows as a line, or refused", [
          ("engine/text/test_growth.py", "test_one_long_piece_of_a_vocabulary"),
          ("engine/text/test_growth.py", "test_a_chat_of_many_answers"),
          ("engine/text/test_growth.py", "test_blanks_before_a_token_that_swallows_them"),
          ("engine/text/test_growth.py", "test_a_template_is_not_run_for_each_of_very_many_answers")]),
    52: ("an adapter: kill -9 in a step, in a save, in the last write, also beside weights in 4 bits",
         "losses and factors bit-equal to an unbroken run; no half-written adapter is one", [
          (RUNS, "test_kill_9_then_resume_is_bit_equal"), (RUNS, "test_qlora_is_one_run_through_a_kill"),
          (FOLDER, "test_a_second_write_replaces_the_first_whole")]),
    53: ("an adapter: two ranks, then one", "one run: the same curve, the frozen weights in every rank whole", [
          (D, "test_an_adapter_of_two_ranks_then_of_one_is_one_run"),
          (D, "test_two_ranks_beside_weights_in_4_bits_are_one_run")]),
    54: ("an adapter: disk full", "exit 1, the training state kept; the same command ends the run, bit-equal", [
          (RUNS, "test_a_full_disk_costs_a_repetition_of_the_command")]),
    55: ("an adapter: its base is gone, has other weights or another shape",
         "resume and merge refuse; --adapter-dir warns of other weights, refuses another shape", [
          (RUNS, "test_a_base_that_is_gone_or_has_other_weights_is_refused"),
          (RUNS, "test_going_on_beside_other_weights_is_told"), (FOLDER, "test_another_base_of_the_same_shape_is_told"),
          (FOLDER, "test_an_adapter_of_another_shape_is_told_in_a_few_lines")]),
    56: ("an adapter: another rank, other maps, a rank over what a map can have",
         "exit 2 or 3 naming the flag or the tensor; a rank that only adds parameters is warned of", [
          (RUNS, "test_a_state_goes_on_only_as_it_began"), (RUNS, "test_flags_of_a_shape_are_not_passed_over"),
          (RUNS, "test_an_adapter_that_does_not_fit_is_refused_before_anything_is_loaded"),
          (RUNS, "test_a_rank_over_what_a_map_can_have_is_told")]),
    57: ("an adapter: missing, damaged or unknown keys and files, NaN, a byte order mark",
         "exit 3 naming each, and never taken for a fault of the base; a byte order mark is read over", [
          (FOLDER, "test_missing_files_are_named"), (FOLDER, "test_what_cannot_be_read_is_refused_by_name"),
          (FOLDER, "test_odd_values_of_any_key_are_data_errors"), (FOLDER, "test_damaged_files_are_named"),
          (FOLDER, "test_a_file_without_tensors_is_refused"), (FOLDER, "test_factors_that_are_not_finite_are_refused"),
          (FOLDER, "test_a_byte_order_mark_is_read_over"),
          ("engine/test_adapter_commands.py", "test_a_damaged_adapter_is_not_taken_for_a_damaged_base")]),
}  # fmt: skip
ROWS = [*enumerate(FAULTS, 1), *sorted(LATER.items())]


def find_missing_tests() -> list[str]:
    """Return the tests that the table names and no file defines."""
    named = {test for _, (_, _, tests) in ROWS for test in tests}
    return sorted(
        f"{file}::{test}" for file, test in named
        if not (ROOT / "tests" / file).exists() or f"def {test}(" not in (ROOT / "tests" / file).read_text()
    )  # fmt: skip


Outcomes = dict[tuple[str, str], list[str]]  # {(file, test): the outcome of each of its cases}


def run_named_tests() -> Outcomes:
    """Run the tests of the table, and return their outcomes."""
    named = sorted({test for _, (_, _, tests) in ROWS for test in tests})
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "junit.xml")
        nodes = [f"tests/{file}::{test}" for file, test in named]
        pytest = [sys.executable, "-m", "pytest", "-q", "-n", "auto", "--dist", "worksteal"]
        subprocess.run([*pytest, f"--junitxml={report}", *nodes], cwd=ROOT, check=False)
        return read_outcomes(report)


def read_outcomes(report: Path) -> Outcomes:
    """Return the outcomes of the tests in a JUnit report that pytest wrote."""
    outcomes: Outcomes = {}
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        outcome = next((child.tag for child in case if child.tag in ("failure", "error", "skipped")), "passed")
        file = case.get("classname").removeprefix("tests.").replace(".", "/") + ".py"
        key = file, re.sub(r"\[.*", "", case.get("name"), flags=re.S)
        outcomes.setdefault(key, []).append(outcome)
    return outcomes


def format_page(outcomes: Outcomes) -> str:
    """Return the page: one row for each fault."""
    lines = [
        "# What can go wrong", "",
        "Made by `python -m scripts.pages.faults`, which runs the tests named here "
        f"({time.strftime('%Y-%m-%d')}, Python {platform.python_version()}, {platform.machine()}).", "",
        "| # | fault | expected | test | observed |", "|---|---|---|---|---|",
    ]  # fmt: skip
    for number, (fault, expected, tests) in ROWS:
        names = "<br>".join(f"`{file.removesuffix('.py')}::{test}`" for file, test in tests)
        observed = "<br>".join(describe_outcomes(outcomes.get(test, ["not run"])) for test in tests)
        lines.append(f"| {number} | {escape_cell(fault)} | {escape_cell(expected)} | {names} | {observed} |")
    return "\n".join([*lines, ""])


def describe_outcomes(outcomes: list[str]) -> str:
    """Return the outcomes of a test's cases in words, with their numbers."""
    kinds = {kind: outcomes.count(kind) for kind in dict.fromkeys(outcomes)}
    if kinds == {"passed": 1}:
        return "as expected"
    return ", ".join(f"{n} {'as expected' if kind == 'passed' else kind}" for kind, n in kinds.items())


def escape_cell(text: str) -> str:
    """Return text that is safe in a cell of a Markdown table."""
    return text.replace("<", "&lt;").replace("|", "\\|")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--junit", type=Path, metavar="FILE", help="the outcomes of a run that has been made")
    if missing := find_missing_tests():
        raise SystemExit(f"scripts.pages.faults: no such tests: {', '.join(missing)}")
    args = parser.parse_args()
    if not args.check:
        PAGE.write_text(format_page(read_outcomes(args.junit) if args.junit else run_named_tests()))


if __name__ == "__main__":
    sys.exit(run_for_reader(main))
