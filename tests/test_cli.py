"""Bad input: ValueError in Python; on the command line one line on stderr, exit 2, and nothing written."""

import gzip
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from program import program

from d2mora.cli import app, main
from d2mora.toy import toy_base, toy_rows
from d2mora.recipe import load_recipe
from d2mora.train import train

BAD_TRAINING = {  # overrides of the recipe `demo` -> what the message must name
    "adapter.r=0": "r=0",
    "adapter.num_down_experts=0": "num_down_experts=0",
    "adapter.num_up_experts=0": "num_up_experts=0",
    "adapter.pairing=many-to-some": "many-to-many",
    "adapter.pairing=one-to-one": "num_down_experts",
    "adapter.pairing=one-to-many": "num_down_experts",
    "adapter.orthogonality_weight=-1e-4": "orthogonality_weight",
    "adapter.lora_dropout=1": "lora_dropout",
    "adapter.lora_dropout=-0.5": "lora_dropout",
    "adapter.expert_dropout=both": "expert_dropout",
    "adapter.num_experts=3": "adapter.num_up_experts",
    "adapter.peft_type=D2MORE": "D2MORA",
    "adapter.r=eight": "a whole number",
    "adapter.target_modules=[q_pro]": "q_proj",
    "data.tasks=[bolq]": "boolq",
    "data.tasks=boolq": "a list",
    "data.path=toy-hrad": "toy-hard",
    "data.path=/no/such/folder": "/no/such/folder",
    "data.prompt=oficial": "official",
    "data.truncation=cut": "published",
    "data.cutof=3": "data.cutoff",
    "data.cutoff=1": "data.cutoff",
    "data.cutoff=100000": "can read",
    "data.validation_rows=99999999": "validation_rows",
    "training.max_steps=0": "max_steps=0",
    "training.num_train_epochs=0": "num_train_epochs",
    "training.learning_rat=1": "training.learning_rate",
    "training.learning_rate=fast": "a number",
    "training.lr_scheduler_type=linea": "'linear'",
    "training.output_dir=x": "--output",
    "training.eval_strategy=steps": "validation_rows",
    "trainig.seed=1": "training.seed",
    "seed=1": "training.seed",
    "seed": "section.key=value",
    "base=./no/such/base": "./no/such/base",
    "base=": "base=NAME",
}


def one_line(capsys, *args):
    "Run the command; it must fail with one line and exit 2. The line."
    status, (out, err) = main(list(map(str, args))), capsys.readouterr()
    assert (status, out, err.count("\n")) == (2, "", 1), (status, out, err)
    return err


@pytest.mark.parametrize("override", BAD_TRAINING)
def test_bad_training_input(override, tmp_path, capsys):
    part, output = BAD_TRAINING[override], tmp_path / "run"
    with pytest.raises(ValueError) as error:
        train(load_recipe("demo", [override]), output)
    assert part in str(error.value)
    capsys.readouterr()
    assert part in one_line(capsys, "train", "demo", override, "--output", output)
    assert not output.exists() and not list(tmp_path.iterdir())


GOOD = toy_rows("toy", "boolq", "train")[0]
BAD_FILES = {  # content of boolq/train.json -> what the message must name
    "cut off": (json.dumps([GOOD] * 3)[:-40], ["train.json", "not JSON"]),
    "field missing": (json.dumps([GOOD, {k: v for k, v in GOOD.items() if k != "answer"}]), ["row 1", "answer"]),
    "no text": (json.dumps([GOOD, GOOD | {"output": 3}]), ["row 1", "output"]),
    "wrong word": (json.dumps([GOOD, GOOD, GOOD | {"answer": "yes"}]), ["row 2", "answer", "yes"]),
    "another answer": (json.dumps([GOOD | {"output": "the correct answer is " + {"true": "false", "false": "true"}[GOOD["answer"]]}]), ["row 0", "output"]),
    "no rows": ("[]", ["train.json"]),
    "no table": ('{"a": 3}', ["train.json"]),
    "not text": ("\x00\x01", ["train.json"]),
    "absent": (None, ["no train.json"]),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_data_files(name, tmp_path, capsys):
    content, parts = BAD_FILES[name]
    folder = tmp_path / "data" / "boolq"
    folder.mkdir(parents=True)
    if content is not None:
        (folder / "train.json").write_text(content)
    line = one_line(capsys, "train", "demo", f"data.path={tmp_path / 'data'}", "data.tasks=[boolq]", "--output", tmp_path / "run")
    assert all(part in line for part in [str(folder), *parts]), line
    assert not (tmp_path / "run").exists()


def test_a_damaged_archive(tmp_path, capsys):
    (tmp_path / "boolq").mkdir()
    (tmp_path / "boolq" / "train.json.gz").write_bytes(gzip.compress(json.dumps([GOOD] * 50).encode())[:-30])
    line = one_line(capsys, "train", "demo", f"data.path={tmp_path}", "data.tasks=[boolq]", "--output", tmp_path / "run")
    assert "train.json.gz" in line


@pytest.mark.parametrize("text, part", [("base: [", "not YAML"), ("- 1", "not a recipe"), ("base: toy\ndta: {}", "data"), ("base: toy\ndata: 3", "'data'")])
def test_bad_recipe_files(text, part, tmp_path, capsys):
    (tmp_path / "own.yaml").write_text(text)
    assert part in one_line(capsys, "train", tmp_path / "own.yaml", "data.path=toy", "--output", tmp_path / "run")


def test_an_unknown_recipe_names_the_nearest(tmp_path, capsys):
    assert "commonsense-mini" in one_line(capsys, "train", "comonsense-mini", "--output", tmp_path / "run")


def test_no_data_path_names_the_variable(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("D2MORA_DATA", raising=False)
    assert "D2MORA_DATA" in one_line(capsys, "train", "commonsense-mini", "base=toy", "--output", tmp_path / "run")


def test_an_output_that_holds_a_run_stays_as_it_is(tmp_path, capsys):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "weights").write_text("precious")
    before = sorted(map(str, tmp_path.rglob("*")))
    assert "already holds a run" in one_line(capsys, "train", "demo", "--output", tmp_path)
    assert sorted(map(str, tmp_path.rglob("*"))) == before
    (tmp_path / "file").write_text("x")
    assert "is a file" in one_line(capsys, "train", "demo", "--output", tmp_path / "file")


def test_a_broken_base(tmp_path, capsys):
    import shutil

    shutil.copytree(toy_base(), tmp_path / "base")
    (tmp_path / "base" / "model.safetensors").write_bytes(b"broken")
    assert "cannot be loaded" in one_line(capsys, "train", "demo", f"base={tmp_path / 'base'}", "--output", tmp_path / "run")
    (tmp_path / "base" / "config.json").unlink()
    assert "cannot be loaded" in one_line(capsys, "train", "demo", f"base={tmp_path / 'base'}", "--output", tmp_path / "run")


@pytest.mark.parametrize("args, part", [
    (["--base", "toy", "--data", "toy", "--protocol", "choise"], "choice"),
    (["--base", "toy", "--data", "toy", "--limit", "0"], "limit=0"),
    (["--base", "toy", "--data", "toy", "--limit", "many"], "many"),
    (["--base", "toy", "--data", "toy", "--batch-size", "0"], "batch_size=0"),
    (["--base", "toy", "--data", "toy", "--tasks", "bolq"], "boolq"),
    (["--base", "toy", "--data", "toy", "--prompt", "oficial"], "official"),
    (["--base", "toy", "--data", "/no/such/data"], "/no/such/data"),
    (["--base", "./nowhere"], "./nowhere"),
    (["/no/such/run"], "no adapter"),
    ([], "--base"),
    (["--protocl", "choice"], "--protocol"),
])
def test_bad_evaluation_input(args, part, capsys):
    assert part in one_line(capsys, "evaluate", *args)


@pytest.mark.parametrize("args", [["trian"], ["train"], ["train", "demo"], ["demo", "--outptu", "x"], ["demo", "adapter.r=0"]])
def test_bad_commands(args, capsys):
    one_line(capsys, *args)


@pytest.mark.parametrize("args", [["--help"], ["train", "--help"], ["evaluate", "--help"], ["demo", "--help"], ["compare", "--help"], ["export", "--help"]])
def test_help_fits_a_screen_and_has_an_example(args, capsys):
    assert main(args) == 0
    out = capsys.readouterr().out
    assert "Example" in out and len(out.splitlines()) <= 30 and max(map(len, out.splitlines())) <= 100
    assert args[0] != "evaluate" or len(out.splitlines()) <= 24 and max(map(len, out.splitlines())) <= 80


def not_said(readme):
    "Commands that the README's table leaves out, and options in it that a command does not have."
    rows = [re.match(r"\| `d2mora (\w+)(.*?)` \|", line) for line in readme.splitlines()]
    named = [(row[1], re.findall(r"--[a-z-]+", row[2])) for row in rows if row]
    has = {name: {option for p in command.params for option in p.opts} for name, command in app.commands.items()}
    return [*(set(has) - {name for name, _ in named}), *(f"{name} {option}" for name, options in named for option in options if option not in has.get(name, ()))]


def test_the_readme_has_every_command():
    text = (Path(__file__).parents[1]/"README.md").read_text()
    assert not_said(text) == []
    assert not_said(re.sub(r"\| `d2mora compare.*\n", "", text).replace("--distill", "--distil")) == ["compare", "export --distil"]


def test_the_program_itself():
    "By its own start, as a user calls it; what else needs a process is forked (`program.py`)."
    args = ["train", "demo", "adapter.r=0", "--output", "never"]
    done = subprocess.run([sys.executable, "-m", "d2mora.cli", *args], capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1) and "Traceback" not in done.stderr
    forked = program(*args)
    assert (forked.returncode, forked.stdout, forked.stderr) == (done.returncode, done.stdout, done.stderr)
    assert "Traceback" in program(*args, "--debug").stderr
    unset = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    done = subprocess.run([sys.executable, "-c", "import d2mora"], capture_output=True, text=True, env=unset | {"OMP_DISPLAY_ENV": "true"})
    assert "OMP_WAIT_POLICY = 'PASSIVE'" in done.stderr or sys.platform != "linux"  # what OpenMP itself says when torch has loaded it
    assert program("--version").stdout.startswith("d2mora ")
    assert not os.path.exists("never")


def test_what_a_library_warns_of_reaches_the_user(tmp_path):
    "PEFT's warning of tied embeddings, in one line; its and others' notes to programmers stay away."
    done = program("train", "demo", "training.max_steps=2", "training.warmup_steps=0", "data.tasks=[boolq]", "adapter.target_modules=[lm_head]", "--dry-run")
    warned = [line for line in done.stderr.splitlines() if line.startswith("warning: ")]
    assert done.returncode == 0 and any("tie_word_embeddings" in line for line in warned) and "deprecated" not in done.stderr
