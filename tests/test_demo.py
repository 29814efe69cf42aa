"""The whole run, short: what `d2mora demo` leaves behind, and a user's mistakes on the way."""

import json
import os

import pytest
from PIL import Image
from program import program

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
    monkeypatch.setattr(d2mora.compare, "run", lambda recipe, folder: taken.append(str(folder)) or "")
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
