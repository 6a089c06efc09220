"""Faults with architectures that cache, window, mask or cap in ways of their own."""

from __future__ import annotations

from tests.mutations.mutation import in_file

FAMILIES = "unit/models/test_other_families.py"
BESIDE_TEXT = "unit/models/test_beside_text.py"

MUTATIONS = [
    *in_file(
        "models/forward/decoding.py",
        FAMILIES,
        (
            "models that count columns see empty ones",
            'in ("eager", "sdpa") and hides)',
            'in ("eager", "sdpa"))',
            "test_models_that_count_columns_see_no_empty_ones",
        ),
    ),
    *in_file(
        "models/kernels/kv_cache.py",
        "unit/models/test_cache.py",
        (
            "hidden columns are seen",
            "return self._columns_after(new) if self.shows_room else",
            "return self._columns_after(new) if self.room else",
            "test_columns_allocated_ahead_can_be_hidden_even_after_others_were_dropped",
        ),
    ),
    *in_file(
        "models/forward/decoding_rows.py",
        FAMILIES,
        (
            "models that count columns copy all of them at every step",
            "room=kv_cache.ROOM, ",
            "room=kv_cache.ROOM if may_see_room(model) else 0, ",
            "test_a_step_of_models_that_count_columns_copies_no_earlier_ones",
        ),
    ),
    *in_file(
        "models/forward/shared_prompts.py",
        FAMILIES,
        (
            "prompts are read although the cache holds something else",
            " and _caches_what_it_sees(model)",
            "",
            "test_prompts_are_read_padded_where_the_cache_holds_something_else_than_attention_sees",
        ),
    ),
    *in_file(
        "models/forward/head.py",
        FAMILIES,
        (
            "only Gemma's caps are known",
            "getattr(config, name, None) for name in _CAPS]",
            "getattr(config, name, None) for name in _CAPS[:1]]",
            "test_logits_are_capped_under_the_name_of_recurrent_gemma",
        ),
    ),
    *in_file(
        "models/assembly/prefix.py",
        FAMILIES,
        (
            "a row may change the frequencies of its neighbours",
            ", *_before_longer(config)])",
            "])",
            "test_rows_that_would_change_the_frequencies_of_their_neighbours_are_refused",
        ),
    ),
    *in_file(
        "core/model_files.py",
        "unit/core/test_model_files.py",
        (
            "the positions of LongRoPE are those after its frequencies change",
            "[*longest, *before_longer_frequencies(groups)]",
            "longest",
            "test_a_model_with_longrope_reads_no_more_than_before_its_frequencies_change",
        ),
    ),
    *in_file(
        "models/forward/flat.py",
        FAMILIES,
        (
            "a model's own mask is not noticed",
            "        and not has_own_mask(model)\n",
            "",
            "test_a_mask_that_depends_on_the_values_takes_the_padded_path",
        ),
    ),
    *in_file(
        "models/assembly/load.py",
        "unit/stages/test_policy_logprobs.py",
        (
            "a model that nothing uses stays while the next one is loaded",
            "        free_unused()\n",
            "",
            "test_one_policy_is_in_memory_at_a_time",
        ),
    ),
    *in_file(
        "models/assembly/load.py",
        FAMILIES,
        (
            "a text model's trunk is the whole model",
            '        model.base_model_prefix = "model"\n',
            "        pass\n",
            "test_a_text_model_of_llama_4_has_a_trunk",
        ),
    ),
    *in_file(
        "models/assembly/load.py",
        BESIDE_TEXT,
        (
            "what only images pass through is trained",
            "    freeze_beside_text(model)\n",
            "",
            "test_all_that_is_trained_of_a_model_with_images_gets_gradients",
        ),
    ),
    *in_file(
        "models/assembly/reward_head.py",
        BESIDE_TEXT,
        (
            "what only images pass through is trained in a critic",
            "        freeze_beside_text(model)\n",
            "",
            "test_all_that_is_trained_of_a_full_critic_gets_gradients",
        ),
    ),
    *in_file(
        "models/assembly/beside_text.py",
        BESIDE_TEXT,
        (
            "layers that text skips are trained",
            """{"embed_tokens_extend", *(f"layers.{number}" for number in skipped)}""",
            """{"embed_tokens_extend"}""",
            "test_all_that_is_trained_of_a_model_with_images_gets_gradients",
        ),
    ),
    *in_file(
        "core/hardware.py",
        "unit/core/test_hardware.py",
        (
            "all GPUs of the machine are a job's",
            "min(ours, len(_names(environment[_ROCR])))",
            "ours",
            "test_gpus_of_amd_are_those_that_a_job_may_use",
        ),
    ),
]
