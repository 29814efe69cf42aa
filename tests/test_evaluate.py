"""`evaluate` and `ask`: what is graded, on which tasks, which files are written, and what the command prints."""

import json
import shutil
from pathlib import Path

import peft
import pytest
import torch
from helpers import adapted_stories

from d2mora.cli import main
from d2mora.data import read_task
from d2mora.evaluate import ask, comparison, evaluate, mean_chance, on_device, summary, write_disagreements
from d2mora.recipe import load_base, load_recipe
from d2mora.scoring import grade_rows
from d2mora.tasks import TASKS
from d2mora.toy import toy_base
from d2mora.train import train

SHORT = {"training.disable_tqdm": True, "training.logging_steps": 1, "data.tasks": ["boolq"]}


def trained(folder, steps, **more):
    changes = {f"training.{key}": value for key, value in more.items()}
    return train(load_recipe("demo", SHORT | {"training.max_steps": steps} | changes), folder)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("runs") / "run", 4)


def test_results_files(run):
    result = evaluate(run, tasks=["boolq", "hellaswag"], limit=10)
    stored = json.loads((run / "evaluation-choice.json").read_text())
    assert json.loads(json.dumps(result)) == stored and stored["protocol"] == "choice"
    tasks = stored["tasks"]
    assert stored["average"] == pytest.approx((tasks["boolq"]["accuracy"] + tasks["hellaswag"]["accuracy"]) / 2)
    assert {"interval", "chance", "majority", "unparsed", "by_length"} < tasks["boolq"].keys() and tasks["boolq"][
        "n"
    ] == 10
    lines = [json.loads(line) for line in (run / "evaluation-choice.jsonl").read_text().splitlines()]
    assert sum(line["right"] for line in lines if line["task"] == "boolq") == round(10 * tasks["boolq"]["accuracy"])
    evaluate(run, tasks=["boolq"], limit=4, protocol="generate")
    text = (run / "report.md").read_text()
    assert all(part in text for part in ("Protocol choice", "Protocol generate", "plots/evaluation-choice.png"))
    assert "LLaMA-7B" not in text and (run / "plots/evaluation-choice.svg").is_file()


def test_run_adapter_folder_model_lora_and_base_agree(run, tmp_path):
    args = dict(data="toy", tasks=["boolq"], limit=12, progress=False)
    rounded = lambda result: json.loads(json.dumps(result["tasks"]), parse_float=lambda text: round(float(text), 5))
    assert rounded(evaluate(run, **args)) == rounded(evaluate(run / "adapter", **args))
    model, tokenizer = load_base("toy")
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "model")
    lora = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    lora.peft_config["default"].base_model_name_or_path = "toy"
    lora.save_pretrained(tmp_path / "lora")
    base = rounded(evaluate(base="toy", **args))
    for target in (tmp_path / "model", tmp_path / "lora", trained(tmp_path / "fresh", 1, learning_rate=0)):
        assert rounded(evaluate(target, **args)) == base and (target / "evaluation-choice.json").is_file()


def test_a_run_is_graded_on_the_tasks_that_it_was_trained_on(run, capsys):
    assert list(evaluate(run, limit=2)["tasks"]) == ["boolq"]
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "trained on" in line]
    assert "not on piqa, " in line and f"--tasks {','.join(TASKS)}" in line
    assert list(evaluate(run, tasks=["boolq", "piqa"], limit=2)["tasks"]) == ["boolq", "piqa"]
    assert list(evaluate(run / "adapter", data="toy", limit=2, output=run / "other")["tasks"]) == list(TASKS)
    assert "trained on" not in capsys.readouterr().err


def test_the_command_prints_the_table_and_the_papers_rows_where_asked_for(run, capsys):
    call = ["evaluate", str(run), "--tasks", "boolq,piqa", "--limit", "5"]
    assert main(call) == 0
    out = capsys.readouterr().out
    assert all(part in out for part in ("boolq", "piqa", "average", "95 % interval")) and "LLaMA-7B" not in out
    assert main([*call, "--paper"]) == 0 and "LLaMA-7B D2MoRA 3,4,16" in capsys.readouterr().out


def test_ask(run, capsys):
    assert ask("is it so?", run).keys() == {"base", "adapter"} and ask("is it so?", None, "toy").keys() == {"base"}
    assert main(["evaluate", str(run), "--ask", "is it so?"]) == 0
    out = capsys.readouterr().out
    assert all(part in out for part in ("base:", "adapter:", "| token", " A3 ", " B8 "))


def test_several_folders_are_compared(run, tmp_path, capsys):
    seeds = [trained(tmp_path / f"seed-{seed}", 2, seed=seed, save_strategy="no") for seed in (0, 1)]
    call = ["evaluate", *map(str, [*seeds, run]), "--tasks", "boolq,piqa", "--limit", "30", "--protocol", "content"]
    assert main(call) == 0
    out = capsys.readouterr().out
    expected = ("seed-0 (2 runs)", "run (1 run)", "±", "only run", "answer differently")
    assert all(part in out for part in expected)
    assert "no significant difference" in comparison(seeds, "content")
    ((path, n),) = write_disagreements([seeds[0], run], "content")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(rows) == n and all(r["a"] != r["b"] and "Answer format" in r["instruction"] for r in rows)


def test_unread_answers_are_counted_and_wrong_and_chance_is_the_rows_own(shared):
    model, tokenizer, data = adapted_stories(shared)
    rows = read_task(data, "winogrande", "test").to_list()[:6]
    graded = grade_rows(model, tokenizer, "winogrande", rows, "generate")
    unread = [g for g in graded if g["predicted"] is None]
    assert summary(graded, rows, "winogrande")["unparsed"] == len(unread) / 6 > 0 and not any(
        g["right"] for g in unread
    )
    chance = mean_chance(read_task(data, "ARC-Easy", "test").to_list(), "ARC-Easy")
    assert 0.24 < chance < 0.26 and chance != 0.25  # some questions have three or five options


def base_without(tmp, *tokens):
    "A copy of the toy base whose tokenizer lacks some special tokens."
    folder = Path(shutil.copytree(toy_base(), tmp / ("no-" + "-".join(tokens))))
    for name in ("tokenizer_config.json", "config.json", "generation_config.json"):
        if (folder / name).is_file():
            (folder / name).chmod(0o644)
            keys = json.loads((folder / name).read_text())
            (folder / name).write_text(json.dumps({k: v for k, v in keys.items() if not k.startswith(tokens)}))
    return str(folder)


@pytest.mark.parametrize("protocol", ["choice", "generate", "official"])
def test_a_base_without_pad_token_is_graded_all_the_same(tmp_path, protocol):
    base = base_without(tmp_path, "pad_token")
    assert load_base(base)[1].pad_token_id is None
    args = dict(protocol=protocol, data="toy", tasks=["piqa"], limit=12, progress=False)
    assert evaluate(base=base, **args)["tasks"] == evaluate(base="toy", **args)["tasks"]


def test_a_base_without_eos_token_is_one_line(tmp_path, capsys):
    assert main(["evaluate", "--base", base_without(tmp_path, "eos_token", "pad_token"), "--data", "toy"]) == 2
    assert "no EOS token" in capsys.readouterr().err.strip().splitlines()[-1]


def test_a_quantized_or_spread_model_stays_where_it_was_loaded(monkeypatch):
    class Refuses(torch.nn.Linear):
        def to(self, *args):
            raise ValueError("`.to` is not supported for `8-bit` bitsandbytes models")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "1")
    for name, value in (("is_quantized", True), ("hf_device_map", {"": "cuda:0"})):
        model = Refuses(1, 1)
        vars(model)[name] = value
        assert on_device(model) is model
    monkeypatch.setattr(torch.nn.Linear, "to", lambda self, device: device)
    assert on_device(torch.nn.Linear(1, 1)) == "cuda:1"
