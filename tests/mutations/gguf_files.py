"""Faults of exported GGUF files: weights in another order, wrong tokens, ends and prompts, checks that do not check."""

from __future__ import annotations

from tests.mutations.mutation import in_file

FILE = "unit/commands/export/test_as_gguf.py"
VOCABULARY = "unit/commands/export/gguf_form/test_vocabulary.py"
MODELFILE = "unit/commands/export/gguf_form/test_modelfile.py"
LLAMA = "unit/commands/export/gguf_form/test_llama_cpp_check.py"
SAME, METADATA = "test_a_policy_becomes_a_file_that_says_the_same", "test_the_metadata_are_those_of_the_specification"
WRITES = "test_the_template_writes_what_the_models_own_writes"

MUTATIONS = [
    *in_file(
        "commands/export/gguf_form/architectures.py",
        FILE,
        (
            "Q and K are in the order of transformers",
            "return halves.transpose(1, 2).reshape(weight.shape)",
            "return halves.reshape(weight.shape)",
            "test_interleaved_rows_give_the_scores_of_halves",
        ),
        (
            "rows of Q and K are paired wrongly",
            "weight.reshape(heads, 2, -1, weight.shape[-1])",
            "weight.reshape(heads, -1, 2, weight.shape[-1])",
            "test_interleaved_rows_give_the_scores_of_halves",
        ),
        (
            "the rows of K have the heads of Q",
            '"k_proj": config.num_key_value_heads}',
            '"k_proj": config.num_attention_heads}',
            SAME,
        ),
        ("K stays in the order of transformers", '"k_proj": config', '"no_proj": config', SAME),
        (
            "tied embeddings are written twice",
            "if config.tie_word_embeddings and",
            "if False and",
            "test_tied_embeddings_are_written_once",
        ),
        (
            "qwen2 is rotated as llama",
            "arch=gguf.MODEL_ARCH.QWEN2,\n        interleaved=False",
            "arch=gguf.MODEL_ARCH.QWEN2,\n        interleaved=True",
            SAME,
        ),
        (
            "heads are as wide as their number says",
            'getattr(config, "head_dim", None) or ',
            "",
            SAME,
        ),
        (
            "a stretched rotation is written as a plain one",
            'if rope.get("rope_type", "default") != "default" else []',
            "if False else []",
            "test_an_architecture_that_was_not_tested_is_refused",
        ),
        (
            "biases of attention are lost",
            'without=("attention_bias", "mlp_bias")',
            'without=("mlp_bias",)',
            "test_an_architecture_that_was_not_tested_is_refused",
        ),
    ),
    *in_file(
        "commands/export/gguf_form/gguf_file.py",
        FILE,
        (
            "norms are rounded",
            "if weight.dim() == 1:",
            "if weight.dim() == 0:",
            "test_a_narrow_type_costs_what_the_note_and_the_card_say",
        ),
        (
            "a weight becomes infinite",
            "and largest > _LARGEST_F16:",
            "and largest > 1e9 * _LARGEST_F16:",
            "test_a_weight_that_float16_cannot_hold_is_refused",
        ),
        (
            "a full disk has no name",
            "file.write(self.data)",
            "super().tofile(file)",
            "test_a_write_that_failed_has_the_systems_error",
        ),
    ),
    *in_file(
        "commands/export/gguf_form/read_back.py",
        FILE,
        (
            "metadata are not read back",
            "!= expected:",
            "!= fields[key].contents():",
            "test_metadata_that_were_written_wrong_are_not_exported",
        ),
        (
            "weights are not read back",
            "        refuse_differences(actual, expected, file)\n",
            "        pass\n",
            "test_weights_that_were_written_wrong_are_not_exported",
        ),
        (
            "any gap of a type is allowed",
            "if not gap.mean_kl <= max_gap:",
            "if not gap.mean_kl <= 1e9 + max_gap:",
            "test_too_wide_a_gap_of_a_type_is_refused",
        ),
        (
            "a file is compared with itself",
            "gap = gap_between(expected, actual)",
            "gap = gap_between(actual, actual)",
            "test_too_wide_a_gap_of_a_type_is_refused",
        ),
    ),
    *in_file(
        "commands/export/gguf_form/vocabulary.py",
        VOCABULARY,
        (
            "control tokens are ordinary words",
            'gguf.TokenType.CONTROL if token["special"]',
            'gguf.TokenType.USER_DEFINED if token["special"]',
            "test_types_tell_control_tokens_from_words_and_from_empty_rows",
        ),
        (
            "empty rows can be generated as words",
            "types.get(number, gguf.TokenType.UNUSED)",
            "types.get(number, gguf.TokenType.NORMAL)",
            "test_types_tell_control_tokens_from_words_and_from_empty_rows",
        ),
        (
            "the end of a turn is not written",
            "eot=turn_end,",
            "eot=None,",
            "test_all_tokens_that_end_an_answer_are_written",
        ),
        (
            "only EOS and the end of a turn end an answer",
            "eom=others[0] if others else None",
            "eom=None",
            "test_all_tokens_that_end_an_answer_are_written",
        ),
        (
            "stops are EOS alone",
            "stops=[texts[token] for token in stops]",
            "stops=[texts[tokenizer.eos_token_id]]",
            "test_all_tokens_that_end_an_answer_are_written",
        ),
        (
            "BOS stands in front of chats that were trained without it",
            "and all(text.startswith(tokenizer.bos_token) for text in _prompts(tokenizer))",
            "",
            "test_bos_is_not_added_to_chats_that_were_trained_without_it",
        ),
        (
            "BOS is never added",
            "return bool(front(tokenizer)) and",
            "return False and",
            "test_bos_is_added_where_the_tokenizer_adds_it_and_the_template_writes_it",
        ),
        (
            "other steps of a pre-tokenizer are overlooked",
            "if steps == rule:",
            "if steps[-1:] == rule[-1:]:",
            "test_a_rule_has_llama_cpps_name",
        ),
        (
            "the whole-word rule of llama 3 is overlooked",
            '!= (rule == "llama-bpe")',
            "and False",
            "test_llama3s_rule_takes_whole_words_before_merges",
        ),
    ),
    *in_file(
        "commands/export/gguf_form/vocabulary.py",
        FILE,
        ("EOS is the padding", "eos=tokenizer.eos_token_id", "eos=tokenizer.unk_token_id", METADATA),
        ("BOS is EOS", "bos=tokenizer.bos_token_id", "bos=tokenizer.eos_token_id", METADATA),
    ),
    *in_file(
        "commands/export/gguf_form/modelfile.py",
        MODELFILE,
        (
            "a template is not tried",
            "if bos + evaluated(template, turns) != wanted:",
            "if False:",
            "test_a_template_that_computes_is_refused",
        ),
        (
            "contents are only words",
            "yield [\n                Message(role=role, content=CONTENTS[",
            "[\n                Message(role=role, content=CONTENTS[",
            "test_a_template_that_computes_is_refused",
        ),
        (
            "BOS stands twice",
            "chat_parts(tokenizer).without_start(bos)",
            "chat_parts(tokenizer)",
            "test_bos_that_llama_cpp_adds_is_left_out",
        ),
    ),
    *in_file(
        "commands/export/gguf_form/chat_parts.py",
        MODELFILE,
        (
            "a default system turn is lost",
            'default_system=_behind(start, begin, "at the beginning")',
            'default_system=""',
            WRITES,
        ),
        (
            "what is repeated is overlooked",
            "if any(turn.content in text for turn in turns for text in texts):",
            "if False:",
            "test_a_template_that_computes_is_refused",
        ),
    ),
    *in_file(
        "commands/export/gguf_form/go_template.py",
        MODELFILE,
        (
            "braces are read as actions",
            """re.search('[{}"]', text)""",
            """re.search('["]', text)""",
            "test_strange_texts_are_quoted",
        ),
        (
            "the default system turn stands in front of every turn",
            "return index == 0",
            "return True",
            WRITES,
        ),
    ),
    *in_file(
        "commands/export/gguf_form/llama_cpp_check.py",
        LLAMA,
        (
            "other tokens in llama.cpp do not matter",
            "if ids != encode(result.tokenizer, text):",
            "if False:",
            "test_a_reply_that_differs_is_refused",
        ),
        (
            "another BOS in llama.cpp does not matter",
            'if reply["adds_bos"] != adds_bos:',
            "if False:",
            "test_a_reply_that_differs_is_refused",
        ),
        (
            "other predictions of llama.cpp do not matter",
            "if share < LEAST_SHARE:",
            "if share < 0 * LEAST_SHARE:",
            "test_other_predictions_are_refused_from_a_tenth_on",
        ),
    ),
    *in_file(
        "commands/export/driver.py",
        "unit/commands/export/test_driver.py",
        (
            "the named interpreter is ignored",
            "shutil.which(Path(named).expanduser()) if named else shutil.which(built)",
            "shutil.which(built)",
            "test_the_interpreter_is_the_one_named_or_the_one_that_was_built",
        ),
    ),
]
