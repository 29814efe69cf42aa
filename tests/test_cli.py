"""The command: its help, its versions, its exit status, its messages and their advice. What a user may get wrong is in test_bad_input.py."""

import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import click
import pytest
import torch

import d2mora.compare
from d2mora.cli import app, explained, main, versions
from d2mora.train import check_device

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("command", ["", *app.commands])
def test_help_fits_a_screen_and_has_an_example(command, capsys):
    assert main([*command.split(), "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any("Example" in line for line in lines) and len(lines) <= 30 and max(map(len, lines)) <= 100


def not_said(readme):
    "Commands that the README's table leaves out, and options in it that a command does not have."
    rows = [re.match(r"\| `d2mora (\w+)(.*?)` \|", line) for line in readme.splitlines()]
    named = [(row[1], re.findall(r"--[a-z-]+", row[2])) for row in rows if row]
    has = {name: {option for p in command.params for option in p.opts} for name, command in app.commands.items()}
    wrong = [f"{name} {option}" for name, options in named for option in options if option not in has.get(name, ())]
    return [*(set(has) - {name for name, _ in named}), *wrong]


def test_the_readme_has_every_command():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert not_said(text) == []
    wrong = re.sub(r"\| `d2mora compare.*\n", "", text).replace("--distill", "--distil")
    assert not_said(wrong) == ["compare", "export --distil"]


def test_the_program_itself(tmp_path):
    "By its own start, as a user calls it; OpenMP itself says how its threads wait."
    call = [sys.executable, "-m", "d2mora.cli", "train", "demo", "adapter.r=0", "--output", "never"]
    env = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"}
    env |= {"HF_HUB_OFFLINE": "1", "OMP_DISPLAY_ENV": "true", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(call, capture_output=True, text=True, env=env, cwd=tmp_path)
    assert (done.returncode, done.stdout, os.listdir(tmp_path)) == (2, "", []) and "Traceback" not in done.stderr
    assert re.findall(r"^d2mora: .*r=0.*$", done.stderr, re.M) == done.stderr.splitlines()[-1:]
    assert sys.platform != "linux" or "OMP_WAIT_POLICY = 'PASSIVE'" in done.stderr


def test_debug_shows_the_traceback_and_version_all_versions(capsys):
    assert main(["train", "demo", "adapter.r=0", "--output", "never", "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err
    assert main(["--version"]) == 0 and capsys.readouterr().out.strip() == versions() and "peft" in versions()


def test_what_a_library_warns_of_reaches_the_user():
    "PEFT's warning of tied embeddings, in one line; notes to programmers do not."
    words = "training.max_steps=2 training.warmup_steps=0 data.tasks=[boolq] adapter.target_modules=[lm_head]".split()
    with warnings.catch_warnings(record=True, action="always") as seen:
        assert main(["train", "demo", *words, "--dry-run"]) == 0
        (warned,) = {str(w.message) for w in seen if "tie_word_embeddings" in str(w.message)}
        assert not any(issubclass(w.category, (DeprecationWarning, FutureWarning)) for w in seen)
        assert warnings.formatwarning(warned, UserWarning, "", 1).startswith("warning: ")
        assert warnings.formatwarning("two\nlines", UserWarning, "", 1) == "warning: two lines\n"


def test_compare_leaves_to_the_library_what_is_not_named(monkeypatch, tmp_path):
    asked = {}
    monkeypatch.setattr(d2mora.compare, "compare", lambda *_, **given: asked.update(given) or {"budget": "equal"})
    monkeypatch.setattr(d2mora.compare, "comparison_report", lambda _: "")
    assert main(["compare", "demo", "--output", str(tmp_path)]) == 0
    assert not asked.keys() & {"methods", "learning_rates"} and asked["seeds"] == [0, 1, 2, 3, 4]
    assert main(["compare", "demo", "--output", str(tmp_path), "--methods", "lora", "--learning-rates", "1e-3"]) == 0
    assert asked["methods"] == ["lora"] and asked["learning_rates"] == [1e-3]


@pytest.mark.parametrize("error, line, status", [
    (ValueError("r=0:\n give 1"), "d2mora: r=0: give 1", 2),
    (click.UsageError("no"), "d2mora: no", 2),
    (OSError(28, "No space left on device"), "make room", 2),
    (PermissionError(13, "Permission denied"), "grant access", 2),
    (KeyboardInterrupt(), "d2mora: interrupted", 1),
    (ZeroDivisionError("x"), "d2mora: ZeroDivisionError: x (--debug shows where)", 1),
])  # fmt: skip
def test_an_error_is_one_line_with_its_status(error, line, status):
    text, code = explained(error)
    assert line in text and "\n" not in text and code == status
    assert ("room" in text) == ("room" in line) and ("grant" in text) == ("grant" in line)


@pytest.mark.parametrize("words, hint", [
    (["train", "demo", "--output", "my run"], "go on with: d2mora train demo --output 'my run' --resume"),
    (["compare", "demo", "--output", "x"], "go on with: d2mora compare demo --output x"),
    (["evaluate", "--base", "toy"], "d2mora: interrupted"),
])  # fmt: skip
def test_a_stopped_command_says_how_to_go_on(words, hint, tmp_path, monkeypatch, capsys):
    def stopped(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("d2mora.recipe.load_recipe", stopped)
    monkeypatch.setattr("d2mora.evaluate.evaluate", stopped)
    assert main(words) == 1 and capsys.readouterr().err.splitlines()[-1] == hint


@pytest.mark.parametrize(
    "training, part", [({"fp16": True}, "training.fp16=false"), ({"use_cpu": False}, "use_cpu=true")]
)
def test_a_gpu_that_is_missing(training, part, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    with pytest.raises(ValueError, match=f"set .*{part}"):
        check_device(training)
