"""Faults of serving: sums of adapters, ends of answers, and which models a client reaches."""

from __future__ import annotations

from tests.mutations.mutation import in_file

APP = "unit/commands/serve/test_transformers_app.py"
LAYOUT = "unit/commands/serve/test_vllm_layout.py"
SUM = "test_the_sum_adds_to_each_weight_what_all_adapters_add"
TOGETHER = "test_what_does_not_fit_together_is_refused_with_what_works"

MUTATIONS = [
    *in_file(
        "commands/serve/joined_adapters.py",
        "unit/commands/serve/test_joined_adapters.py",
        ("scales of summed adapters are lost", "[scale * factors[_B] for", "[factors[_B] for", SUM),
        ("rslora is forgotten in a sum", "if config.use_rslora else config.r", "if False else config.r", SUM),
        ("the scales of a sum apply twice", '"lora_alpha": sum(ranks)', '"lora_alpha": 2 * sum(ranks)', SUM),
        ("a sum keeps rslora", '"use_rslora": False', '"use_rslora": True', SUM),
    ),
    *in_file(
        "commands/shared/generation_settings.py",
        APP,
        (
            "served answers end at EOS alone",
            "eos_token_id=sorted(end_ids)",
            "eos_token_id=[pad_id]",
            "test_answers_end_where_training_ended_them_and_are_drawn_from_the_whole_distribution",
        ),
        (
            "a server samples from the likeliest tokens alone",
            "top_k=0,",
            "top_k=50,",
            "test_answers_end_where_training_ended_them_and_are_drawn_from_the_whole_distribution",
        ),
    ),
    *in_file(
        "commands/serve/transformers_app.py",
        APP,
        (
            "a client loads any folder",
            "if model_id not in self.loaded_models:",
            "if False:",
            "test_no_endpoint_loads_another_model",
        ),
        (
            "a weights file behind a name is read",
            "name = model_id_and_revision if gguf_file is None",
            "name = model_id_and_revision if True",
            "test_no_endpoint_loads_another_model",
        ),
    ),
    *in_file(
        "commands/serve/vllm_files.py",
        APP,
        (
            "policies of other templates share a server",
            'hashes["chat_template_sha256"] != others["chat_template_sha256"]',
            "False",
            "test_several_policies_share_one_tokenizer_and_one_set_of_ends",
        ),
    ),
    *in_file(
        "commands/serve/vllm_layout.py",
        LAYOUT,
        ("a DoRA adapter is served as LoRA", 'if config.get("use_dora"):', "if False:", TOGETHER),
        ("whole modules are left out", 'if config.get("modules_to_save"):', "if False:", TOGETHER),
        (
            "adapters are served on other weights",
            "if _weights(policy).resolve() != _weights(first).resolve():",
            "if False:",
            TOGETHER,
        ),
        (
            "adapters on four bits are served on whole weights",
            'if any(applied.get("nf4")',
            'if False and any(applied.get("nf4")',
            "test_adapters_on_four_bits_are_refused_together_and_merged_alone",
        ),
        (
            "an adapter below is left out of the sum",
            "return tuple(inside(artifact, name) for name in manifest_of(policy).adapters)",
            "return tuple(inside(artifact, name) for name in manifest_of(policy).adapters[-1:])",
            "test_several_policies_are_sums_of_adapters_on_their_base",
        ),
    ),
    *in_file(
        "commands/serve/server_commands.py",
        LAYOUT,
        (
            "a key of the caller's is asked for",
            '{"VLLM_API_KEY": api_key}',
            '({"VLLM_API_KEY": api_key} if api_key else {})',
            "test_the_command_names_every_arm_and_the_least_rank_that_fits",
        ),
    ),
]
