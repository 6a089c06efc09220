"""Trainers, what happens around their steps, checkpoints, and how weights are shared out."""

from __future__ import annotations

from tests.mutations.mutation import in_file

FINITE = "unit/training/test_finite.py"
CEILING = "test_a_stage_has_diverged_above_the_loss_of_a_guess"
OPTIMISER = "test_every_setting_of_the_optimiser_reaches_the_trainer"

MUTATIONS = [
    *in_file(
        "training/adamw.py",
        "unit/training/test_adamw.py",
        (
            "small steps of modules trained whole are lost",
            "weight.requires_grad and weight.dtype is torch.bfloat16",
            "False",
            "test_small_steps_of_modules_trained_whole_add_up",
        ),
    ),
    *in_file(
        "training/heartbeat.py",
        "unit/training/test_heartbeat.py",
        (
            "the watching thread keeps a frame, and so what its function held",
            "call_stack(sys._current_frames().get(watched))",
            "call_stack(frame := sys._current_frames().get(watched))",
            "test_what_a_function_held_is_free_when_it_returns",
        ),
    ),
    *in_file(
        "training/micro_batches.py",
        "unit/training/test_micro_batches.py",
        (
            "a micro-batch of pairs counts as a whole batch",
            "return loss if self.unit is Unit.tokens else loss * self._share",
            "return loss",
            "test_what_saves_memory_changes_neither_weights_nor_figures",
        ),
        (
            "figures of micro-batches are averaged whatever their size",
            "value * weight for value, weight in zip(added, weights, strict=True)) / sum(weights)",
            "added) / len(added)",
            "test_figures_of_pieces_count_by_their_share",
        ),
    ),
    *in_file(
        "training/micro_batches.py",
        "distributed/test_token_figures.py",
        (
            "figures of several processes are weighted by the tokens of one",
            "self.on_all_processes(torch.tensor(own)).tolist()",
            "own",
            "test_figures_of_tokens_are_those_of_one_process",
        ),
    ),
    *in_file(
        "training/router_loss.py",
        "unit/training/test_experts.py",
        (
            "experts are balanced by a loss that depends on the size of micro-batches",
            "{_COEFFICIENT: 0.0}",
            "{_COEFFICIENT: None}",
            "test_a_model_with_experts_learns_the_same_in_micro_batches_of_any_size",
        ),
        (
            "a model with experts loses its coefficient",
            "        setattr(config, _COEFFICIENT, before)",
            "        assert before",
            "test_a_model_with_experts_keeps_its_coefficient",
        ),
    ),
    *in_file(
        "models/assembly/load.py",
        "unit/training/test_experts.py",
        (
            "a base that asks for an auxiliary loss gets one",
            "        setattr(config, _ROUTER_LOGITS, False)",
            "        assert config",
            "test_a_base_that_asks_for_an_auxiliary_loss_answers_as_without_it",
        ),
    ),
    *in_file(
        "training/finite.py",
        FINITE,
        (
            "gradients that are not finite are stepped on",
            "if norm is None or not math.isfinite(norm):",
            "if norm is not None and norm < 0.0:",
            "test_a_gradient_that_is_not_finite_stops_before_the_step",
        ),
        (
            "a loss that is not finite is stepped on",
            "if loss is not None and not math.isfinite(loss):",
            "if loss is not None and loss == -1.0:",
            "test_a_loss_that_is_not_finite_stops_before_the_step",
        ),
        (
            "a model without a gradient is a result",
            "if loss is not None and loss > LEARNED and norm == 0.0:",
            "if loss is not None and loss < 0.0 and norm == 0.0:",
            "test_a_model_that_has_no_gradient_left_stops_unless_nothing_is_left_to_learn",
        ),
        (
            "a figure that is not finite is logged and gone on from",
            "if watched and isinstance(value, float) and not math.isfinite(value):",
            "if watched and isinstance(value, str):",
            "test_a_logged_figure_that_is_not_finite_is_written_and_stops",
        ),
        (
            "a training that diverged is a result",
            "if final > bound:",
            "if final > 1e9 * bound:",
            "test_a_loss_that_rose_above_a_guess_is_no_result",
        ),
        (
            "weights that are not finite are saved",
            '    if name is not None:\n        raise NonFiniteError(\n            f"a weight',
            '    if name == 0:\n        raise NonFiniteError(\n            f"a weight',
            "test_weights_that_are_not_finite_are_not_saved",
        ),
    ),
    *in_file(
        "stages/reward/run.py",
        FINITE,
        (
            "a reward model whose scores are not finite is a result",
            "    refuse_results(metrics)\n",
            "",
            "test_scores_that_are_not_finite_end_a_reward_stage",
        ),
        (
            "no loss of a reward model is too high",
            "        ceiling=DIVERGED * math.log(2),\n",
            "",
            f"{CEILING}[reward]",
        ),
    ),
    *in_file(
        "stages/ppo/run.py",
        FINITE,
        (
            "a critic that is not finite is saved",
            "    refuse_weights((name, weight) for name, weight in value.named_parameters() if weight.requires_grad)\n",
            "",
            "test_a_critic_that_is_not_finite_is_not_saved",
        ),
    ),
    *in_file(
        "stages/dpo/run.py",
        FINITE,
        (
            "no loss of DPO is too high",
            "        ceiling=DIVERGED * start_loss(config, first.start),\n",
            "",
            f"{CEILING}[dpo]",
        ),
    ),
    *in_file(
        "stages/shared/language_model.py",
        FINITE,
        (
            "no loss of a language model is too high",
            "ceiling=ceiling, validation=validation",
            "validation=validation",
            f"{CEILING}[sft]",
        ),
    ),
    *in_file(
        "stages/distil/run.py",
        FINITE,
        (
            "no loss of a student is too high",
            'headline="loss", ceiling=ceiling)',
            'headline="loss")',
            f"{CEILING}[distil]",
        ),
    ),
    *in_file(
        "training/callbacks.py",
        "unit/training/test_callbacks.py",
        (
            "checkpoints are never sealed",
            "checkpoints.seal(folder, fingerprint=self._context.spec.fingerprint, layout=layout(self._context))",
            "pass",
            "test_a_saved_checkpoint_is_sealed_and_the_oldest_removed",
        ),
        (
            "a signal stops in the middle of an update",
            "if state.global_step % self._period:",
            "if state.global_step < 0:",
            "test_a_signal_saves_and_stops_at_the_next_exact_step",
        ),
        (
            "a signal at the end of a stage saves inside an update",
            "if asked and not ends_anyway:",
            "if asked:",
            "test_a_signal_when_the_stage_ends_by_itself_saves_nothing",
        ),
    ),
    *in_file(
        "training/checkpoints.py",
        "unit/training/test_checkpoints.py",
        (
            "a checkpoint of another stage is taken",
            "if owner != fingerprint or not files",
            "if owner is None or not files",
            "test_a_checkpoint_that_cannot_be_trusted_is_set_aside_and_the_older_one_taken",
        ),
        (
            "a checkpoint's hashes are not looked at",
            ' and file_sha256(path) == expected.get("sha256")',
            "",
            "test_a_checkpoint_that_cannot_be_trusted_is_set_aside_and_the_older_one_taken",
        ),
        (
            "the oldest checkpoint is taken",
            "key=step_of, reverse=True",
            "key=step_of, reverse=False",
            "test_the_newest_sealed_checkpoint_is_taken_by_number_not_by_name",
        ),
    ),
    *in_file(
        "training/session.py",
        "unit/training/test_session.py",
        (
            "a killed stage starts anew",
            "resume_from_checkpoint=None if resumed is None else str(resumed)",
            "resume_from_checkpoint=None",
            "test_a_killed_stage_goes_on_from_its_newest_good_checkpoint_and_ends_where_it_would_have",
        ),
        (
            "steps behind the checkpoint stay in the metrics",
            "log.keep_through(0 if checkpoint is None else checkpoints.step_of(checkpoint))",
            "log.keep_through(10**9)",
            "test_a_killed_stage_goes_on_from_its_newest_good_checkpoint_and_ends_where_it_would_have",
        ),
        (
            "shares of other processes are gone on from",
            "if stored != expected:",
            'if expected == "":',
            "test_shares_of_other_processes_are_not_gone_on_from",
        ),
        (
            "losses are not compared with their ceiling",
            '        refuse_divergence([row["loss"] for row in rows if "loss" in row], ceiling=ceiling)\n',
            "        pass\n",
            "test_a_loss_that_rises_above_its_ceiling_is_no_result",
        ),
        (
            "the time of earlier attempts does not count",
            '        context.clock.earlier = float(log.last().get("seconds", 0.0))\n',
            "",
            "test_a_killed_stage_goes_on_from_its_newest_good_checkpoint_and_ends_where_it_would_have",
        ),
    ),
    *in_file(
        "training/trainer_arguments.py",
        "unit/training/test_context.py",
        (
            "the bound of the gradients is a billion times as large",
            '"max_grad_norm": optim.max_grad_norm',
            '"max_grad_norm": 1e9 * optim.max_grad_norm',
            OPTIMISER,
        ),
        (
            "weight decay is ignored",
            '"weight_decay": optim.weight_decay',
            '"weight_decay": 0.0',
            OPTIMISER,
        ),
        ("a cosine is a line", 'Schedule.cosine: "cosine"', 'Schedule.cosine: "linear"', OPTIMISER),
        ("a constant rate has no warm-up", '"constant_with_warmup"', '"constant"', OPTIMISER),
        ("Adam's epsilon is the default", "eps=optim.adam_eps", "eps=1e-8", OPTIMISER),
        (
            "all runs have the same seed in their trainers",
            '"seed": context.seed("trainer") % 2**32',
            '"seed": 42',
            "test_the_seed_of_the_trainer_is_that_of_the_run",
        ),
    ),
    *in_file(
        "training/sharding.py",
        "unit/training/test_layouts.py",
        (
            "FSDP keeps weights on the device",
            '{"cpu_offload": moves_shares_to_host(context)}',
            '{"cpu_offload": False}',
            "test_fsdp_moves_weights_to_the_host_where_they_are_elsewhere",
        ),
        (
            "shares lie as whole weights do",
            "WHOLE if sharding is Sharding.none else",
            "WHOLE if sharding is not None else",
            "test_a_layout_names_the_processes_and_how_they_share",
        ),
    ),
    *in_file(
        "training/sharding.py",
        "distributed/test_sharding.py",
        (
            "the optimiser's state is not offloaded",
            'settings["zero_optimization"]["offload_optimizer"]',
            'settings["zero_optimization"]["offload_nothing"]',
            "test_deepspeed_is_told_what_to_offload",
        ),
        (
            "weights are offloaded with the optimiser's state alone asked for",
            "if offload is Offload.weights:\n        settings",
            "if offload is not Offload.none:\n        settings",
            "test_deepspeed_is_told_what_to_offload",
        ),
    ),
    *in_file(
        "training/shard_together.py",
        "distributed/test_shard_together.py",
        (
            "layers that share a weight are units of their own",
            "group = next((group_of[weight] for weight in weights if weight in group_of), None)",
            "group = None",
            "test_layers_that_share_a_weight_are_one_unit",
        ),
        (
            "a unit waits for all its models",
            "    waiting.clear()\n    waiting.add(layer)",
            "    return",
            "test_a_layer_is_gathered_only_while_one_of_its_models_calls_it",
        ),
        (
            "calls free weights that are gathered for many",
            "unit._forward_pre_hooks, unit._forward_hooks = OrderedDict(), OrderedDict()",
            "pass",
            "test_weights_are_whole_for_passes_without_gradients_and_sharded_again_after",
        ),
        (
            "weights stay gathered",
            "            unit.reshard()",
            "            pass",
            "test_weights_are_whole_for_passes_without_gradients_and_sharded_again_after",
        ),
        (
            "a checkpoint holds frozen weights",
            "for name in state.keys() - trained:",
            "for name in ():",
            "test_its_state_is_what_is_trained_and_can_be_loaded_again",
        ),
        (
            "frozen weights are missed in a checkpoint",
            "differences.missing_keys.clear()",
            "None",
            "test_its_state_is_what_is_trained_and_can_be_loaded_again",
        ),
        (
            "frozen models keep weights of their own",
            'root.add_module("frozen_roles", nn.ModuleList(frozen))',
            "pass",
            "test_a_shared_weight_has_one_shard",
        ),
        (
            "an optimiser steps the weights that accelerate found",
            'group["params"] = named["params"]',
            "pass",
            "test_an_optimiser_gets_its_sharded_weights_back",
        ),
    ),
    *in_file(
        "training/sharded_trainer.py",
        "distributed/test_sharding.py",
        (
            "processes on CPUs do not shard",
            "processes.distributed_type = DistributedType.MULTI_XPU",
            "pass",
            "test_stopped_and_started_again_it_ends_as_it_would_have[sft-fsdp]",
        ),
    ),
    *in_file(
        "training/sharding.py",
        "distributed/test_raising_scorer.py",
        (
            "an error that all raise does not say which process met it",
            "failure.rank = rank",
            "failure.rank = None",
            "test_the_process_that_raised_is_named_by_the_other_one_too",
        ),
    ),
]
