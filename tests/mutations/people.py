"""Votes of people: that none is lost or counted twice, what they amount to, and whom the page answers."""

from __future__ import annotations

from tests.mutations.mutation import in_file

MUTATIONS = [
    *in_file(
        "records/votes.py",
        "unit/records/test_votes.py",
        (
            "a vote counts whatever answers it was given on",
            "if pair_key(vote.messages, vote.answers) != vote.pair:",
            "if pair_key(vote.messages, vote.answers) == vote.pair == '':",
            "test_a_line_that_was_changed_is_refused_by_number",
        ),
        (
            "a failed write leaves half a vote",
            "os.ftruncate(descriptor, before)",
            "pass",
            "test_a_vote_that_cannot_be_written_leaves_the_file_as_it_was",
        ),
        (
            "undo takes all votes on a pair back",
            "return vote.annotator, vote.pair",
            'return "", vote.pair',
            "test_a_vote_that_is_taken_back_leaves_every_other_line_as_it_is",
        ),
    ),
    *in_file(
        "evaluation/votes_on_pairs.py",
        "unit/evaluation/test_votes_on_pairs.py",
        (
            "a prompt that nobody judged is a tie",
            "return [counted.get(pair.key) for pair in self.pairs]",
            "return [counted.get(pair.key, TIE) for pair in self.pairs]",
            "test_prompts_that_nobody_judged_are_no_ties",
        ),
        (
            "a verdict from any number of prompts",
            "enough = num_judged >= FEWEST_PROMPTS",
            "enough = num_judged > 0",
            "test_too_few_prompts_give_counts_and_no_verdict",
        ),
        (
            "votes on other answers count",
            "current = [vote for vote in about if vote.pair in keys]",
            "current = about",
            "test_votes_on_other_answers_are_stale_and_said_to_be",
        ),
        (
            "identical answers count as agreement with the metric",
            "if not pair.same and value is not None and by_score is not None",
            "if value is not None and by_score is not None",
            "test_agreement_leaves_out_answers_that_are_identical",
        ),
        (
            "all equal answers are ties as soon as anything is judged",
            "end = judged[-1] if open_pairs else len(ordered)",
            "end = len(ordered)",
            "test_equal_answers_are_ties_as_far_as_people_have_come",
        ),
    ),
    *in_file(
        "evaluation/annotator_agreement.py",
        "unit/evaluation/test_votes_on_pairs.py",
        (
            "values without an order",
            'level_of_measurement="ordinal"',
            'level_of_measurement="nominal"',
            "test_alpha_is_that_of_its_paper",
        ),
    ),
    *in_file(
        "stages/evaluate/people.py",
        "unit/stages/test_people.py",
        (
            "votes may change between plan and stage",
            'if not path.is_file() or file_sha256(path) != context.spec.identity["files"][FIELD]:',
            "if not path.is_file():",
            "test_votes_that_changed_since_the_plan_stop_the_stage",
        ),
        (
            "a vote counts for the answer to the prompt of its number",
            "{name: arms[name].exchanges[index][0].text for name in (arm, against)}",
            "{name: arms[name].answers[index].text for name in (arm, against)}",
            "test_of_several_answers_people_judged_the_first",
        ),
    ),
    *in_file(
        "stages/evaluate/judging.py",
        "unit/stages/test_people.py",
        (
            "identical answers count as agreement of another judge with the metric",
            "None if texts[index] == texts_against[index] else point",
            "point",
            "test_no_judge_is_compared_with_the_metric_where_the_answers_are_identical",
        ),
    ),
    *in_file(
        "pipeline/plan/plan.py",
        "unit/pipeline/test_votes.py",
        (
            "the content of votes does not count",
            "            files=files,\n",
            "",
            "test_the_content_of_the_votes_counts_and_their_place_does_not",
        ),
    ),
    *in_file(
        "commands/judge/ballots.py",
        "unit/commands/judge/test_ballots.py",
        (
            "a pair can be judged twice",
            "if any(vote.pair == key for vote in self._own(annotator)):",
            "if any(vote.pair == key for vote in self._own(annotator)) and False:",
            "test_a_second_vote_and_an_unknown_pair_are_refused_and_nothing_is_written",
        ),
        (
            "key 1 is for the same arm at every look",
            "answers=(pair.answers[first], pair.answers[second])",
            "answers=tuple(pair.answers.values())",
            "test_a_key_stands_for_the_answer_that_was_shown_there",
        ),
    ),
    *in_file(
        "commands/judge/web_app.py",
        "unit/commands/judge/test_web_app.py",
        (
            "control characters reach the page",
            "answers=[prose(answer) for answer in standing.ballot.answers]",
            "answers=list(standing.ballot.answers)",
            "test_texts_are_escaped_and_their_control_characters_shown",
        ),
    ),
    *in_file(
        "commands/shared/guarded_app.py",
        "unit/commands/judge/test_web_app.py",
        (
            "any token opens the page",
            'if not secrets.compare_digest(first.encode("utf-8", "replace"), self._token):',
            "if not first:",
            "test_without_the_token_nothing_is_answered",
        ),
        (
            "any host name is answered",
            "allowed_hosts=HOSTS",
            'allowed_hosts=["*"]',
            "test_another_host_name_is_refused_whatever_the_token",
        ),
        (
            "pages may load anything",
            "        Middleware(_WithHeaders),\n",
            "",
            "test_every_answer_forbids_what_is_not_its_own",
        ),
    ),
    *in_file(
        "data/formats/voted_pairs.py",
        "unit/pipeline/test_votes.py",
        (
            "the rejected answer is learned",
            "rank=float(arm == preferred)",
            "rank=float(arm != preferred)",
            "test_votes_are_pairs_and_ties_are_set_aside",
        ),
        (
            "a tie is taken for a preference",
            'fields.set_aside("preferred", "says that the answers are tied")',
            "preferred = next(iter(answers))",
            "test_votes_are_pairs_and_ties_are_set_aside",
        ),
    ),
]
