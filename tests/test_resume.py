"""Nothing is lost: kills, SIGTERM, a full disk, two writers, and what is not finite."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import safetensors
import torch
from program import Program
from safetensors.torch import load_file
from transformers import TrainerCallback

from d2mora.cli import main
from d2mora.toy import toy_rows
from d2mora.recipe import load_recipe
from d2mora.train import checkpoints
from d2mora.utils import LOCK, locked
from d2mora.train import read_metrics
from d2mora.train import train

SMALL = {
    "adapter.target_modules": ["q_proj"], "adapter.lora_dropout": 0.1, "data.tasks": ["boolq", "piqa"], "data.validation_rows": 8,
    "training.max_steps": 8, "training.per_device_train_batch_size": 2, "training.logging_steps": 3, "training.save_strategy": "steps",
    "training.save_steps": 2, "training.use_cpu": True, "training.disable_tqdm": True,
}  # fmt: skip
WORDS = [f"{key}={json.dumps(value)}" for key, value in SMALL.items()]


def recipe(**keys):
    return load_recipe("demo", SMALL | {key.replace("__", "."): value for key, value in keys.items()})


def steps(run):
    return [int(p.name.rpartition("-")[2]) for p in checkpoints(run / "checkpoints")]


def same_weights(a, b):
    a_weights, b_weights = (load_file(run / "adapter" / "adapter_model.safetensors") for run in (a, b))
    return a_weights.keys() == b_weights.keys() and all(torch.equal(a_weights[name], b_weights[name]) for name in a_weights)


def unwatched(run):
    "The metrics without what the command's `Watch` adds, which a resume from Python does not."
    return [{key: value for key, value in line.items() if not key.startswith(("grad_norm_", "loss_", "alarms_"))} for line in read_metrics(run)]


def same(a, b):
    "Two runs ended with the same adapter, to the last bit, and the same metrics."
    return same_weights(a, b) and unwatched(a) == unwatched(b)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "An uninterrupted run."
    return train(recipe(), tmp_path_factory.mktemp("whole") / "run")


class At(TrainerCallback):
    "Does something at the end of one step."

    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step:
            self.action(model)


def interrupt(model):
    raise KeyboardInterrupt


def test_killed_twenty_times_and_not_a_bit_lost(tmp_path):
    driver = Path(__file__).with_name("kill_runs.py")
    out = subprocess.run([sys.executable, str(driver), str(tmp_path)], capture_output=True, text=True, timeout=600)
    assert out.returncode == 0, out.stderr[-2000:]
    seen = json.loads(out.stdout)
    kills = seen["kills"]
    assert len(kills) == 20 and all(kill["signal"] == signal.SIGKILL and not kill["finished"] for kill in kills), kills
    assert all(0 < kill["newest"] < seen["steps"] for kill in kills)  # after the first checkpoint, before the end
    assert sum(kill["writing"] and kill["point"] != "renamed" for kill in kills) >= 5  # inside a checkpoint write
    assert all(kill["began"] == kill["expected"] for kill in [*kills, seen["last"]]), kills
    assert all(kill["newest"] >= kill["began"] and kill["newest"] % 4 == 0 for kill in kills)
    torn = [kill for kill in kills if kill["point"] not in (None, "renamed", "rotating")]
    assert all(kill["newest"] == kill["last"] - 4 for kill in torn), torn  # the checkpoint that was being written is absent
    assert seen["last"]["status"] == 0 and same(tmp_path / "whole", tmp_path / "killed")
    assert [p.name for p in sorted((tmp_path / "killed" / "checkpoints").iterdir())] == ["checkpoint-100", "checkpoint-96"]


def begin(output, *words):
    "Start `d2mora train` as a process of its own."
    return Program("train", "demo", *WORDS, "training.max_steps=2000", "training.save_steps=1000", *words, "--output", output)


def test_sigterm_saves_and_exits_cleanly(tmp_path):
    process, metrics = begin(tmp_path / "run"), tmp_path / "run" / "metrics.jsonl"
    until = time.time() + 120
    while not (metrics.exists() and '"loss"' in metrics.read_text()) and process.poll() is None and time.time() < until:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    (step,) = steps(tmp_path / "run")
    assert process.returncode == 0 and f"checkpoint-{step} is saved" in err and "--resume" in err, err
    assert 0 < step < 1000 and not (tmp_path / "run" / "adapter").exists() and "report" not in out


def test_sigterm_and_resume_give_the_uninterrupted_adapter(tmp_path, capsys, whole):
    def terminate(model):
        os.kill(os.getpid(), signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL  # a second one would kill

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stopped:
        train(recipe(), tmp_path / "run", [At(3, terminate)])
    assert stopped.value.code == 0 and signal.getsignal(signal.SIGTERM) == before
    assert steps(tmp_path / "run") == [2, 4] and "checkpoint-4 is saved" in capsys.readouterr().err  # noted at 3, after our own callback
    train(recipe(), tmp_path / "run", resume=True)
    assert "go on from checkpoint-4" in capsys.readouterr().err and same(tmp_path / "run", whole)


class AtValidation(TrainerCallback):
    "Sends SIGTERM in the middle of the first validation from a step on."

    def __init__(self, step):
        self.step, self.batches = step, 0

    def on_prediction_step(self, args, state, control, **kwargs):
        if state.global_step >= self.step:
            self.batches += 1
            if self.batches == 3:
                os.kill(os.getpid(), signal.SIGTERM)


VALIDATING = {"training__eval_strategy": "steps", "training__eval_steps": 2, "training__per_device_eval_batch_size": 1, "training__load_best_model_at_end": True}


@pytest.fixture(scope="module")
def validated(tmp_path_factory):
    return train(recipe(**VALIDATING), tmp_path_factory.mktemp("validated") / "run")


@pytest.mark.parametrize("stop, step", [(AtValidation(4), 4), (AtValidation(8), 8), (At(3, lambda model: os.kill(os.getpid(), signal.SIGTERM)), 4)])
def test_sigterm_leaves_a_validation_that_is_made_up_for(stop, step, tmp_path, capsys, validated):
    with pytest.raises(SystemExit) as stopped:
        train(recipe(**VALIDATING), tmp_path / "run", [stop])
    assert stopped.value.code == 0 and f"checkpoint-{step} is saved" in capsys.readouterr().err
    assert not [line for line in json.loads((tmp_path / "run/checkpoints" / f"checkpoint-{step}" / "trainer_state.json").read_text())["log_history"]
                if line["step"] == step and "loss" not in line]  # fmt: skip
    train(recipe(**VALIDATING), tmp_path / "run", resume=True)
    assert same(tmp_path / "run", validated)
    states = [json.loads((run / "checkpoints" / "checkpoint-8" / "trainer_state.json").read_text()) for run in (tmp_path / "run", validated)]
    assert step == 8 or states[0]["best_global_step"] == states[1]["best_global_step"]


def test_sigterm_in_the_first_validation(tmp_path, capsys, whole):
    with pytest.raises(SystemExit) as stopped:
        train(recipe(training__per_device_eval_batch_size=1), tmp_path / "run", [AtValidation(0)])
    assert stopped.value.code == 0 and "nothing is saved" in capsys.readouterr().err
    train(recipe(training__per_device_eval_batch_size=1), tmp_path / "run", resume=True)
    assert same_weights(tmp_path / "run", whole)


def test_validating_changes_no_bit_of_training(validated, whole, tmp_path):
    often = train(recipe(**VALIDATING | {"training__load_best_model_at_end": False, "training__eval_steps": 1}), tmp_path / "run")
    assert same_weights(often, whole)


def test_every_way_of_saving_resumes_to_the_bit(tmp_path):
    ways = {
        "epoch": {"training.save_strategy": "epoch", "training.logging_steps": 4},
        "between log lines": {"training.save_steps": 5, "training.logging_steps": 4},
        "packed": {"data.sampling": "packed", "training.save_total_limit": 1},
        "by length": {"data.sampling": "by-length"},
    }
    short = {"data.tasks": ["boolq"], "data.path": str(tmp_path / "data"), "training.max_steps": 12, "data.validation_rows": 2}
    (tmp_path / "data" / "boolq").mkdir(parents=True)
    (tmp_path / "data" / "boolq" / "train.json").write_text(json.dumps(toy_rows("toy", "boolq", "train")[:12]))
    for name, keys in ways.items():
        one = load_recipe("demo", SMALL | short | keys)
        with pytest.raises(KeyboardInterrupt):
            train(one, tmp_path / name, [At(9, interrupt)])
        train(one, tmp_path / name, resume=True)
        assert same(tmp_path / name, train(one, tmp_path / f"{name} whole")), name


def test_killed_after_the_last_step(tmp_path, whole):
    shutil.copytree(whole, tmp_path / "late")
    shutil.rmtree(tmp_path / "late" / "adapter")
    train(recipe(), tmp_path / "late", resume=True)
    assert same(tmp_path / "late", whole) and steps(tmp_path / "late") == [2, 4, 6, 8]  # and no ninth step


def test_killed_before_it_wrote_anything(tmp_path, capsys, whole):
    (tmp_path / "early").mkdir()
    (tmp_path / "early" / LOCK).write_text("1\n")
    train(recipe(), tmp_path / "early", resume=True)
    assert "step 0" in capsys.readouterr().err and same(tmp_path / "early", whole)


@pytest.mark.parametrize("keep", [1, 2])
def test_the_newest_are_kept(keep, tmp_path):
    run = train(recipe(training__save_total_limit=keep), tmp_path / "run")
    assert steps(run) == [2, 4, 6, 8][-keep:] and sorted(os.listdir(run / "checkpoints")) == [f"checkpoint-{step}" for step in steps(run)]


def spoil(model):
    for name, parameter in model.named_parameters():
        if "d2mora_B" in name:
            parameter.data.normal_(std=3.0)


def test_the_best_is_kept_and_ends_as_the_adapter(tmp_path):
    best = {"training__eval_strategy": "steps", "training__eval_steps": 2, "training__load_best_model_at_end": True, "training__save_total_limit": 1}
    run = train(recipe(**best), tmp_path / "run", [At(3, spoil)])
    held = {line["step"]: line["eval_loss"] for line in read_metrics(run) if "eval_loss" in line}
    tasks = [line for line in read_metrics(run) if line["step"] == 2 and "eval_boolq_loss" in line or "eval_piqa_loss" in line]
    assert held[2] < held[4] and held[8] == held[2]  # the last line grades what was loaded
    assert len(tasks) >= 2 and steps(run) == [2, 8]  # the best, and the newest one
    chosen, saved = (load_file(path / "adapter_model.safetensors") for path in (run / "checkpoints" / "checkpoint-2", run / "adapter"))
    assert all(torch.equal(chosen[name], saved[name]) for name in chosen)
    state = json.loads((run / "checkpoints" / "checkpoint-8" / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"].endswith("checkpoints/checkpoint-2") and state["best_global_step"] == 2


def test_the_best_is_found_after_the_folder_was_moved(tmp_path):
    best = {"training__eval_strategy": "steps", "training__eval_steps": 2, "training__load_best_model_at_end": True}
    with pytest.raises(KeyboardInterrupt):
        train(recipe(**best), tmp_path / "run", [At(3, spoil), At(5, interrupt)])
    shutil.move(tmp_path / "run", tmp_path / "moved")
    train(recipe(**best), tmp_path / "moved", resume=True)
    chosen, saved = (load_file(tmp_path / "moved" / path / "adapter_model.safetensors") for path in ("checkpoints/checkpoint-2", "adapter"))
    assert all(torch.equal(chosen[name], saved[name]) for name in chosen)


def one_line(capsys, *words):
    "Run the command; it must fail with one line and exit 2. The line."
    capsys.readouterr()
    status, (out, err) = main(list(map(str, words))), capsys.readouterr()
    lines = [line for line in err.splitlines() if line.startswith("d2mora: ")]
    assert (status, out, len(lines)) == (2, "", 1) and err.rstrip().endswith(lines[0]), (status, out, err)
    return lines[0]


FULL = {
    "torch": (torch, "save", lambda: OSError(errno.ENOSPC, "No space left on device")),
    "zip writer": (torch, "save", lambda: RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0\nmore")),
    "weights": ("safetensors", "adapter", lambda: safetensors.SafetensorError("I/O error: No space left on device (os error 28)")),
}


@pytest.mark.parametrize("place", FULL)
def test_full_disk(place, tmp_path, monkeypatch, capsys, whole):
    import peft

    _, _, error = FULL[place]
    owner, name = (peft.PeftModel, "save_pretrained") if place == "weights" else (torch, "save")
    real = getattr(owner, name)

    def fails(first, path, *args, **kwargs):
        if "checkpoint-4" in str(path):
            raise error()
        return real(first, path, *args, **kwargs)

    monkeypatch.setattr(owner, name, fails)
    line = one_line(capsys, "train", "demo", *WORDS, "--output", tmp_path / "run")
    assert "checkpoint-4 cannot be written" in line and "MiB free" in line and "--resume" in line
    assert os.listdir(tmp_path / "run" / "checkpoints") == ["checkpoint-2"]
    monkeypatch.setattr(owner, name, real)
    train(recipe(), tmp_path / "run", resume=True)
    assert same(tmp_path / "run", whole)


def test_two_writers(tmp_path, capsys, whole):
    with locked(tmp_path / "run"):
        for words in ([], ["--resume"]):
            line = one_line(capsys, "train", "demo", *WORDS, "--output", tmp_path / "run", *words)
            assert "another process is writing" in line
    assert not (tmp_path / "run").exists()
    train(recipe(), tmp_path / "run")
    assert same(tmp_path / "run", whole)


def test_a_run_holds_its_folder_while_it_trains(tmp_path, capsys):
    def second(model):
        with pytest.raises(ValueError, match="another process is writing"):
            train(recipe(), tmp_path / "run", resume=True)

    train(recipe(), tmp_path / "run", [At(3, second)])
    assert (tmp_path / "run" / "adapter").exists()


def test_another_recipe_is_named_with_both_values(tmp_path, capsys, whole):
    shutil.copytree(whole, tmp_path / "run")
    line = one_line(capsys, "train", "demo", *WORDS, "adapter.r=5", "training.learning_rate=1", "--output", tmp_path / "run", "--resume")
    assert "adapter.r (3 there, 5 now)" in line and "training.learning_rate (0.003 there, 1.0 now)" in line and "lora_alpha" not in line


def test_another_number_of_processes_is_refused(tmp_path, capsys, whole):
    shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "adapter")
    (last := tmp_path / "run" / "checkpoints" / "checkpoint-8").joinpath("rng_state.pth").rename(last / "rng_state_0.pth")
    shutil.copy(last / "rng_state_0.pth", last / "rng_state_1.pth")
    assert "begun with 2 processes" in one_line(capsys, "train", "demo", *WORDS, "--output", tmp_path / "run", "--resume")


def nan_weights(model):
    next(p for name, p in model.named_parameters() if "d2mora_A" in name).data.fill_(float("nan"))


def infinite_gradient(model):
    next(p for name, p in model.named_parameters() if "d2mora_A" in name).register_hook(lambda grad: grad * float("inf"))


@pytest.mark.parametrize("spoil, what", [(nan_weights, "loss is nan"), (infinite_gradient, "gradient norm is")])
def test_what_is_not_finite_stops_the_run(spoil, what, tmp_path):
    seen = []

    class Rows(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            seen.append(state.global_step)

    with pytest.raises(FloatingPointError) as error:
        train(recipe(training__gradient_accumulation_steps=2), tmp_path / "run", [At(5, spoil), Rows()])
    text = str(error.value)
    assert "step 6" in text and what in text and "checkpoint-4" in text and "\n" not in text
    named = text.split("number): ")[1].split(";")[0].split(", ")
    assert len(named) == (2 if "loss" in what else 4)  # the micro-batch, or all of the step
    assert all(name.split()[0] in ("boolq", "piqa") and name.split()[1].isdigit() for name in named)
    assert seen[-1] == 5 and steps(tmp_path / "run") == [2, 4] and not (tmp_path / "run" / "adapter").exists()


def test_not_finite_at_once(tmp_path):
    spoiler = type("Spoiler", (TrainerCallback,), {"on_train_begin": lambda self, *args, model=None, **kwargs: nan_weights(model)})()
    with pytest.raises(ValueError, match="step 1: .*none yet; nothing is learned yet"):  # so no learning rate is to blame
        train(recipe(), tmp_path / "run", [spoiler])


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("words, part", [
    (["training.use_cpu=false"], "use_cpu=False asks for a GPU"),
    (["training.fp16=true"], "needs a GPU"),
    (["training.use_cpu=false", "training.fp16=true"], "asks for a GPU"),
])  # fmt: skip
def test_a_gpu_that_is_not_there(words, part, tmp_path, capsys):
    assert part in one_line(capsys, "train", "demo", *WORDS, *words, "--output", tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("name, value, part", [
    ("CUDA_VISIBLE_DEVICES", "3", "CUDA_VISIBLE_DEVICES=3 asks"), ("ACCELERATE_USE_CPU", "False", "the launcher asks"), ("LOCAL_RANK", "0", "the launcher asks"),
])  # fmt: skip
def test_a_gpu_that_the_environment_names(name, value, part, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv(name, value)
    words = [word for word in WORDS if "use_cpu" not in word]
    assert part in one_line(capsys, "train", "demo", *words, "--output", tmp_path / "run")
    assert not (tmp_path / "run").exists()
