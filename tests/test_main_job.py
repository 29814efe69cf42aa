"""The main job in a short form: real rows, a real base, the real commands; the loss on held-out answers falls."""

import json

import pytest
from helpers import few_real_rows

from d2mora.cli import main
from d2mora.evaluate import evaluate
from d2mora.recipe import load_recipe
from d2mora.tasks import TASKS
from d2mora.train import validation_losses

TRAINED = [task for task in TASKS if task != "hellaswag"]


@pytest.fixture(scope="module")
def data(tmp_path_factory, shared):
    "The first 40 train rows and 8 test rows of each task, of hellaswag the last ones, which are long."
    order = lambda rows, task: rows[-8:] if task == "hellaswag" else rows
    return few_real_rows(tmp_path_factory.mktemp("data"), shared, 40, 8, order)


@pytest.fixture(scope="module")
def run(data, shared, tmp_path_factory):
    output = tmp_path_factory.mktemp("runs") / "mini"
    told = [f"base={shared / 'models/stories260K'}", f"data.path={data}", "data.validation_rows=28"]
    told += ["training.max_steps=20", "training.warmup_steps=4", "training.per_device_train_batch_size=8"]
    assert main(["train", "commonsense-mini", *told, "training.save_strategy=no", "--output", str(output)]) == 0
    return output


def test_held_out_loss_falls_on_each_trained_task(run):
    falls = {task: before - after for task, (before, after) in validation_losses(run).items()}
    assert set(falls) == set(TRAINED) and all(fall > 0.3 for fall in falls.values()), falls


def test_all_eight_tasks_are_graded_and_cut_prompts_counted(run, data, capsys):
    assert main(["evaluate", str(run), "--data", str(data), "--tasks", ",".join(TASKS)]) == 0
    result = json.loads((run / "evaluation-choice.json").read_text())
    assert list(result["tasks"]) == list(TASKS) and all(t["n"] == 8 for t in result["tasks"].values())
    assert result["tasks"]["hellaswag"]["shortened"] > 0 and "hellaswag" in capsys.readouterr().out
    base = evaluate(base=load_recipe(run / "recipe.yaml").base, data=str(data), tasks=TRAINED, progress=False)["tasks"]
    for task in TRAINED:  # on the test sets, too, the right word's loss falls
        assert result["tasks"][task]["answer_loss"] < base[task]["answer_loss"] - 0.1, task
