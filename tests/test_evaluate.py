"""Grading on real rows and real processes: what is batched, padded, cut or left in training mode must not change it."""

import json

import peft
import pytest
import torch

from d2mora.cli import main
from d2mora.data import read_task
from d2mora.evaluate import ANSWER_PREFIX, ask, evaluate, fitted_prompt, grade_rows, mean_chance, summary, wilson_interval, write
from d2mora.tasks import TASKS, evaluation_prompt, row_answers
from d2mora.train import load_base, load_recipe, train
from helpers import fill, our_config


@pytest.fixture(scope="module")
def stories():
    from conftest import SHARED

    if not SHARED.is_dir():
        pytest.skip(f"no shared data at {SHARED}: set D2MORA_SHARED")
    model, tokenizer = load_base(str(SHARED / "models/stories260K"))
    torch.manual_seed(0)
    return fill(peft.get_peft_model(model, our_config(lora_dropout=0.5)), std=0.05), tokenizer, str(SHARED / "data")


def rows_of(stories, task, n=12, start=0):
    return read_task(stories[2], task, "test").to_list()[start:start + n]


@pytest.mark.parametrize("task", ["boolq", "winogrande", "ARC-Easy"])
def test_choice_equals_one_forward_per_option(stories, task):
    model, tokenizer, _ = stories
    rows = rows_of(stories, task, 6)
    model.train()  # dropout 0.5: off while grading, on again afterwards
    graded = grade_rows(model, tokenizer, task, rows, batch_size=4)
    assert model.training and all(m.training for m in model.modules())
    model.eval()
    for row, g in zip(rows, graded):
        prompt = evaluation_prompt(row) + ANSWER_PREFIX
        for word in row_answers(row, task):
            ids = tokenizer(f"{prompt} {word}").input_ids
            tail = len(ids) - len(tokenizer(prompt).input_ids)
            with torch.no_grad():
                logp = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            alone = sum(float(logp[i - 1, ids[i]]) for i in range(len(ids) - tail, len(ids)))
            assert g["scores"][word] == pytest.approx(alone, abs=2e-3)
        assert g["predicted"] == max(g["scores"], key=g["scores"].get)


@pytest.mark.parametrize("style", ["plain", "official"])
def test_generate_in_a_batch_equals_batch_one(stories, style):
    model, tokenizer, _ = stories
    for task in ("boolq", "social_i_qa"):
        rows = rows_of(stories, task, 8)
        batched = grade_rows(model, tokenizer, task, rows, "generate", style, batch_size=8)
        alone = grade_rows(model, tokenizer, task, rows, "generate", style, batch_size=1)
        assert [g["text"] for g in batched] == [g["text"] for g in alone]


def test_stopping_when_decided_changes_no_prediction(stories):
    from d2mora.tasks import parse_answer

    model, tokenizer, _ = stories
    model = model.base_model.model  # any model will do; this one has heard of "true"
    prompts = [f"{word} and " for word in ("Once upon a time", "It was true", "The cat said", "one two")]
    whole = [parse_answer(text, "boolq") for text in write(model, tokenizer, prompts)]
    assert [parse_answer(text, "boolq") for text in write(model, tokenizer, prompts, "boolq")] == whole


def test_long_prompts_are_cut_at_their_beginning_and_counted(stories):
    model, tokenizer, _ = stories
    rows = rows_of(stories, "hellaswag", 12, start=9000)
    graded = grade_rows(model, tokenizer, "hellaswag", rows, batch_size=4)
    assert sum(g["shortened"] for g in graded) == sum(len(tokenizer(evaluation_prompt(r) + ANSWER_PREFIX + " ending1").input_ids) > 512 for r in rows) > 0
    for row in rows:
        prompt, length, cut = fitted_prompt(row, "hellaswag", tokenizer, "plain", ANSWER_PREFIX + " ending1", 512)
        assert length <= 512 and evaluation_prompt(row).endswith(prompt) and cut == (prompt != evaluation_prompt(row))
        assert prompt.endswith("Answer format: ending1/ending2/ending3/ending4\n\n")
    assert summary(graded, 0.25)["shortened"] == sum(g["shortened"] for g in graded)


def test_unread_answers_are_counted_and_wrong(stories):
    model, tokenizer, _ = stories
    graded = grade_rows(model, tokenizer, "winogrande", rows_of(stories, "winogrande", 6), "generate")
    unread = [g for g in graded if g["predicted"] is None]
    assert summary(graded, 0.5)["unparsed"] == len(unread) / 6 and not any(g["right"] for g in unread)


def test_chance_is_the_rows_own(stories):
    rows = rows_of(stories, "ARC-Easy", 2000)
    chance = mean_chance(rows, "ARC-Easy")
    assert {len(row_answers(r, "ARC-Easy")) for r in rows} >= {3, 4, 5} and 0.24 < chance < 0.26 and chance != 0.25


def test_wilson_interval_covers_the_truth_as_often_as_it_says():
    hits, generator = 0, torch.Generator().manual_seed(0)
    for right in torch.binomial(torch.full((4000,), 50.0), torch.full((4000,), 0.9), generator=generator).int().tolist():
        low, high = wilson_interval(right, 50)
        hits += low <= 0.9 <= high
    assert 0.93 < hits / 4000 < 0.98


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return train(load_recipe("demo", {"training.max_steps": 4, "data.tasks": ["boolq"], "training.disable_tqdm": True}), tmp_path_factory.mktemp("runs") / "run")


def test_results_files(run):
    result = evaluate(run, tasks=["boolq", "hellaswag"], limit=10)
    stored = json.loads((run / "evaluation-choice.json").read_text())
    assert json.loads(json.dumps(result)) == stored and stored["protocol"] == "choice"
    assert stored["average"] == pytest.approx(sum(t["accuracy"] for t in stored["tasks"].values()) / 2)
    for task in ("boolq", "hellaswag"):
        assert stored["tasks"][task]["n"] == 10 and 0 <= stored["tasks"][task]["accuracy"] <= 1
    lines = [json.loads(line) for line in (run / "evaluation-choice.jsonl").read_text().splitlines()]
    assert sum(line["right"] for line in lines if line["task"] == "boolq") == round(10 * stored["tasks"]["boolq"]["accuracy"])
    evaluate(run, tasks=["boolq"], limit=4, protocol="generate")
    text = (run / "report.md").read_text()
    assert "Protocol choice" in text and "Protocol generate" in text and "D2MoRA 3,4,16" in text


def test_run_adapter_folder_and_base_agree(run):
    whole, alone = (evaluate(target, data="toy", tasks=["boolq"], limit=20)["tasks"] for target in (run, run / "adapter"))
    assert whole == alone
    fresh = train(load_recipe("demo", {"training.max_steps": 1, "training.learning_rate": 0, "data.tasks": ["boolq"], "training.disable_tqdm": True}), run.parent / "fresh")
    fresh, base = (evaluate(target, base, data="toy", tasks=["boolq"], limit=20)["tasks"]["boolq"] for target, base in ((fresh, None), (None, "toy")))
    assert fresh["accuracy"] == base["accuracy"] and fresh["answer_loss"] == pytest.approx(base["answer_loss"], rel=1e-6)


def test_bad_targets(run, tmp_path, stories):
    with pytest.raises(ValueError, match="no adapter"):
        evaluate(tmp_path)
    with pytest.raises(ValueError, match="does not fit base"):
        evaluate(run, base=str(stories[2]).replace("data", "models/stories260K"))
    (tmp_path / "recipe.yaml").write_text((run / "recipe.yaml").read_text())
    with pytest.raises(ValueError, match="unfinished"):
        evaluate(tmp_path)
    (tmp_path / "data" / "boolq").mkdir(parents=True)
    (tmp_path / "data" / "boolq" / "test.json").write_text("[]")
    with pytest.raises(ValueError, match="test.json"):
        evaluate(run, data=str(tmp_path / "data"))
    with pytest.raises(ValueError, match="piqa"):
        evaluate(run, data=str(tmp_path / "data"), tasks=["piqa"])
    assert not list(tmp_path.glob("evaluation*"))


def test_ask(run, capsys):
    answers = ask("Please answer the following question with true or false, question: is it so?\n\nAnswer format: true/false", run)
    assert answers.keys() == {"base", "adapter"}
    assert main(["evaluate", str(run), "--ask", "is it so?"]) == 0
    out = capsys.readouterr().out
    assert "base:" in out and "adapter:" in out


def test_the_table_on_the_command_line(run, capsys):
    assert main(["evaluate", str(run), "--tasks", "boolq,piqa", "--limit", "5"]) == 0
    out = capsys.readouterr().out
    assert "boolq" in out and "average" in out and "95 % interval" in out
    assert set(TASKS) >= {"boolq", "piqa"}
