"""What stages hand to trainers and keep of them, and where models come from."""

from __future__ import annotations

from tests.mutations.mutation import in_file

TOKENIZERS = "unit/stages/test_other_tokenizers.py"
OTHER = "test_a_model_of_another_chat_template_is_refused_before_anything_is_computed"

MUTATIONS = [
    *in_file(
        "stages/shared/reference_cache.py",
        "unit/training/test_reference_cache.py",
        (
            "a prefix has the reference of a policy without one",
            "content, nf4, stacked, prefix]",
            "content, nf4, stacked]",
            "test_each_length_of_a_prefix_has_a_reference_of_its_own",
        ),
    ),
    *in_file(
        "stages/shared/by_prompt.py",
        "unit/stages/test_reward_split.py",
        (
            "held-out pairs are learned from",
            "learned = [row for row, prompt in enumerate(prompt_of) if prompt not in chosen]",
            "learned = list(range(len(rows)))",
            "test_a_prompt_is_learned_from_or_held_out",
        ),
    ),
    *in_file(
        "stages/reward/run.py",
        "unit/stages/test_reward.py",
        (
            "the reward model learns from pairs the other way round",
            'for answer in ("chosen", "rejected")\n    }',
            'for answer in ("chosen", "chosen")\n    }',
            "test_the_loss_is_that_of_bradley_and_terry_with_its_centre",
        ),
        (
            "center_coefficient is ignored",
            "center_rewards_coefficient=config.center_coefficient or None",
            "center_rewards_coefficient=None",
            "test_the_loss_is_that_of_bradley_and_terry_with_its_centre",
        ),
        (
            "a reward model is always right",
            '"eval_accuracy": _share_won(margins),',
            '"eval_accuracy": 1.0,',
            "test_held_out_figures_and_the_offset_are_of_the_saved_model",
        ),
        (
            "held-out answers change sides",
            "held_out_metrics(both[::2], both[1::2], held_out)",
            "held_out_metrics(both[1::2], both[::2], held_out)",
            "test_held_out_figures_and_the_offset_are_of_the_saved_model",
        ),
        (
            "the offset is 0",
            "offset = float(both[::2].mean())",
            "offset = 0.0",
            "test_held_out_figures_and_the_offset_are_of_the_saved_model",
        ),
    ),
    *in_file(
        "stages/ppo/prompt_split.py",
        "unit/training/test_ppo_limits.py",
        (
            "the guard's prompts are learned from",
            "            held_out.setdefault(tuple(prompt), index)\n        else:\n            learned.append(index)",
            "            held_out.setdefault(tuple(prompt), index)\n        learned.append(index)",
            "test_held_out_prompts_are_never_learned_from",
        ),
    ),
    *in_file(
        "stages/ppo/run.py",
        "unit/stages/test_ppo_guard.py",
        (
            "the guard asks the stage's own scorers",
            "build_rewards({GUARD: config.guard.scorer}, *from_stage)",
            "build_rewards(maximised(config), *from_stage)",
            "test_the_guard_asks_its_own_scorer_and_the_stage_its_own",
        ),
        (
            "the critic of a later policy is kept",
            'metrics.get("guard/kept_update", metrics["updates"]) == metrics["updates"]:',
            'metrics["updates"] == metrics["updates"]:',
            "test_a_critic_is_kept_beside_the_policy_that_it_learned_with_alone",
        ),
    ),
    *in_file(
        "stages/ppo/trainer_setup.py",
        "unit/training/test_ppo.py",
        (
            "the kind of KL control is ignored",
            "if config.control is KlControl.adaptive:",
            "if config.control is None:",
            "test_the_adaptive_coefficient_follows_the_kl",
        ),
    ),
    *in_file(
        "stages/ppo/trainer_setup.py",
        "unit/training/test_ppo_columns.py",
        (
            "a checkpoint is made inside an update",
            "save_steps=config.save_every * steps_per_update",
            "save_steps=config.save_every * steps_per_update - 1",
            "test_checkpoints_lie_where_updates_end",
        ),
    ),
    *in_file(
        "stages/ppo/batch_sizes.py",
        "unit/training/test_ppo.py",
        (
            "completions that do not divide are taken",
            "    if rest:\n",
            "    if rest < 0:\n",
            "test_episodes_that_do_not_divide_by_completions_are_refused",
        ),
    ),
    *in_file(
        "stages/shared/result.py",
        "unit/models/test_load.py",
        (
            "adapters of earlier stages are not kept",
            "shutil.copytree(adapter.path, own.with_name(name), dirs_exist_ok=True, ignore=_all_but_adapter)",
            "pass",
            "test_an_artifact_never_needs_the_one_it_was_made_from",
        ),
    ),
    *in_file(
        "stages/shared/result.py",
        "unit/stages/test_distil.py",
        (
            "a model is saved without the cache of its keys and values",
            "        model.config.use_cache = True  # it is off during training, but generation needs it\n",
            "",
            "test_a_draft_is_a_policy_of_its_own_that_others_start_from[full]",
        ),
    ),
    *in_file(
        "stages/ppo/run.py",
        TOKENIZERS,
        (
            "the reward model of PPO may have another tokenizer",
            "        refuse_other_tokenizer(spec, reward, tokenizer)",
            "        pass",
            f"{OTHER}[ppo-reward]",
        ),
    ),
    *in_file(
        "stages/evaluate/run.py",
        TOKENIZERS,
        (
            "the reference of an evaluation may have another tokenizer",
            'for field in ("reference", "reward"):',
            'for field in ("reward",):',
            f"{OTHER}[evaluate-reference]",
        ),
        (
            "the reward model of an evaluation may have another tokenizer",
            'for field in ("reference", "reward"):',
            'for field in ("reference",):',
            f"{OTHER}[evaluate-reward]",
        ),
    ),
    *in_file(
        "stages/shared/arm_policies.py",
        TOKENIZERS,
        (
            "an arm that a stage made may have another tokenizer",
            "        refuse_other_tokenizer(context.spec, stage_input, ours)\n",
            "",
            f"{OTHER}[evaluate-arm]",
        ),
    ),
    *in_file(
        "stages/forgetting/run.py",
        TOKENIZERS,
        (
            "forgetting is measured on policies of another tokenizer",
            "        refuse_other_tokenizer(spec, arm, tokenizer)",
            "        pass",
            f"{OTHER}[forgetting-arm]",
        ),
    ),
    *in_file(
        "stages/reward_card/run.py",
        TOKENIZERS,
        (
            "a card is made of a reward model of another tokenizer",
            "    refuse_other_tokenizer(context.spec, reward, tokenizer)\n",
            "",
            f"{OTHER}[reward_card-reward]",
        ),
    ),
    *in_file(
        "models/assembly/start.py",
        "unit/models/test_start.py",
        (
            "a stacked adapter is remembered as merged",
            "merged = adapter.chain is Chain.merge or not start.adapters",
            "merged = True",
            "test_a_chain_of_three_is_found_again",
        ),
    ),
    *in_file(
        "models/assembly/load.py",
        "unit/models/test_load.py",
        (
            "an artifact of another base is taken",
            "if recorded is not None and recorded == base_content(spec):",
            "if recorded is not None:",
            "test_an_artifact_of_another_base_is_refused",
        ),
        (
            "another tokenizer is taken",
            "if hashes != tokenizer_hashes(tokenizer):",
            "if hashes == {}:",
            "test_another_tokenizer_is_refused_by_name",
        ),
        (
            "a damaged artifact is built on",
            "manifest = verify(stage_input.path, content=True)",
            "manifest = verify(stage_input.path, content=False)",
            "test_a_damaged_artifact_is_refused_before_anything_is_built_on_it",
        ),
        (
            "a reward model's offset is not loaded",
            'model.score_offset.copy_(saved["offset"])',
            "model.score_offset.zero_()",
            "test_a_reward_model_scores_the_same_after_a_reload",
        ),
    ),
    *in_file(
        "models/assembly/roles.py",
        "unit/models/test_roles.py",
        (
            "a policy that is trained whole has no reference of its own",
            "if adapter.kind is AdapterKind.full else None\n    scorer",
            "if adapter.kind is None else None\n    scorer",
            "test_the_reference_is_the_policy_at_the_start_whatever_is_learned",
        ),
        (
            "every role holds its base for itself",
            "        share_frozen(scorer, trained)\n",
            "        pass\n",
            "test_under_an_adapter_policy_value_and_reward_hold_their_base_once",
        ),
    ),
    *in_file(
        "models/assembly/start.py",
        "unit/models/test_start.py",
        (
            "modules trained whole are left out of a stack",
            "    _refuse_unmerged(model, beside, adapter)\n",
            "",
            "test_modules_trained_whole_are_only_merged",
        ),
        (
            "weights in four bits are below DoRA",
            "    _refuse_dora_in_four_bits(beside, adapter)\n",
            "",
            "test_dora_does_not_stay_beside_weights_in_four_bits",
        ),
    ),
    *in_file(
        "models/assembly/adapters.py",
        "unit/models/test_adapters.py",
        (
            "factors on the head never learn",
            "if name := on_embeddings(model, targets):",
            'if name := "":',
            "test_factors_on_the_head_or_the_embeddings_are_refused",
        ),
        (
            "misspelt modules are not trained",
            "if not any(path.endswith(name) for path in paths):",
            "if not paths:",
            "test_unknown_modules_to_save_are_an_error_that_names_the_setting",
        ),
    ),
    *in_file(
        "models/assembly/adapters.py",
        "unit/models/test_start.py",
        (
            "a tied head stays as it was beside trained embeddings",
            'for name in names) else [*names, "lm_head"]',
            "for name in names) else names",
            "test_a_tied_head_is_trained_with_its_embeddings",
        ),
    ),
    *in_file(
        "models/assembly/load.py",
        "unit/models/test_load.py",
        (
            "settings of generation that were published cannot be written",
            "        model.generation_config = _writable(model.generation_config)",
            "        pass",
            "test_published_settings_of_generation_can_be_written_again",
        ),
    ),
]
