"""`evaluate` and `ask`: what is graded, on which tasks, which files are written, and what the command prints."""

import json
import shutil
from pathlib import Path

import peft
import pytest
import torch
from helpers import demo_run

from d2mora.cli import main
from d2mora.evaluate import ask, comparison, evaluate, on_device, read_graded
from d2mora.recipe import load_base
from d2mora.tasks import TASKS
from d2mora.toy import toy_base


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    "A run that was trained on one task."
    return demo_run(tmp_path_factory.mktemp("runs") / "run", ["boolq"])


def test_results_files_and_tables(run, capsys):
    result = evaluate(run, tasks=["boolq", "hellaswag"], limit=10, progress=False)
    stored = json.loads((run / "evaluation-choice.json").read_text())
    assert json.loads(json.dumps(result)) == stored and stored["protocol"] == "choice"
    boolq, hellaswag = stored["tasks"].values()
    assert stored["average"] == pytest.approx((boolq["accuracy"] + hellaswag["accuracy"]) / 2) and boolq["n"] == 10
    right = [g["right"] for g in read_graded(run) if g["task"] == "boolq"]
    assert sum(right) == round(10 * boolq["accuracy"])
    call = ["evaluate", str(run), "--tasks", "boolq", "--limit", "4", "--protocol", "official", "--paper"]
    assert main(call) == 0
    out = capsys.readouterr().out
    assert all(part in out for part in ("boolq", "not parsed", "95 % interval", "LLaMA-7B D2MoRA 3,4,16"))
    unread = [g for g in read_graded(run, "official") if g["predicted"] is None]
    unparsed = json.loads((run / "evaluation-official.json").read_text())["tasks"]["boolq"]["unparsed"]
    assert unread and unparsed == len(unread) / 4 and not any(g["right"] for g in unread)
    text = (run / "report.md").read_text()
    assert all(part in text for part in ("Protocol choice", "Protocol official", "plots/evaluation-choice.png"))


def test_run_adapter_model_lora_and_base_agree(run, tmp_path):
    args = dict(data="toy", tasks=["boolq"], limit=12, progress=False)
    rounded = lambda result: json.loads(json.dumps(result["tasks"]), parse_float=lambda text: round(float(text), 5))
    assert rounded(evaluate(run, output=tmp_path / "run", **args)) == rounded(evaluate(run / "adapter", **args))
    model, tokenizer = load_base("toy")
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "model")
    lora = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    lora.peft_config["default"].base_model_name_or_path = "toy"
    lora.save_pretrained(tmp_path / "lora")
    base = rounded(evaluate(base="toy", **args))
    for target in (tmp_path / "model", tmp_path / "lora"):
        assert rounded(evaluate(target, **args)) == base


def test_a_run_is_graded_on_the_tasks_that_it_was_trained_on(run, tmp_path, capsys):
    assert list(evaluate(run, limit=2, output=tmp_path / "own")["tasks"]) == ["boolq"]
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "trained on" in line]
    assert "not on piqa, " in line and f"--tasks {','.join(TASKS)}" in line
    assert list(evaluate(run / "adapter", data="toy", limit=2, output=tmp_path / "all")["tasks"]) == list(TASKS)
    assert "trained on" not in capsys.readouterr().err


def test_ask(run, capsys):
    assert ask("is it so?", None, "toy").keys() == {"base"}
    assert main(["evaluate", str(run), "--ask", "is it so?"]) == 0
    out = capsys.readouterr().out
    assert all(part in out for part in ("base:", "adapter:", "| token", " A3 ", " B8 "))


def test_several_folders_are_compared(run, tmp_path, capsys):
    other = demo_run(tmp_path / "other", scale=0.3)
    call = ["evaluate", str(other), str(run), "--tasks", "boolq,piqa", "--limit", "20", "--protocol", "content"]
    assert main(call) == 0
    out = capsys.readouterr().out
    assert all(part in out for part in ("only run", "all rows", "answer differently"))
    rows = [json.loads(line) for line in (run / "disagreements-content-other.jsonl").read_text().splitlines()]
    assert f"{len(rows)} rows" in out and all(r["a"] != r["b"] and "Answer format" in r["instruction"] for r in rows)
    assert rows and comparison([other, other], "content").count("no significant difference") == 3


def base_without(tmp, *tokens):
    "A copy of the toy base whose tokenizer lacks some special tokens."
    folder = Path(shutil.copytree(toy_base(), tmp / "base", copy_function=shutil.copyfile))
    for path in folder.glob("*config.json"):
        keys = json.loads(path.read_text())
        path.write_text(json.dumps({k: v for k, v in keys.items() if not k.startswith(tokens)}))
    return str(folder)


def test_a_base_without_pad_token_is_graded_all_the_same(tmp_path):
    args = dict(protocol="official", data="toy", tasks=["piqa"], limit=8, progress=False)
    assert evaluate(base=base_without(tmp_path, "pad_token"), **args)["tasks"] == evaluate(base="toy", **args)["tasks"]


def test_a_base_without_eos_token_is_one_line(tmp_path, capsys):
    assert main(["evaluate", "--base", base_without(tmp_path, "eos_token", "pad_token"), "--data", "toy"]) == 2
    assert "no EOS token" in capsys.readouterr().err.strip().splitlines()[-1]


def test_a_quantized_or_spread_model_stays_where_it_was_loaded(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.nn.Linear, "to", lambda self, device: device)
    for name, value in (("is_quantized", True), ("hf_device_map", {"": "cuda:0"})):
        model = torch.nn.Linear(1, 1)
        vars(model)[name] = value
        assert on_device(model) is model
    assert on_device(torch.nn.Linear(1, 1)) == "cuda:1"
