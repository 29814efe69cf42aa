"""`d2mora demo`: what it leaves behind, into which folder it goes, and how it goes on after a kill."""

import json
import os
import shlex
import signal
import time

import pytest
from PIL import Image
from program import Program, program

import d2mora.compare
from d2mora.cli import main
from d2mora.compare import run
from d2mora.recipe import load_recipe

SHORT = {
    "training.max_steps": 2,
    "training.warmup_steps": 0,
    "training.disable_tqdm": True,
    "data.tasks": ["piqa"],
}
WORDS = ["demo", *(f"{key}={json.dumps(value)}" for key, value in SHORT.items())]


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    "A short `d2mora demo` in an empty folder."
    folder = tmp_path_factory.mktemp("demo")
    done = program("demo", "training.max_steps=12", "data.tasks=[boolq,piqa]", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / "runs" / "demo", done


def test_it_leaves_adapter_log_grades_report_and_pictures(demo):
    folder, _ = demo
    names = ["recipe.yaml", "adapter/adapter_config.json", "metrics.jsonl", "evaluation-choice.json", "before.json"]
    assert [name for name in names if not (folder / name).is_file()] == []
    report = (folder / "report.md").read_text()
    for name in ("loss", "routers", "accuracy"):
        assert f"plots/{name}.png" in report
        with Image.open(folder / "plots" / f"{name}.png") as picture:
            assert picture.width > 400 and len(picture.convert("L").getcolors(100_000)) > 10
    for path in (folder / "plots").glob("*.png"):
        assert path.with_suffix(".svg").is_file() and len(Image.open(path).text["Description"]) > 60, path.name


def test_it_grades_before_and_after(demo):
    folder, done = demo
    before, after = (
        json.loads((folder / name).read_text())["tasks"] for name in ("before.json", "evaluation-choice.json")
    )
    assert list(before) == list(after) and all(t["n"] == 200 for t in (before | after).values())
    for task, t in after.items():
        assert f"{100 * t['accuracy']:.1f}" in done.stdout and task in done.stdout
    assert "report.md" in done.stdout and "Traceback" not in done.stderr


def test_a_second_demo_takes_the_next_folder(demo, monkeypatch):
    monkeypatch.chdir(demo[0].parents[1])
    taken = []
    monkeypatch.setattr(d2mora.compare, "run", lambda recipe, folder, resume: taken.append(str(folder)) or "")
    assert main(["demo"]) == 0 and taken == [os.path.join("runs", "demo-2")]


def test_a_run_without_experts_has_no_router_picture(tmp_path):
    recipe = load_recipe("demo", SHORT)
    recipe.adapter = {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"]}
    assert "loss.png" in run(recipe, tmp_path / "lora") and not (tmp_path / "lora" / "plots" / "routers.png").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_killed_demo_goes_on_to_the_end_as_it_says(number, tmp_path):
    words = ["demo", "training.max_steps=40", "training.logging_steps=1", "data.tasks=[piqa]"]
    folder, until, started = tmp_path / "runs" / "demo", time.monotonic() + 200, Program(*words, cwd=tmp_path)
    log, stopped = folder / "metrics.jsonl", number == signal.SIGTERM
    while (
        not (log.is_file() and log.read_text().count("\n") >= 2) and started.poll() is None and time.monotonic() < until
    ):
        time.sleep(0.01)
    started.send_signal(number)
    _, said = started.communicate()
    assert started.returncode == (0 if stopped else -number) and not (folder / "adapter").exists()
    if stopped:
        assert said.splitlines()[-1] == f"go on with: d2mora {shlex.join(words)} --resume" and "is saved" in said
    done = program(*(words if stopped else ["demo"]), "--resume", cwd=tmp_path)  # its words may be left out
    assert done.returncode == 0 and "| piqa" in done.stdout and (not stopped or "go on from checkpoint" in done.stderr)
    made = ("evaluation-choice.json", "before.json", "report.md", "plots/accuracy.png")
    assert [name for name in made if not (folder / name).is_file()] == [] and len(list(folder.parent.iterdir())) == 1
    assert len({line.strip() for line in log.read_text().splitlines()}) >= 40


def test_a_demo_that_was_stopped_while_grading_goes_on(tmp_path, monkeypatch, capsys):
    def stopped(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(d2mora.compare, "evaluate", stopped)
        assert main(WORDS) == 1
    assert capsys.readouterr().err.splitlines()[-1] == f"go on with: d2mora {shlex.join(WORDS)} --resume"
    assert main(["demo", "--resume", "training.seed=7"]) == 2 and "another recipe" in capsys.readouterr().err
    assert main(["demo", "--resume"]) == 0 and "| piqa" in capsys.readouterr().out
    assert (tmp_path / "runs/demo/before.json").is_file()


@pytest.mark.parametrize("finished", [True, False])
def test_a_new_demo_says_that_the_last_one_is_unfinished(finished, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(d2mora.compare, "run", lambda *_, **__: "")
    (tmp_path / "runs/demo").mkdir(parents=True)
    if finished:
        (tmp_path / "runs/demo/before.json").write_text("{}")
    assert main(["demo"]) == 0
    said = "runs/demo is unfinished (d2mora demo --resume goes on with it); a new demo begins in runs/demo-2"
    assert (said in capsys.readouterr().err) == (not finished)
