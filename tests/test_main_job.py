"""The main job in a short form: real rows, a real base, the real commands; the loss on held-out answers falls."""

import json

import pytest
from program import program

from d2mora.cli import main
from d2mora.data import read_task
from d2mora.evaluate import evaluate
from d2mora.recipe import load_recipe
from d2mora.train import validation_losses
from d2mora.tasks import TASKS
from d2mora.train import train

TRAINED = [task for task in TASKS if task != "hellaswag"]


def d2mora(*args):
    "Run the command in a process of its own; its stdout."
    done = program(*args)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def data(tmp_path_factory, shared):
    "The first 160 train rows and 16 test rows of each task, as files."
    folder = tmp_path_factory.mktemp("data")
    for task in TASKS:
        (folder / task).mkdir()
        for split, n in (("train", 160), ("test", 16)):
            if (task, split) != ("hellaswag", "train"):
                rows = read_task(str(shared / "data"), task, split).remove_columns("task").to_list()
                (folder / task / f"{split}.json").write_text(json.dumps(rows[-n:] if task == "hellaswag" else rows[:n]))
    return folder, shared / "models/stories260K"


def words(data, **more):
    "What the runs here are told."
    told = {
        "base": data[1],
        "data.path": data[0],
        "data.validation_rows": 140,
        "training.max_steps": 25,
        "training.warmup_steps": 5,
        "training.per_device_train_batch_size": 8,
        "training.save_strategy": "no",
    }
    return [f"{key}={value}" for key, value in (told | more).items()]


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    output = tmp_path_factory.mktemp("runs") / "mini"
    d2mora("train", "commonsense-mini", *words(data), "--output", output)
    return output


def falls(run):
    "How far the loss on held-out answers fell, against the frozen base, in nats per target token."
    return {task: before - after for task, (before, after) in validation_losses(run).items()}


def test_held_out_loss_falls_on_each_trained_task(run):
    assert set(falls(run)) == set(TRAINED) and all(fall > 0.3 for fall in falls(run).values()), falls(run)


def test_without_learning_it_does_not(data, tmp_path):
    still = falls(
        train(
            load_recipe(
                "commonsense-mini",
                words(data, **{"training.learning_rate": 0, "training.max_steps": 2, "training.disable_tqdm": True}),
            ),
            tmp_path / "still",
        )
    )
    assert set(still) == set(TRAINED) and all(abs(fall) < 1e-6 for fall in still.values()), still


def test_all_eight_tasks_are_graded_and_cut_prompts_counted(run, data, capsys):
    assert main(["evaluate", str(run), "--data", str(data[0]), "--tasks", ",".join(TASKS), "--paper"]) == 0
    out = capsys.readouterr().out
    result = json.loads((run / "evaluation-choice.json").read_text())
    assert list(result["tasks"]) == list(TASKS) and all(t["n"] == 16 for t in result["tasks"].values())
    assert result["tasks"]["hellaswag"]["shortened"] > 0 and "hellaswag" in out and "D2MoRA" in out
    base = evaluate(base=str(data[1]), data=str(data[0]))["tasks"]
    for task in TRAINED:  # on the test sets, too, the right word's loss falls; HellaSwag's words were not trained
        assert result["tasks"][task]["answer_loss"] < base[task]["answer_loss"] - 0.1, task


def test_the_recipe_of_the_run_is_resolved(run, data):
    recipe = load_recipe(run / "recipe.yaml")
    assert recipe.base == str(data[1]) and recipe.data.path == str(data[0]) and recipe.data.tasks == TRAINED
