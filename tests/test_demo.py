"""`d2mora demo`: what it leaves behind, into which folder it goes, and how it goes on after it was stopped."""

import contextlib
import io
import json
import os
import shlex
import signal

import pytest
from PIL import Image

import d2mora.compare
from d2mora.analysis import Monitor
from d2mora.cli import main

WORDS = ["demo", "training.max_steps=2", "training.warmup_steps=0", 'data.tasks=["piqa"]']


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    "A short demo: its folder, and what it said."
    folder, out = tmp_path_factory.mktemp("demo") / "runs" / "demo", io.StringIO()
    with contextlib.redirect_stdout(out):
        assert main([*WORDS, "--output", str(folder)]) == 0
    return folder, out.getvalue()


def test_it_leaves_adapter_log_grades_report_and_pictures(demo):
    folder, said = demo
    names = ["recipe.yaml", "adapter/adapter_config.json", "metrics.jsonl", "evaluation-choice.json", "before.json"]
    assert [name for name in names if not (folder / name).is_file()] == []
    report = (folder / "report.md").read_text()
    for name in ("loss", "routers", "accuracy"):
        assert f"plots/{name}.png" in report
        with Image.open(folder / "plots" / f"{name}.png") as picture:
            assert picture.width > 400 and len(picture.convert("L").getcolors(100_000)) > 10
            assert picture.text["Description"] and (folder / "plots" / f"{name}.svg").is_file()
    before, after = (json.loads((folder / n).read_text())["tasks"]["piqa"] for n in names[-1:-3:-1])
    assert before["n"] == after["n"] == 200 and f"{100 * after['accuracy']:.1f}" in said and "report.md" in said


def terminated(self, args, state, control, **_):
    if state.global_step == 0:
        signal.raise_signal(signal.SIGTERM)


@pytest.mark.parametrize("where", ["training", "grading"])
def test_a_demo_that_was_stopped_goes_on_to_the_end(where, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patch:
        if where == "training":
            patch.setattr(Monitor, "on_step_begin", terminated)
            with pytest.raises(SystemExit):
                main(WORDS)
        else:
            patch.setattr(d2mora.compare, "evaluate", lambda *_, **__: signal.raise_signal(signal.SIGINT))
            assert main(WORDS) == 1
    assert f"go on with: d2mora {shlex.join(WORDS)} --resume\n" in capsys.readouterr().err
    assert (tmp_path / "runs/demo/adapter").exists() == (where == "grading")
    assert main(["demo", "--resume", "training.seed=7"]) == 2 and "another recipe" in capsys.readouterr().err
    assert main(["demo", "--resume"]) == 0 and "| piqa" in capsys.readouterr().out  # its words may be left out
    assert (tmp_path / "runs/demo/before.json").is_file() and os.listdir(tmp_path / "runs") == ["demo"]


@pytest.mark.parametrize("finished", [True, False])
def test_a_new_demo_takes_the_next_folder_and_names_an_unfinished_one(finished, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    taken = []
    monkeypatch.setattr(d2mora.compare, "run", lambda recipe, folder, resume: taken.append(str(folder)) or "")
    (tmp_path / "runs/demo").mkdir(parents=True)
    if finished:
        (tmp_path / "runs/demo/before.json").write_text("{}")
    assert main(["demo"]) == 0 and taken == [os.path.join("runs", "demo-2")]
    said = "runs/demo is unfinished (d2mora demo --resume goes on with it); a new demo begins in runs/demo-2"
    assert (said in capsys.readouterr().err) == (not finished)
