"""Faults of serving: sums of adapters, ends of answers, and which models a client reaches."""

from __future__ import annotations

from tests.mutations.mutation import in_file

APP = "unit/commands/serve/test_transformers_app.py"
REQUESTS = "unit/commands/serve/test_requests.py"
REFUSED = "test_what_would_be_ignored_is_refused_by_name"
PIECES = "test_pieces_of_any_size_end_where_the_whole_text_ends"
CONTEXT = "test_an_answer_may_fill_the_context_and_a_prompt_may_not"
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
        "commands/serve/request_checks.py",
        REQUESTS,
        (
            "several answers are asked for, and one comes",
            "return lambda value: bool(value != usual)",
            "return lambda value: False",
            REFUSED,
        ),
        (
            "penalties are ignored",
            '    **_PENALTIES,\n    "n": _other_than(1),\n    "logprobs": bool,',
            '    "n": _other_than(1),\n    "logprobs": bool,',
            REFUSED,
        ),
        (
            "a choice among no tools is refused",
            'if name == "tool_choice" and not body.get("tools"):',
            "if False:",
            "test_values_that_ask_for_nothing_are_taken",
        ),
        (
            "the text beside a call is lost",
            'turn["content"] = _content(message.get("content"), where)',
            'turn["content"] = "" if turn.get("tool_calls") else _content(message.get("content"), where)',
            "test_text_beside_a_call_and_the_name_of_a_result_reach_the_template",
        ),
    ),
    *in_file(
        "commands/serve/stop_texts.py",
        REQUESTS,
        ("a stop is returned", "        return text[:certain]\n", "        return text\n", PIECES),
        ("the later of two stops counts", "min((start for stop", "max((start for stop", PIECES),
        ("what was held back is lost", 'held, self._held = self._held, ""', 'held = self._held = ""', PIECES),
        (
            "an error in a stream is no JSON",
            "_StreamError(json.dumps(item.msg)[1:-1])",
            "item",
            "test_an_error_in_a_stream_fits_into_json",
        ),
    ),
    *in_file(
        "commands/serve/policy_generation.py",
        REQUESTS,
        (
            "answers run over the context",
            "min(config.max_new_tokens, positions - tokens)",
            "config.max_new_tokens",
            CONTEXT,
        ),
        ("a prompt may fill the context", "if tokens >= positions:", "if tokens > positions:", CONTEXT),
        (
            "a stop ends an answer of /v1/completions behind it",
            "return before_stops(text, gen_config.stop_strings or []), prompt_tokens, ids",
            "return text, prompt_tokens, ids",
            "test_a_stop_is_not_part_of_the_answer",
        ),
    ),
    *in_file(
        "commands/serve/policy_handlers.py",
        REQUESTS,
        ("answers end at 1,024 tokens", "config.max_new_tokens = sys.maxsize", "pass", CONTEXT),
        (
            "a refusal of the template is an error of the server",
            "        except TemplateError as error:",
            "        except ZeroDivisionError as error:",
            "test_a_conversation_that_the_template_refuses_is_a_refusal_with_its_words",
        ),
        (
            "an answer with a stop has no content before it",
            "before_stops(content, stops),",
            "content,",
            "test_a_stop_ends_an_answer_that_is_divided",
        ),
    ),
    *in_file(
        "commands/serve/answer_form.py",
        REQUESTS,
        (
            "the end of another template is text",
            "    tokenizer.response_template = form\n",
            "",
            "test_the_end_of_a_turn_is_no_text_whatever_token_it_is",
        ),
        (
            "of several texts the last is returned",
            '"repeats": True, "join": "\\n"',
            '"repeats": False',
            "test_a_call_and_the_texts_around_it_are_all_returned",
        ),
        (
            "a call that was cut off is an error",
            "    except (ValueError, KeyError, TypeError) as error:",
            "    except ZeroDivisionError as error:",
            "test_a_call_that_was_cut_off_is_text",
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
