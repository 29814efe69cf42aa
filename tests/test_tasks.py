"""The eight tasks: byte-exact prompts on real rows, parsing as published, and each option's own text."""

import gzip
import json

import pytest
import torch

from d2mora.tasks import (
    ANSWER_PREFIX,
    TASKS,
    content_pairs,
    evaluating,
    evaluation_prompt,
    parse_answer,
    question_and_texts,
    row_answers,
    training_prompt,
)

LISTED = "Please choose the correct answer to the question: Why?\n\nAnswer1: a Answer2: b Answer format: {}"


def real_rows(shared, task):
    with gzip.open(shared / "data" / task / "test.json.gz", "rt") as file:
        return json.load(file)


@pytest.mark.parametrize("task", TASKS)
def test_prompts_of_real_rows_are_byte_exact(shared, task):
    official = json.loads((shared / "facts" / "official_prompts.json").read_text())
    for row in real_rows(shared, task)[:200]:
        for extra, key in (("", ""), ("context {x}", "_with_input")):
            r = row | {"input": extra}
            assert "".join(training_prompt(r, "official")).encode() == official["train" + key].format(**r).encode()
            assert evaluation_prompt(r, "official").encode() == official["eval" + key].format(**r).encode()
        assert training_prompt(row) == (row["instruction"] + "\n\n", row["output"])
        assert training_prompt(row)[0] == evaluation_prompt(row)


@pytest.mark.parametrize("task", TASKS)
def test_every_real_row_is_understood(shared, task):
    for row in real_rows(shared, task):
        assert row["answer"] in row_answers(row, task) and row["output"] == f"{ANSWER_PREFIX} {row['answer']}"
        assert parse_answer(row["output"], task) == row["answer"]
        pairs = content_pairs(row, task)
        cloze = training_prompt(row | {"task": task}, "cloze")
        assert cloze == pairs[row_answers(row, task).index(row["answer"])] and "Answer format" not in "".join(cloze)


@pytest.mark.parametrize(
    "text, task, answer",
    [
        ("the correct answer is solution2", "piqa", "solution2"),
        ("### Response: option1 ### Response: the correct answer is option2", "winogrande", "option2"),
        ("The answer is TRUE", "boolq", None),  # case-sensitive, as published
        ("answer5", "social_i_qa", "answer5"),  # found, though no row of the task offers it
        ("false, not true", "boolq", "false"),
    ],
)
def test_the_first_answer_word_counts(text, task, answer):
    assert parse_answer(text, task) == answer


@pytest.mark.parametrize(
    "listed, task, words",
    [
        ("answer1/answer2/answer3", "ARC-Easy", ("answer1", "answer2", "answer3")),
        ("option1/option2", "winogrande", ("option1", "option2")),
        ("yes/no", "boolq", ("true", "false")),
    ],
)
def test_a_row_offers_its_own_options(listed, task, words):
    assert row_answers({"instruction": LISTED.format(listed)}, task) == words


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: parse_answer("ending1", "hellaswg"), "'hellaswag'"),
        (lambda: training_prompt({"instruction": "", "output": ""}, "oficial"), "'official'"),
        (lambda: question_and_texts({"instruction": LISTED.format("answer1/answer2/answer3")}, "ARC-Easy"), "no text"),
        (
            lambda: content_pairs(
                {"instruction": "Fill in: no gap here. Option1: a Option2: b Answer format: option1/option2"},
                "winogrande",
            ),
            "no gap",
        ),
    ],
)
def test_mistakes_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_evaluating_leaves_every_module_in_its_mode():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Dropout(0.5)).train()
    model[0].eval()
    with pytest.raises(KeyError), evaluating(model):
        assert not any(module.training for module in model.modules())
        raise KeyError
    assert [module.training for module in model.modules()] == [True, False, True]
