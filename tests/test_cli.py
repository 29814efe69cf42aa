"""The command: its help, its versions, its exit status, its messages and their advice. What a user may get wrong is in test_bad_input.py."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import click
import pytest
import torch
import transformers
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError
from program import program

from d2mora.cli import app, explained, main, versions
from d2mora.data import read_file
from d2mora.plan import GPUS, GiB, Plan, fits
from d2mora.recipe import load_base, load_recipe
from d2mora.toy import toy_base, toy_rows
from d2mora.train import check_device, train

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


def test_the_program_itself():
    "By its own start, as a user calls it; what else needs a process is forked (`program.py`)."
    args = ["train", "demo", "adapter.r=0", "--output", "never"]
    call = [sys.executable, "-m", "d2mora.cli", *args]
    done = subprocess.run(call, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1) and "Traceback" not in done.stderr
    forked = program(*args)
    assert (forked.returncode, forked.stdout, forked.stderr) == (done.returncode, done.stdout, done.stderr)
    assert "Traceback" in program(*args, "--debug").stderr
    assert program("--version").stdout.strip() == versions() and "transformers" in versions()
    assert not os.path.exists("never")


@pytest.mark.skipif(sys.platform != "linux", reason="OpenMP of other systems says it in other words")
def test_idle_threads_do_not_spin():
    unset = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    environment = unset | {"OMP_DISPLAY_ENV": "true"}
    done = subprocess.run([sys.executable, "-c", "import d2mora"], capture_output=True, text=True, env=environment)
    assert "OMP_WAIT_POLICY = 'PASSIVE'" in done.stderr  # what OpenMP itself says when torch has loaded it


def test_what_a_library_warns_of_reaches_the_user():
    "PEFT's warning of tied embeddings, in one line; notes to programmers do not."
    words = [
        "training.max_steps=2",
        "training.warmup_steps=0",
        "data.tasks=[boolq]",
        "adapter.target_modules=[lm_head]",
    ]
    done = program("train", "demo", *words, "--dry-run")
    warned = [line for line in done.stderr.splitlines() if line.startswith("warning: ")]
    assert done.returncode == 0 and any("tie_word_embeddings" in line for line in warned)
    assert "deprecated" not in done.stderr


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
    (["demo", "--resume"], "go on with: d2mora demo --resume"),
    (["compare", "demo", "--output", "x"], "go on with: d2mora compare demo --output x"),
    (["evaluate", "--base", "toy"], "d2mora: interrupted"),
])  # fmt: skip
def test_a_stopped_command_says_how_to_go_on(words, hint, tmp_path, monkeypatch, capsys):
    def stopped(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "demo").mkdir(parents=True)
    monkeypatch.setattr("d2mora.recipe.load_recipe", stopped)
    monkeypatch.setattr("d2mora.evaluate.evaluate", stopped)
    assert main(words) == 1 and capsys.readouterr().err.splitlines()[-1] == hint


# ---- advice that fits the cause ----
SMALL = {
    "data.tasks": ["boolq"],
    "training.max_steps": 3,
    "training.warmup_steps": 0,
    "training.per_device_train_batch_size": 1,
    "training.logging_steps": 1,
}


@pytest.fixture
def long_and_short(tmp_path):
    "Fifteen rows in sixteen lose their answer to a cutoff of 60 tokens."
    rows = toy_rows("toy", "boolq", "train")[:16]
    rows = rows[:1] + [row | {"instruction": "is it so " * 40 + row["instruction"]} for row in rows[1:]]
    (tmp_path / "data/boolq").mkdir(parents=True)
    (tmp_path / "data/boolq/train.json").write_text(json.dumps(rows))
    return {"data.path": str(tmp_path / "data"), "data.cutoff": 60}


def test_a_batch_that_lost_its_answers_is_not_blamed_on_the_learning_rate(long_and_short, tmp_path):
    keys = SMALL | long_and_short
    message = "the loss is nan.*data.cutoff took their answers: set data.truncation=prompt"
    with pytest.raises(ValueError, match=message) as error:
        train(load_recipe("demo", keys | {"data.truncation": "published"}), tmp_path / "run")
    assert "learning_rate" not in str(error.value)
    train(load_recipe("demo", keys | {"data.truncation": "prompt"}), tmp_path / "mended")


@pytest.mark.parametrize("keys, what", [
    ({"data.cutoff": 20}, "all training rows"),
    ({"data.validation_rows": 2}, "all validation rows of boolq"),
])  # fmt: skip
def test_rows_that_all_lost_their_answers_are_refused_before_training(keys, what, long_and_short, tmp_path):
    with pytest.raises(
        ValueError, match=f"takes the whole answer from {what}: raise it, or set data.truncation=prompt"
    ):
        train(load_recipe("demo", SMALL | long_and_short | {"data.truncation": "published"} | keys), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_base_that_is_broken_is_not_blamed_on_the_learning_rate(tmp_path):
    base = transformers.AutoModelForCausalLM.from_pretrained(toy_base())
    base.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    shutil.copytree(toy_base(), tmp_path / "base")
    base.save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match="up_proj.*holds NaN or infinity: take another copy of the base"):
        train(load_recipe("demo", SMALL | {"base": str(tmp_path / "base")}), tmp_path / "run")


@pytest.mark.parametrize("key, value, message", [
    ("training.learning_rate", 1e30, "; lower training.learning_rate$"),
    ("adapter.lora_alpha", 1e38, "nothing is learned yet: lower adapter.lora_alpha"),
])  # fmt: skip
def test_an_infinite_gradient_is_blamed_on_what_made_it(key, value, message, tmp_path):
    with pytest.raises((ValueError, FloatingPointError), match=message):
        train(load_recipe("demo", SMALL | {"training.max_grad_norm": 0, key: value}), tmp_path / "run")


@pytest.mark.parametrize("positions, protocol", [(2, "choice"), (32, "generate"), (33, "generate")])
def test_too_long_a_prompt_in_grading_is_not_blamed_on_the_cutoff(positions, protocol, tmp_path, capsys):
    shutil.copytree(toy_base(), tmp_path / "base")
    config = json.loads((tmp_path / "base/config.json").read_text())
    (tmp_path / "base/config.json").write_text(json.dumps(config | {"max_position_embeddings": positions}))
    words = ["--data", "toy", "--tasks", "boolq", "--limit", "1", "--protocol", protocol]
    assert main(["evaluate", "--base", str(tmp_path / "base"), *words]) in (0, 2)
    err = capsys.readouterr().err
    assert "data.cutoff" not in err and "IndexError" not in err
    assert positions != 2 or "the base cannot read more" in err


@pytest.mark.parametrize(
    "training, part", [({"fp16": True}, "set training.fp16=false"), ({"use_cpu": False}, "set training.use_cpu=true")]
)
def test_a_gpu_that_is_missing(training, part, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    with pytest.raises(ValueError, match=part):
        check_device(training)


CAUSES = {
    "free memory": torch.OutOfMemoryError("CUDA out of memory"),
    "HF_TOKEN": (OSError("You are trying to access a gated repo."), GatedRepoError),
    "hf download": (OSError("We couldn't connect to 'https://huggingface.co'"), LocalEntryNotFoundError),
    "install what is missing": ImportError("bitsandbytes is missing"),
    "make it readable": PermissionError(13, "Permission denied"),
    "make room": OSError(28, "No space left on device"),
    "a hub name or a folder": OSError("no file named config.json"),
}


@pytest.mark.parametrize("advice", CAUSES)
def test_a_base_that_cannot_be_loaded(advice, monkeypatch):
    error, kind = CAUSES[advice] if isinstance(CAUSES[advice], tuple) else (CAUSES[advice], None)
    if kind:
        error.__cause__ = kind.__new__(kind)
    monkeypatch.setattr(
        transformers.AutoModelForCausalLM, "from_pretrained", lambda *_, **__: exec("raise error", {"error": error})
    )
    with pytest.raises(ValueError, match=advice) as raised:
        load_base("toy")
    assert sum(words in str(raised.value) for words in CAUSES) == 1


def test_a_file_that_cannot_be_opened_is_not_called_broken(tmp_path):
    (tmp_path / "train.json").mkdir()
    with pytest.raises(ValueError, match="make it readable"):
        read_file(tmp_path / "train.json")


def test_a_gpu_too_small_for_the_weights_is_not_blamed_on_the_batch():
    parts = {"weights": 13 * GiB, "gradients": GiB, "optimizer": GiB, "activations": 40 * GiB}
    plan = Plan({}, 0, None, 0, 0, {False: parts, True: parts}, {})
    assert "lower training.per_device_train_batch_size" in fits(plan, GPUS["A100-40"])
    small = fits(plan, replace(GPUS["A100-40"], memory=12))
    assert "batch_size" not in small and "a larger GPU" in small
