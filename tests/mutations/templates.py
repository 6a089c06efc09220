"""Chat templates of thinking models: what is learned behind what, what is lost, and which options reach whom."""

from __future__ import annotations

from tests.mutations.mutation import in_file

SPANS, OPTIONS = "unit/data/test_thinking_templates.py", "unit/data/test_template_options.py"
ROWS, PLAN = "unit/stages/test_rows.py", "unit/pipeline/test_plan.py"
EXACT = "test_answers_with_thoughts_are_learned_exactly"
EARLIER = "test_thoughts_of_earlier_turns_are_named_where_a_template_drops_them"
READ = "test_the_options_of_a_template_are_the_names_that_it_reads"
GENERATED = "test_a_generated_answer_without_its_opening_tag_is_read_as_thought_and_answer"
TRACELESS = "test_the_line_that_sets_an_option_leaves_no_trace_in_the_text"

MUTATIONS = [
    *in_file(
        "data/tokens/rendering.py",
        SPANS,
        (
            "a changed turn is learned behind the old one",
            "if not before.startswith(texts[-1].rendered):",
            "if False:",
            EXACT,
        ),
        ("each answer begins a text", "if not before.startswith(texts[-1].rendered):", "if texts[-1].rendered:", EXACT),
        (
            "context that contradicts its prompt is a fault",
            "            if message.learned:\n                raise\n",
            "            raise\n",
            "test_an_answer_that_is_only_context_may_contradict_its_prompt",
        ),
        (
            "a learned answer that contradicts its prompt is left out",
            "            if message.learned:\n                raise\n",
            "",
            "test_an_answer_that_contradicts_its_prompt_names_the_option_that_helps",
        ),
        (
            "tools are missing in the prompt",
            "before = render(tokenizer, messages[:index], answering=True, tools=tools)",
            "before = render(tokenizer, messages[:index], answering=True)",
            "test_calls_are_learned_exactly_and_results_are_read",
        ),
        (
            "arguments of calls are objects for every template",
            "        if as_text == turns:\n",
            "        if True:\n",
            "test_a_template_that_takes_arguments_only_as_text_gets_them_as_json",
        ),
        (
            "an answer behind calls cannot follow their thoughts",
            "        before = bare  #",
            "        pass  #",
            "test_an_answer_behind_calls_is_learned_behind_the_thoughts_that_led_to_them",
        ),
        (
            "any setting is said to help",
            "    return after.startswith(before)\n",
            "    return True\n",
            "test_a_template_that_drops_the_thought_of_an_answer_names_trls_if_that_keeps_it",
        ),
    ),
    *in_file(
        "data/tokens/thoughts.py",
        SPANS,
        (
            "a thought is not given to a template that reads it",
            "dict.fromkeys(fields, thought)",
            "{}",
            EXACT,
        ),
        (
            "tags are left in the content of a template that reads a field",
            "if not thought and (inside or CLOSE not in read):",
            "if False:",
            "test_thoughts_between_tags_are_learned_like_those_in_a_field",
        ),
        (
            "a thought is opened twice",
            "prompt.rstrip().endswith(OPEN) and answer",
            "False and answer",
            "test_a_thought_is_opened_once",
        ),
        ("a generated thought has no opening tag", "    content = opened(content)\n", "", GENERATED),
        (
            "a row's own words become a thought",
            "content = opened(content) if CLOSE in read else content",
            "content = opened(content)",
            "test_a_template_that_knows_no_thoughts_gets_the_words_of_the_row",
        ),
    ),
    *in_file(
        "data/tokens/template_losses.py",
        SPANS,
        ("thoughts of earlier turns are lost in silence", "(context, EARLIER_THOUGHTS), ", "", EARLIER),
        (
            "thoughts that are not learned are taken for earlier ones",
            "(answers, LEARNED_THOUGHTS)",
            "(answers, EARLIER_THOUGHTS)",
            "test_a_thought_that_is_not_learned_is_named",
        ),
        (
            "a system turn is lost in silence",
            "if not _is_in(content, text):",
            "if turn.role != 'system' and False:",
            "test_a_system_turn_that_a_template_drops_is_named",
        ),
        (
            "a call is lost in silence",
            "        yield CALLS\n",
            "        return\n",
            "test_a_second_call_that_a_template_drops_is_named",
        ),
        (
            "what is written as JSON is called lost",
            " or json.dumps(line, ensure_ascii=False)[1:-1] in text",
            "",
            "test_a_text_that_is_trimmed_or_written_as_json_is_not_lost",
        ),
    ),
    *in_file(
        "data/tokens/row_kinds.py",
        SPANS,
        (
            "control tokens in a row are called lost",
            "losses(context, answers, control_tokens(tokenizer).restored(text))",
            "losses(context, answers, text)",
            "test_a_text_that_is_trimmed_or_written_as_json_is_not_lost",
        ),
        (
            "only the first text of a conversation is learned",
            "for parts, _ in fitted for row in",
            "for parts, _ in fitted[:1] for row in",
            EXACT,
        ),
    ),
    *in_file(
        "data/template_options.py",
        OPTIONS,
        (
            "a caller's own value is overwritten",
            "{{%- if {name} is not defined %}}",
            "{{%- if true %}}",
            "test_an_option_does_what_it_does_when_a_caller_passes_it",
        ),
        (
            "an older option counts",
            "return lines + templates",
            "return templates + lines",
            "test_the_option_that_was_given_last_counts",
        ),
        ("the line of an option is text", "{{%- endif %}}\\n", "{{%- endif %}}", TRACELESS),
        ("the line of an option takes the blanks behind it", "{{%- endif %}}\\n", "{{%- endif -%}}\\n", TRACELESS),
        (
            "true is written as Python does",
            '"true" if value else "false"',
            'str(value) + "_"',
            "test_a_template_gets_the_value_of_an_option",
        ),
        ("any name is an option", "if name not in read:", "if False:", "test_what_cannot_be_an_option_is_refused"),
    ),
    *in_file(
        "data/template_syntax.py",
        OPTIONS,
        ("what every conversation gives is an option", " - INPUTS", "", READ),
        ("a name that is set first is an option", "if first_read[name])", "if name)", READ),
        ("a default is set before it is read", "(node.node, node.target)", "(node.target, node.node)", READ),
    ),
    *in_file(
        "data/tokens/tokenizer.py",
        OPTIONS,
        (
            "a tokenizer is loaded without its options",
            "        set_template(tokenizer, template)\n",
            "        pass\n",
            "test_a_saved_tokenizer_has_the_options_and_so_has_what_loads_it",
        ),
    ),
    *in_file(
        "pipeline/plan/identity.py",
        PLAN,
        (
            "options do not count",
            '({"template_options": canonical(options)} if options else {})',
            "{}",
            "test_options_of_a_template_count_and_the_worker_gets_them",
        ),
    ),
    *in_file(
        "stages/stage_file.py",
        PLAN,
        (
            "a worker renders without options",
            'raw["model"].get("template_options", {})',
            "{}",
            "test_options_of_a_template_count_and_the_worker_gets_them",
        ),
    ),
    *in_file(
        "stages/shared/by_prompt.py",
        "unit/stages/test_validation.py",
        (
            "rows of one conversation are on both sides",
            "first.setdefault(where, prompt)",
            "prompt",
            "test_rows_of_one_conversation_are_on_one_side",
        ),
    ),
    *in_file(
        "stages/shared/stage_rows.py",
        ROWS,
        (
            "what a template leaves out is not noted",
            "    _note_losses(context, str(table.path), table.losses, table.records)\n",
            "",
            "test_what_a_template_leaves_out_is_noted_once_for_a_source",
        ),
    ),
]
