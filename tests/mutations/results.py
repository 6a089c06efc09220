"""What counts as a result: fingerprints, artifacts, exports and hubs."""

from __future__ import annotations

from tests.mutations.mutation import in_file

PLAN = "unit/pipeline/test_plan.py"
RERUNS = "test_a_change_re_runs_what_it_changes_and_nothing_else"

MUTATIONS = [
    *in_file(
        "core/fingerprint.py",
        PLAN,
        ("settings that change no result count", 'bool(field.metadata.get("identity", True))', "True", RERUNS),
    ),
    *in_file(
        "core/fingerprint.py",
        "unit/core/test_fingerprint.py",
        (
            "a number that is not finite has a form",
            "if not math.isfinite(value):",
            "if value is None:",
            "test_what_has_no_stable_form_is_refused",
        ),
    ),
    *in_file(
        "pipeline/plan/identity.py",
        PLAN,
        ("the seed is out of the fingerprint", '"seed": run.seed,', '"seed": 0,', RERUNS),
        (
            "data is out of the fingerprint",
            '"data": data.get("data"),',
            '"data": "",',
            "test_the_content_of_data_counts_and_its_place_does_not",
        ),
        (
            "inputs are out of the fingerprint",
            '        "inputs": inputs,\n        "arms": arms,',
            '        "inputs": {},\n        "arms": arms,',
            RERUNS,
        ),
        (
            "arms are out of the fingerprint",
            '"arms": arms,',
            '"arms": {},',
            "test_a_reason_names_data_seed_arms_and_inputs",
        ),
        (
            "the base model is out of the fingerprint",
            '"content": base.identity,',
            '"content": "",',
            "test_the_content_of_the_base_model_counts_and_its_place_does_not",
        ),
        (
            "mixed data is out of the fingerprint",
            '"extra_data": others,',
            '"extra_data": {},',
            "test_what_is_mixed_in_counts_by_its_content_and_its_share",
        ),
        (
            "a template counts by its path",
            'named = {} if template is None else {"chat_template": digest(template_text(template))}',
            'named = {} if template is None else {"chat_template": template}',
            "test_a_template_counts_by_its_content_and_the_worker_is_told_its_whole_path",
        ),
    ),
    *in_file(
        "pipeline/plan/identity.py",
        "unit/pipeline/test_identity.py",
        (
            "a stage's revision is out of the fingerprint",
            '"revision": kind.revision,\n        "rule"',
            '"revision": 0,\n        "rule"',
            "test_a_stages_revision_and_the_seed_count",
        ),
        (
            "a report's revision is out of the fingerprint",
            '"revision": kind.revision,\n        "config": canonical(stage)',
            '"revision": 0,\n        "config": canonical(stage)',
            "test_a_reports_revision_counts",
        ),
    ),
    *in_file(
        "stages/ppo/config.py",
        "unit/pipeline/test_identity.py",
        (
            "PPO's gamma is out of the fingerprint",
            "    gamma: Annotated[float, FRACTION] = 1.0\n",
            "    gamma: float = field(default=1.0, metadata={'identity': False})\n",
            "test_every_setting_counts_but_those_that_change_no_result",
        ),
        (
            "PPO's gae_lambda is out of the fingerprint",
            "    gae_lambda: Annotated[float, FRACTION] = 0.95\n",
            "    gae_lambda: float = field(default=0.95, metadata={'identity': False})\n",
            "test_every_setting_counts_but_those_that_change_no_result",
        ),
        (
            "PPO's clip is out of the fingerprint",
            "    clip: Annotated[float, POSITIVE] = 0.2\n",
            "    clip: float = field(default=0.2, metadata={'identity': False})\n",
            "test_every_setting_counts_but_those_that_change_no_result",
        ),
    ),
    *in_file(
        "pipeline/plan/identity.py",
        "unit/pipeline/test_scorers.py",
        (
            "a function's file is out of the fingerprint",
            '"code": scorer_checks.code(stage),',
            '"code": {},',
            "test_the_content_of_a_function_s_file_counts_and_its_place_does_not",
        ),
    ),
    *in_file(
        "core/artifacts.py",
        "unit/core/test_artifacts.py",
        (
            "an artifact's hashes are not looked at",
            'if content and file_sha256(path) != expected.get("sha256"):',
            'if content and file_sha256(path) == "":',
            "test_damage_is_found_by_size_and_by_content",
        ),
        (
            "an artifact's sizes are not looked at",
            ' or path.stat().st_size != expected.get("size"):',
            ":",
            "test_damage_is_found_by_size_and_by_content",
        ),
        (
            "an artifact without a file is published",
            "    if not files:\n",
            "    if files is None:\n",
            "test_a_folder_without_a_file_is_not_published",
        ),
        (
            "a complete artifact is replaced",
            "if (target / MANIFEST).exists():",
            "if not target:",
            "test_a_complete_artifact_is_never_replaced",
        ),
        (
            "a manifest may name files outside",
            "is_inside = path.resolve().is_relative_to(folder.resolve())",
            "is_inside = True",
            "test_a_manifest_that_names_a_file_outside_is_refused",
        ),
        (
            "a manifest is written before its files are listed",
            "    write_json(content / MANIFEST, dataclasses.asdict(complete))\n",
            "    write_json(content / MANIFEST, dataclasses.asdict(manifest))\n",
            "test_a_published_artifact_lists_its_files_and_verifies",
        ),
    ),
    *in_file(
        "commands/export/comparing.py",
        "unit/commands/export/test_worker.py",
        (
            "what was exported is not read back",
            "if worst > RELOADED:",
            "if worst > 1e9 * RELOADED:",
            "test_what_was_written_wrong_is_not_exported",
        ),
    ),
    *in_file(
        "commands/export/as_model.py",
        "unit/commands/export/test_worker.py",
        (
            "an exported policy is compared with itself",
            "refuse_differences(logprobs(again, result.rows), expected, folder)",
            "refuse_differences(logprobs(again, result.rows), logprobs(again, result.rows), folder)",
            "test_what_was_written_wrong_is_not_exported",
        ),
        (
            "an exported reward model is not read back",
            "    refuse_differences(_scores(again, rows), expected, folder)\n",
            "",
            "test_what_was_written_wrong_is_not_exported",
        ),
        (
            "an exported reward model's padding is the token that ends answers",
            "if token is not None and token != turn_end and token < size]",
            "if token is not None and token < size]",
            "test_a_reward_model_becomes_a_sequence_classifier",
        ),
        (
            "the head is expected as it is where a reader rounds it",
            "    model.score.to(dtype)\n",
            "",
            "test_a_reward_model_in_bfloat16_is_exported_and_keeps_its_head",
        ),
        (
            "an exported policy keeps the base's own ways of sampling",
            "merged.generation_config = generation_settings(result.stops, result.tokenizer.pad_token_id)",
            "merged.generation_config.eos_token_id = result.stops",
            "test_the_base_s_ways_of_sampling_do_not_change_an_exported_policy",
        ),
    ),
    *in_file(
        "commands/export/as_adapter.py",
        "unit/commands/export/test_worker.py",
        (
            "an exported adapter is not read back",
            "    refuse_differences(logprobs(again, result.rows), expected, folder)\n",
            "",
            "test_what_was_written_wrong_is_not_exported",
        ),
        (
            "an exported adapter names a branch that moves",
            "str(content or source)",
            "str(source)",
            "test_an_adapter_names_the_commit_of_its_base_on_the_hub",
        ),
    ),
    *in_file(
        "commands/export/exported.py",
        "unit/commands/export/test_worker.py",
        (
            "any gap of merging is allowed",
            "if gap.mean_kl > max_gap:",
            "if gap.mean_kl > 1e9 + max_gap:",
            "test_too_wide_a_gap_is_refused",
        ),
    ),
    *in_file(
        "commands/export/worker.py",
        "unit/commands/export/test_worker.py",
        (
            "a damaged artifact is exported",
            "verify(artifact, content=True)",
            "verify(artifact, content=False)",
            "test_a_damaged_artifact_is_not_exported",
        ),
        (
            "a failed export leaves its folder",
            "    finally:\n        shutil.rmtree(partial, ignore_errors=True)",
            "    finally:\n        pass",
            "test_what_was_written_wrong_is_not_exported",
        ),
    ),
    *in_file(
        "pipeline/sources/hub.py",
        "unit/pipeline/test_hub_data.py",
        (
            "planning downloads",
            "local_files_only=not download",
            "local_files_only=False",
            "test_what_is_not_here_is_planned_by_its_revision_and_nothing_is_downloaded",
        ),
        (
            "the revision that was asked for is ignored",
            "            revision=asked.revision,\n            allow_patterns",
            '            revision="main",\n            allow_patterns',
            "test_what_is_here_is_planned_by_its_commit_and_its_rows_are_checked",
        ),
    ),
    *in_file(
        "data/hub_rows.py",
        "unit/pipeline/test_hub_data.py",
        (
            "a hub's data counts without its commit",
            "return snapshot_name(path) or content_sha256(path, of_file)",
            'return (snapshot_name(path) or content_sha256(path, of_file)).partition("@")[0]',
            "test_what_is_here_is_planned_by_its_commit_and_its_rows_are_checked",
        ),
    ),
    *in_file(
        "pipeline/sources/model_sources.py",
        PLAN,
        (
            "a hub's model counts by a branch, not by its commit",
            'identity=f"hub:{repository.id}@{folder.name}"',
            "identity=repository.named",
            "test_a_hub_model_that_is_here_is_planned_by_its_commit",
        ),
        (
            "pickles are taken for a model",
            'if not any(folder.glob("*.safetensors")):',
            'if not any(folder.glob("*")):',
            "test_a_folder_of_pickles_is_no_model",
        ),
    ),
    *in_file(
        "pipeline/sources/bundled_model.py",
        "unit/pipeline/sources/test_bundled_model.py",
        (
            "any weights are taken for the pinned ones",
            "if actual != model.sha256:",
            'if actual == "":',
            "test_weights_other_than_the_pinned_ones_are_refused",
        ),
    ),
]
