"""The eight tasks: byte-exact prompts on real rows, parsing as published, and the scorer against an obvious loop."""

import gzip
import json

import pytest
import torch
from helpers import tiny_llama
from transformers import AutoModelForCausalLM, AutoTokenizer

from d2mora.tasks import ANSWER_PREFIX, TASKS, content_pairs, evaluation_prompt, parse_answer, row_answers, score_options, training_prompt
from d2mora.toy import toy_rows


def real_rows(shared, task, count=200):
    with gzip.open(shared / "data" / task / "test.json.gz", "rt") as file:
        return json.load(file)[:count]


def stories(shared):
    folder = shared / "models" / "stories260K"
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def obvious_score(model, tokenizer, prompt, option):
    "One row, one option, no padding: the sum over the option's tokens."
    coded = tokenizer(prompt + option, return_offsets_mapping=True)
    ids, spans = coded["input_ids"], coded["offset_mapping"]
    with torch.no_grad():
        logp = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return sum(logp[i - 1, ids[i]].item() for i in range(1, len(ids)) if spans[i][1] > len(prompt))


@pytest.mark.parametrize("task", TASKS)
def test_official_prompts_are_byte_exact(shared, task):
    official = json.loads((shared / "facts" / "official_prompts.json").read_text())
    for row in real_rows(shared, task):
        for extra, key in (("", ""), ("context {x}", "_with_input")):
            r = dict(row, input=extra)
            assert "".join(training_prompt(r, "official")).encode() == official["train" + key].format(**r).encode()
            assert evaluation_prompt(r, "official").encode() == official["eval" + key].format(**r).encode()


@pytest.mark.parametrize("task", TASKS)
def test_every_real_row_is_understood(shared, task):
    for row in real_rows(shared, task, None):
        assert row["answer"] in row_answers(row, task)
        assert parse_answer(row["output"], task) == row["answer"]
        assert row["output"] == f"{ANSWER_PREFIX} {row['answer']}"


def test_a_row_offers_its_own_options():
    format = "Please …\n\nAnswer1: a Answer2: b Answer format: {}"
    assert row_answers(dict(instruction=format.format("answer1/answer2/answer3")), "ARC-Easy") == ("answer1", "answer2", "answer3")
    assert row_answers(dict(instruction=format.format("option1/option2")), "winogrande") == ("option1", "option2")
    assert row_answers(dict(instruction=format.format("yes/no")), "boolq") == ("true", "false")


def test_unknown_names_point_to_the_nearest():
    with pytest.raises(ValueError, match="'hellaswag'"):
        parse_answer("ending1", "hellaswg")
    with pytest.raises(ValueError, match="'official'"):
        training_prompt(dict(instruction="", output=""), "oficial")


def test_scorer_equals_the_obvious_loop_and_ignores_batch_and_padding(shared):
    model, tokenizer = stories(shared)
    prompts = ["Once upon a time", "Lily and the big red dog went to the park. They", "the correct answer is"]
    options = [[" there was", " a", " dog dog dog"], [" played", " ran home"], [" true", " false"]]
    batched = score_options(model, tokenizer, prompts, options)
    for p, os, scores in zip(prompts, options, batched):
        alone = score_options(model, tokenizer, [p], [os])[0]
        loop = torch.tensor([obvious_score(model, tokenizer, p, o) for o in os])
        assert torch.allclose(scores, loop, atol=1e-4) and torch.allclose(alone, loop, atol=1e-4)


def test_scorer_sees_the_token_boundary(shared):
    "A prompt's own tokens are no prefix of the joint ones: counting them would grade the wrong tokens."
    tokenizer = AutoTokenizer.from_pretrained(shared / "tokenizers" / "mistral-v1")
    prompt, option = evaluation_prompt(dict(instruction="x"), "official"), "the correct"
    joint, own = tokenizer(prompt + option)["input_ids"], tokenizer(prompt)["input_ids"]
    assert joint[:len(own)] != own
    model = tiny_llama(vocab_size=32000)
    torch.testing.assert_close(score_options(model, tokenizer, [prompt], [[option]])[0].item(),
                               obvious_score(model, tokenizer, prompt, option), rtol=1e-5, atol=1e-4)


def test_scorer_leaves_the_model_as_found(shared):
    model, tokenizer = stories(shared)
    model.train()
    model.model.layers[0].eval()
    before = [m.training for m in model.modules()]
    score_options(model, tokenizer, ["Once"], [[" upon"]])
    assert [m.training for m in model.modules()] == before
    with pytest.raises(ValueError, match="at least one token"):
        score_options(model, tokenizer, ["Once"], [[""]])
    assert [m.training for m in model.modules()] == before


@pytest.mark.parametrize("style", ["plain", "official"])
def test_toy_rows_pass_through_the_same_code(style):
    for task in TASKS:
        row = toy_rows("toy", task, "test", 4)[0]
        assert set(row) == {"instruction", "input", "output", "answer"}
        assert parse_answer("".join(training_prompt(row, style)), task) in TASKS[task].answers
        assert parse_answer(row["output"], task) == row["answer"] in row_answers(row, task)


def test_cloze_trains_on_what_content_grades(shared):
    "The prompt style and the protocol put every row alike; the answer is the right option's own text."
    from d2mora.data import read_task

    for task in TASKS:
        split = "test" if task == "hellaswag" else "train"
        for row in read_task(str(shared / "data"), task, split).to_list()[:300]:
            pairs = content_pairs(row, task)
            assert training_prompt(row, "cloze") == pairs[row_answers(row, task).index(row["answer"])] and len(set(pairs)) > 1
            assert "Answer format" not in "".join(training_prompt(row, "cloze"))
