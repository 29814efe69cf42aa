"""A run that was killed, asked to stop, or had no room goes on to the same adapter; what is not finite stops it."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from d2mora.cli import main
from d2mora.recipe import load_recipe
from d2mora.toy import toy_rows
from d2mora.train import defect, last_checkpoint, read_metrics, train
from d2mora.utils import LOCK, locked

SMALL = {
    "adapter.target_modules": ["q_proj"], "adapter.lora_dropout": 0.1, "data.tasks": ["boolq"], "data.validation_rows": 8,
    "training.max_steps": 8, "training.per_device_train_batch_size": 2, "training.logging_steps": 3, "training.save_strategy": "steps",
    "training.save_steps": 2, "training.use_cpu": True, "training.disable_tqdm": True,
}  # fmt: skip
WORDS = [f"{key}={json.dumps(value)}" for key, value in SMALL.items()]
VALIDATING = {
    "training.eval_strategy": "steps",
    "training.eval_steps": 2,
    "training.per_device_eval_batch_size": 1,
    "training.load_best_model_at_end": True,
}


def recipe(**keys):
    return load_recipe("demo", SMALL | keys)


def steps(run):
    found = {int(p.name.rpartition("-")[2]): defect(p) for p in (run / "checkpoints").glob("checkpoint-*")}
    return sorted(step for step, why in found.items() if not why)


def weights(folder):
    return load_file(folder / "adapter_model.safetensors")


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def same(a, b):
    "Two runs ended with the same adapter, to the last bit, and the same metrics."
    watched = ("grad_norm_", "loss_", "alarms_")  # the command's monitoring callback adds these
    lines = [[{k: v for k, v in m.items() if not k.startswith(watched)} for m in read_metrics(run)] for run in (a, b)]
    return equal(weights(a / "adapter"), weights(b / "adapter")) and lines[0] == lines[1]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "An uninterrupted run."
    return train(recipe(), tmp_path_factory.mktemp("whole") / "run")


@pytest.fixture(scope="module")
def validated(tmp_path_factory):
    "An uninterrupted run that validates and takes the best checkpoint."
    return train(recipe(**VALIDATING), tmp_path_factory.mktemp("validated") / "run")


class At(TrainerCallback):
    "Does something at the end of one step."

    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step:
            self.action(model)


class AtValidation(At):
    "Does something in the first validation from a step on."

    def on_step_end(self, *args, **kwargs):
        pass

    def on_prediction_step(self, args, state, control, **kwargs):
        if state.global_step >= self.step:
            self.step = 1000
            self.action(None)


def interrupt(model):
    raise KeyboardInterrupt


def terminate(model):
    os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL  # a second one would kill


def spoil(model):
    for name, parameter in model.named_parameters():
        if "d2mora_B" in name:
            parameter.data.normal_(std=3.0)


def test_killed_six_times_and_not_a_bit_lost(tmp_path):
    words = [sys.executable, str(Path(__file__).with_name("kill_runs.py")), str(tmp_path), "6"]
    out = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert out.returncode == 0, out.stderr[-2000:]
    seen = json.loads(out.stdout)
    kills = seen["kills"]
    assert len(kills) == 6 and all(kill["signal"] == signal.SIGKILL and not kill["finished"] for kill in kills), kills
    assert all(0 < kill["newest"] < seen["steps"] for kill in kills)  # after the first checkpoint, before the end
    assert all(kill["began"] == kill["expected"] for kill in [*kills, seen["last"]]), kills
    torn = [kill for kill in kills if kill["point"] not in (None, "rotating")]
    assert len(torn) == 2 and all(kill["writing"] and kill["newest"] == kill["last"] - 4 for kill in torn), torn
    assert seen["last"]["status"] == 0 and same(tmp_path / "whole", tmp_path / "killed")
    assert sorted(os.listdir(tmp_path / "killed" / "checkpoints")) == ["checkpoint-56", "checkpoint-60"]


@pytest.mark.parametrize("keys, stop, step", [({}, At(3, terminate), 4), (VALIDATING, AtValidation(4, terminate), 5)])
def test_sigterm_and_resume_give_the_uninterrupted_run(keys, stop, step, tmp_path, capsys, whole, validated):
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stopped:
        train(recipe(**keys), tmp_path / "run", [stop])
    assert stopped.value.code == 0 and signal.getsignal(signal.SIGTERM) == before
    assert steps(tmp_path / "run")[-1] == step and f"checkpoint-{step} is saved" in capsys.readouterr().err
    train(recipe(**keys), tmp_path / "run", resume=True)
    assert f"go on from checkpoint-{step}" in capsys.readouterr().err
    runs = tmp_path / "run", validated if keys else whole
    assert equal(*(weights(run / "adapter") for run in runs))
    held = [[(m["step"], m["eval_loss"]) for m in read_metrics(run) if "eval_loss" in m] for run in runs]
    assert held[0] == held[1]


def test_sigterm_to_the_command(tmp_path, capsys):
    "From another thread of this process, as soon as the run has begun."

    def send():
        while not (tmp_path / "run/metrics.jsonl").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    sender = threading.Thread(target=send, daemon=True)
    sender.start()
    keys = ["training.max_steps=2000", "training.save_steps=1000"]
    with pytest.raises(SystemExit, match="^0$"):
        main(["train", "demo", *WORDS, *keys, "--output", str(tmp_path / "run")])
    (step,), said = steps(tmp_path / "run"), capsys.readouterr()
    assert f"checkpoint-{step} is saved" in said.err and "--resume" in said.err and "report" not in said.out
    assert 0 < step < 1000 and not (tmp_path / "run" / "adapter").exists()


WAYS = {
    "each epoch, packed": {"training.save_strategy": "epoch", "training.eval_strategy": "epoch", "data.sampling": "packed"},
    "between log lines, by length": {"training.save_steps": 5, "training.logging_steps": 4, "data.sampling": "by-length"},
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_saving_resumes_to_the_bit(way, tmp_path):
    (tmp_path / "data/boolq").mkdir(parents=True)
    (tmp_path / "data/boolq/train.json").write_text(json.dumps(toy_rows("toy", "boolq", "train")[:12]))
    short = {"data.path": str(tmp_path / "data"), "data.validation_rows": 2, "training.max_steps": 12}
    one = recipe(**short | WAYS[way])
    with pytest.raises(KeyboardInterrupt):
        train(one, tmp_path / "run", [At(9, interrupt)])
    train(one, tmp_path / "run", resume=True)
    assert same(tmp_path / "run", train(one, tmp_path / "whole"))
    shutil.rmtree(tmp_path / "run/adapter")  # as if killed after the last step: there must be no further one
    train(one, tmp_path / "run", resume=True)
    assert same(tmp_path / "run", tmp_path / "whole")


def test_the_best_is_kept_and_ends_as_the_adapter_also_in_a_moved_folder(tmp_path):
    best = recipe(**VALIDATING, **{"training.save_total_limit": 1})
    with pytest.raises(KeyboardInterrupt):
        train(best, tmp_path / "run", [At(3, spoil), At(7, interrupt)])
    shutil.move(tmp_path / "run", tmp_path / "moved")
    run = train(best, tmp_path / "moved", resume=True)
    held = {line["step"]: line["eval_loss"] for line in read_metrics(run) if "eval_loss" in line}
    assert held[2] < held[4] and held[8] == held[2]  # the last line validates what was loaded
    assert 2 in steps(run) and equal(weights(run / "checkpoints/checkpoint-2"), weights(run / "adapter"))


def test_killed_before_it_wrote_anything(tmp_path, capsys, whole):
    (tmp_path / "early/checkpoints").mkdir(parents=True)  # made by the Trainer, before the recipe is written
    (tmp_path / "early" / LOCK).write_text("1\n")
    train(recipe(), tmp_path / "early", resume=True)
    assert "step 0" in capsys.readouterr().err and same(tmp_path / "early", whole)


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "optimizer.pt", "rng_state.pth", "trainer_state.json"])
def test_a_checkpoint_with_a_file_cut_off_or_without_its_last_file_is_passed_over(file, tmp_path, whole, capsys):
    folder = Path(shutil.copytree(whole / "checkpoints", tmp_path / "checkpoints"))
    os.truncate(folder / "checkpoint-8" / file, os.path.getsize(folder / "checkpoint-8" / file) // 2)
    (folder / "checkpoint-6" / "trainer_state.json").unlink()
    assert last_checkpoint(folder).name == "checkpoint-4" and "checkpoint-8 is incomplete" in capsys.readouterr().err


def one_line(capsys, *words):
    "Run the command; it must fail with one line and exit 2. The line."
    capsys.readouterr()
    status, (out, err) = main(["train", "demo", *WORDS, *map(str, words)]), capsys.readouterr()
    lines = [line for line in err.splitlines() if line.startswith("d2mora: ")]
    assert (status, out, len(lines)) == (2, "", 1) and err.rstrip().endswith(lines[0]), (status, out, err)
    return lines[0]


def test_full_disk(tmp_path, monkeypatch, capsys, whole):
    real = torch.save

    def fails(what, path, *args, **kwargs):
        if "checkpoint-4" in str(path):
            raise RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0\nmore")
        return real(what, path, *args, **kwargs)

    monkeypatch.setattr(torch, "save", fails)
    line = one_line(capsys, "--output", tmp_path / "run")
    assert "checkpoint-4 cannot be written" in line and "MiB free" in line and "--resume" in line
    assert os.listdir(tmp_path / "run" / "checkpoints") == ["checkpoint-2"]
    monkeypatch.setattr(torch, "save", real)
    train(recipe(), tmp_path / "run", resume=True)
    assert same(tmp_path / "run", whole)


def test_one_process_writes_into_a_folder(tmp_path, capsys):
    with locked(tmp_path / "run"):
        for words in ([], ["--resume"]):
            assert "another process is writing" in one_line(capsys, "--output", tmp_path / "run", *words)
    assert not (tmp_path / "run").exists()


def test_what_a_run_is_not_resumed_with(tmp_path, capsys, whole):
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    refused = lambda *words: one_line(capsys, *words, "--output", run, "--resume")
    line = refused("adapter.r=5", "training.learning_rate=1")
    assert "adapter.r (3 there, 5 now)" in line and "training.learning_rate (0.003 there, 1.0 now)" in line
    assert "lora_alpha" not in line
    train(recipe(), run, resume=True)
    assert "this run is finished" in capsys.readouterr().err and same(run, whole)
    shutil.rmtree(run / "adapter")
    last = run / "checkpoints" / "checkpoint-8"
    (last / "rng_state.pth").rename(last / "rng_state_0.pth")
    shutil.copy(last / "rng_state_0.pth", last / "rng_state_1.pth")
    assert "begun with 2 processes" in refused()
    rows = json.loads((run / "data.json").read_text())
    rows["boolq"]["rows"] = 799
    (run / "data.json").write_text(json.dumps(rows))
    assert "the training rows of boolq have changed since this run began" in refused()


def infinite_gradient(model):
    next(p for name, p in model.named_parameters() if "d2mora_A" in name).register_hook(lambda grad: grad * torch.inf)


def test_an_infinite_gradient_stops_the_run_before_it_is_taken(tmp_path):
    with pytest.raises(FloatingPointError, match="step 4: the gradient norm is nan: lower training.learning_rate"):
        train(recipe(), tmp_path / "run", [At(3, infinite_gradient)])
    assert steps(tmp_path / "run") == [2] and not (tmp_path / "run" / "adapter").exists()
