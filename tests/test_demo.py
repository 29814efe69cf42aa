"""The whole run, short: what `d2mora demo` leaves behind, and a user's mistakes on the way."""

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

SHORT = {"training.max_steps": 2, "training.warmup_steps": 0, "training.disable_tqdm": True, "data.tasks": ["piqa"]}


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    "A short `d2mora demo` in an empty folder."
    folder = tmp_path_factory.mktemp("demo")
    done = program("demo", "training.max_steps=12", "data.tasks=[boolq,piqa]", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / "runs" / "demo", done


def test_demo_leaves_everything(demo):
    folder, _ = demo
    for name in ("recipe.yaml", "adapter/adapter_config.json", "metrics.jsonl", "evaluation-choice.json", "before.json", "report.md"):
        assert (folder / name).is_file(), name
    report = (folder / "report.md").read_text()
    for name in ("loss", "routers", "accuracy"):
        assert f"plots/{name}.png" in report
        with Image.open(folder / "plots" / f"{name}.png") as picture:
            assert picture.width > 400 and len(picture.convert("L").getcolors(100_000)) > 10
    for path in (folder / "plots").glob("*.png"):
        assert path.with_suffix(".svg").is_file() and len(Image.open(path).text["Description"]) > 60, path.name


def test_demo_grades_before_and_after(demo):
    folder, done = demo
    before, after = (json.loads((folder / name).read_text())["tasks"] for name in ("before.json", "evaluation-choice.json"))
    assert list(before) == list(after) and all(t["n"] == 200 for t in (before | after).values())
    for task, t in after.items():
        assert f"{100 * t['accuracy']:.1f}" in done.stdout and task in done.stdout
    assert "report.md" in done.stdout and "Traceback" not in done.stderr


def test_second_demo_takes_the_next_folder(demo, monkeypatch):
    monkeypatch.chdir(demo[0].parents[1])
    taken = []
    monkeypatch.setattr(d2mora.compare, "run", lambda recipe, folder, resume: taken.append(str(folder)) or "")
    assert main(["demo"]) == 0 and taken == [os.path.join("runs", "demo-2")]


@pytest.mark.parametrize("words, parts", [
    (["train", "demo", "data.path=toy-hrad", "--output", "run"], ["toy-hard"]),
    (["train", "demo", "data.tasks=[boolq,piqua]", "--output", "run"], ["piqua", "piqa"]),
    (["demo", "training.max_steps=0"], ["max_steps"]),
])
def test_mistakes_are_one_line(tmp_path, monkeypatch, capsys, words, parts):
    monkeypatch.chdir(tmp_path)
    status, (out, err) = main(words), capsys.readouterr()
    assert status == 2 and len(err.splitlines()) == 1 and not out, err
    assert all(part in err for part in parts)
    assert not list(tmp_path.iterdir())


def test_a_run_without_experts_has_no_router_picture(tmp_path):
    recipe = load_recipe("demo", SHORT)
    recipe.adapter = {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"]}
    text = run(recipe, tmp_path / "lora")
    assert "loss.png" in text and not (tmp_path / "lora" / "plots" / "routers.png").exists()


def test_an_occupied_folder_is_refused(tmp_path):
    (tmp_path / "recipe.yaml").write_text("x")
    with pytest.raises(ValueError, match="already holds"):
        run(load_recipe("demo", SHORT), tmp_path)


# ---- a demo that was killed ----
def two_lines(folder):
    return (folder / "metrics.jsonl").is_file() and (folder / "metrics.jsonl").read_text().count("\n") >= 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_killed_demo_goes_on_to_the_end_as_it_says(number, tmp_path):
    started, folder, until = Program("demo", "training.max_steps=40", "training.logging_steps=1", "data.tasks=[piqa]", cwd=tmp_path), tmp_path / "runs" / "demo", time.monotonic() + 200
    while not two_lines(folder) and started.poll() is None and time.monotonic() < until: time.sleep(0.01)
    started.send_signal(number)
    _, said = started.communicate()
    again = ["demo", "training.max_steps=40", "training.logging_steps=1", "data.tasks=[piqa]", "--resume"]
    assert started.returncode == (0 if number == signal.SIGTERM else -number) and not (folder / "adapter").exists()
    assert number == signal.SIGKILL or said.splitlines()[-1] == f"go on with: d2mora {shlex.join(again)}" and "is saved" in said, said
    done = program(*(again if number == signal.SIGTERM else ["demo", "--resume"]), cwd=tmp_path)  # its words may be left out
    assert done.returncode == 0 and "| piqa" in done.stdout and "go on from checkpoint" in done.stderr or number == signal.SIGKILL, done.stderr
    assert all((folder / name).is_file() for name in ("evaluation-choice.json", "before.json", "report.md", "plots/accuracy.png")) and len(list(folder.parent.iterdir())) == 1
    assert len(set(map(str.strip, (folder / "metrics.jsonl").read_text().splitlines()))) >= 40


def test_a_demo_that_was_stopped_while_grading_goes_on(tmp_path, monkeypatch, capsys):
    def stopped(*_, **__): raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    words = ["demo", *(f"{key}={json.dumps(value)}" for key, value in SHORT.items())]
    with monkeypatch.context() as patch:
        patch.setattr(d2mora.compare, "evaluate", stopped)
        assert main(words) == 1 and capsys.readouterr().err.splitlines()[-1] == f"go on with: d2mora {shlex.join([*words, '--resume'])}"
    assert main(["demo", "--resume", "training.seed=7"]) == 2 and "another recipe" in capsys.readouterr().err
    assert main(["demo", "--resume"]) == 0 and "| piqa" in capsys.readouterr().out and (tmp_path / "runs/demo/before.json").is_file()
    monkeypatch.setattr(d2mora.compare, "run", lambda *_, **__: "")
    assert main(words) == 0 and "unfinished" not in capsys.readouterr().err
    (tmp_path / "runs/demo/before.json").unlink()
    assert main(words) == 0 and "runs/demo is unfinished (d2mora demo --resume goes on with it); a new demo begins in runs/demo-2" in capsys.readouterr().err


def test_no_demo_to_go_on_with(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["demo", "--resume"]) == 2 and "no demo" in capsys.readouterr().err
