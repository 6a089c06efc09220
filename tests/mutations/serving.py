"""Faults of serving: sums of adapters, ends of answers, and which models a client reaches."""

from __future__ import annotations

from tests.mutations.mutation import in_file

APP = "unit/commands/serve/test_transformers_app.py"
REQUESTS = "unit/commands/serve/test_requests.py"
REFUSED = "test_what_a_request_cannot_have_is_refused_by_name"
LEFT = "test_the_work_of_a_request_ends_when_its_client_goes_away"
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
        REQUESTS,
        (
            "nobody looks whether a client has left",
            "asyncio.wait({task, left}, return_when=asyncio.FIRST_COMPLETED)",
            "asyncio.wait({task})",
            LEFT,
        ),
        (
            "a body of any size is read",
            "if len(raw) > MOST_BYTES:",
            "if False:",
            "test_a_body_of_any_size_is_refused_before_it_is_read",
        ),
        (
            "a page of another site asks with a form",
            'if request.headers.get("content-type", "")',
            'if False and request.headers.get("content-type", "")',
            "test_pages_of_other_sites_cannot_ask_with_a_form",
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
            '"presence_penalty": bool, "frequency_penalty": bool}',
            '"presence_penalty": lambda _: False, "frequency_penalty": lambda _: False}',
            REFUSED,
        ),
        (
            "a choice among no tools is refused",
            'or (name in _OF_TOOLS and not body.get("tools"))',
            "or False",
            "test_values_that_ask_for_nothing_are_taken",
        ),
        ("any number of stops is looked for", "if len(stops) > MOST_STOPS:", "if False:", REFUSED),
    ),
    *in_file(
        "commands/serve/request_messages.py",
        REQUESTS,
        (
            "tools are left out in silence",
            "if tools and not reads_tools(template):",
            "if False:",
            "test_tools_are_refused_where_the_template_leaves_them_out",
        ),
        (
            "a client replaces the chat template",
            "        if name not in read:\n",
            "        if name == 'other':\n",
            REFUSED,
        ),
        (
            "the text beside a call is lost",
            'content=_content(message.get("content"),',
            'content="" if message.get("tool_calls") else _content(message.get("content"),',
            "test_text_beside_a_call_and_the_name_of_a_result_reach_the_template",
        ),
    ),
    *in_file(
        "commands/serve/stop_texts.py",
        REQUESTS,
        ("a stop is returned", "        return text[:certain]\n", "        return text\n", PIECES),
        ("the later of two stops counts", "min((start for stop", "max((start for stop", PIECES),
        ("what was held back is lost", 'held, self._held = self._held, ""', 'held = self._held = ""', PIECES),
    ),
    *in_file(
        "commands/serve/policy_generation.py",
        REQUESTS,
        (
            "answers run over the context",
            "min(options.max_tokens or room, room)",
            "options.max_tokens or 2 * room",
            CONTEXT,
        ),
        (
            "a prompt may fill the context",
            "if prompt_tokens >= self.positions:",
            "if prompt_tokens > self.positions:",
            CONTEXT,
        ),
        (
            "a stop ends an answer behind it",
            "content=before_stops(content, answer.stops),",
            "content=content,",
            "test_a_stop_is_not_part_of_the_answer",
        ),
        ("an answer goes on without a client", "            is_left.set()\n", "", LEFT),
        (
            "a prompt is read without a client",
            "layer.register_forward_pre_hook(self._end_if_left)",
            "pass",
            "test_the_reading_of_a_prompt_ends_when_its_client_goes_away",
        ),
    ),
    *in_file(
        "commands/serve/answer_form.py",
        REQUESTS,
        (
            "the end of another template is text",
            "reader.response_template = _with_ends(form, tokenizer, end_ids)",
            "reader.response_template = form",
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
