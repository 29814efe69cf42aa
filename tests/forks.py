"""Real processes without their start-up: one process imports everything, each command is a fork of it.

Shared by `kill_runs.py` and `benchmarks/chaos.py`. A fork can stop, kill or spoil itself at a file operation that is chosen beforehand.
"""

import fcntl
import os
import shutil
import signal
import sys
import time
from pathlib import Path

os.environ |= {
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "MPLBACKEND": "agg",
}

import datasets
import peft
import torch
import transformers

datasets.disable_progress_bars()
PIPE = 2**20  # bytes that a fork may say before somebody listens


class Fork:
    "A process that does `work` and says what it has to say into a pipe."

    def __init__(self, work):
        ours, theirs = os.pipe()
        fcntl.fcntl(ours, getattr(fcntl, "F_SETPIPE_SZ", 1031), PIPE)
        self.began, self.status, self.pid = time.monotonic(), None, os.fork()
        if self.pid == 0:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        else:
            os.close(theirs)
            self.pipe = ours
            return
        status = 1
        try:
            os.dup2(theirs, 1), os.dup2(theirs, 2)
            status = work() or 0
        except SystemExit as end:
            status = end.code or 0
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(status if isinstance(status, int) else 1)

    def wait(self, seconds=900.0, stopped=False):
        "Its exit status, minus the signal that ended it, 'stopped', or 'hangs'."
        until = time.monotonic() + seconds
        while self.status is None and time.monotonic() < until:
            pid, status = os.waitpid(self.pid, os.WNOHANG | (os.WUNTRACED if stopped else 0))
            if pid and os.WIFSTOPPED(status):
                return "stopped"
            if pid:
                self.status, self.seconds = os.waitstatus_to_exitcode(status), time.monotonic() - self.began
            else:
                time.sleep(0.002)
        return "hangs" if self.status is None else self.status

    def kill(self, number=signal.SIGKILL):
        if self.wait(0.001) == "hangs":
            os.kill(self.pid, number)

    def said(self):
        "All that it said; only after its end."
        with os.fdopen(self.pipe, "rb") as file:
            return file.read().decode(errors="replace")


WRITES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "shutil.rmtree"}


def writes_of(event, args, folder):
    "The path under a folder that an audit event is about to change; None if it is about something else."
    if event == "open":
        path, mode, flags = args
        if not (set(mode or "") & set("wax+") or (flags or 0) & (os.O_WRONLY | os.O_RDWR)):
            return None
    elif event not in WRITES:
        return None
    path = next((os.fspath(a) for a in args[:2] if isinstance(a, (str, Path)) and str(a).startswith(folder)), None)
    return path


def watch(folder, act):
    "In this process: call act(number, event, path) before each file operation in a folder."
    number, busy = 0, False

    def hook(event, args):
        nonlocal number, busy
        if busy or (path := writes_of(event, args, str(folder))) is None:
            return
        number, busy = number + 1, True
        try:
            act(number, event, path)
        finally:
            busy = False

    sys.addaudithook(hook)


def die_when(owner, name, applies, tear=None):
    "Replace a function: where `applies`, it does its work, `tear` spoils it, and the process is killed."
    real = getattr(owner, name)

    def wrapper(*args, **kwargs):
        if not applies(*args):
            return real(*args, **kwargs)
        if tear:
            tear(real, *args, **kwargs)
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(owner, name, wrapper)


def half(real, what, path, *args, **kwargs):
    "Write a file and leave half of it."
    real(what, path, *args, **kwargs)
    os.truncate(path, os.path.getsize(path) // 2)


POINTS = (
    "trainer_state.json",
    "rotating",
    "optimizer.pt",
    "weights",
    "rng_state.pth",
    "scheduler.pt",
    "training_args.bin",
)


def arm(point, wanted):
    "Let this process die at a point of the checkpoint write that is `wanted`, or of the first that gets there."
    if point == "weights":
        die_when(
            peft.PeftModel,
            "save_pretrained",
            lambda model, folder, *_: str(folder).endswith(wanted),
            lambda real, model, folder, **_: (Path(folder) / "adapter_model.safetensors").write_bytes(b"half"),
        )
    elif point == "trainer_state.json":
        die_when(
            transformers.TrainerState,
            "save_to_json",
            lambda state, path: wanted in path,
            lambda real, state, path: Path(path).write_text('{"global_step": '),
        )
    elif point == "rotating":
        step = lambda path: int(str(path).rpartition("-")[2])
        old = lambda path, *_: "checkpoint-" in str(path) and step(path) < step(wanted) - 4 and Path(path).exists()
        die_when(shutil, "rmtree", old, lambda real, path, *_, **__: next(Path(path).glob("*.pt")).unlink())
    else:
        die_when(torch, "save", lambda what, path, *_: wanted in str(path) and str(path).endswith(point), half)
