"""A hundred seeded faults thrown at train, evaluate, compare and export; after each the command is given again and must reach, bit for bit,
what an undisturbed run reaches: `python benchmarks/chaos.py --faults 8` for a short form. Writes benchmarks/results/chaos.json.

Each command is a real process, a fork of this one (tests/forks.py). A moment is drawn in seconds, or as the number of a file operation.
"""

import gc
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from common import ROOT, command_line, store, versions

sys.path.insert(0, str(ROOT / "tests"))

from forks import POINTS, Fork, arm, watch

import d2mora.analysis
import d2mora.cli
import d2mora.compare
import d2mora.export  # (all before the forks, which then need not)
from d2mora.recipe import load_base
from d2mora.train import defect
from d2mora.toy import toy_rows

TASKS = ("boolq", "piqa")
SMALL = {
    "adapter.lora_dropout": 0.1, "adapter.target_modules": ["q_proj", "v_proj"], "data.tasks": list(TASKS), "data.train_on_inputs": True, "training.max_steps": 12,
    "training.save_strategy": "steps", "training.save_steps": 3, "training.logging_steps": 1, "training.warmup_steps": 2,
    "training.per_device_train_batch_size": 2, "training.use_cpu": True, "training.disable_tqdm": True,
}  # fmt: skip
VALIDATES = {"training.gradient_accumulation_steps": 2, "training.eval_strategy": "steps", "training.eval_steps": 4}
VALIDATES |= {"data.validation_rows": 6}
BY_LENGTH = {"data.sampling": "by-length", "training.save_strategy": "epoch"}
BY_LENGTH |= {"training.save_total_limit": 2, "training.max_steps": 20}
PACKAGES = ("accelerate", "datasets", "safetensors", "filelock")
PAGE = 4096
UNEVEN = ("training_args.bin",)  # holds a time; nothing is read from it


def words(**more):
    return [f"{key}={value if key == 'data.path' else json.dumps(value)}" for key, value in (SMALL | more).items()]


@dataclass
class Case:
    "A command whose result lies in one folder."

    command: str
    words: list[str]  # without the folder
    processes: int = 1
    draws: bool = False  # with the pictures that `train` ends with; they take longer than the rest
    prepared: str = ""  # another case whose result is there beforehand
    events: list = field(default_factory=list)  # (event, path) of each file operation of an undisturbed run
    seconds: float = 0.0  # that it took
    bytes: tuple = (0, 0)  # in its folder, before and after
    largest: int = 0  # bytes of its largest new file


class Place:
    "Where everything happens: data, references, and one folder `out/run` that each command writes to, since files name their folder."

    def __init__(self, root):
        self.root, self.data, self.out, self.kept = root, root / "data", root / "out", root / "kept"
        self.run = self.out / "run"
        self.out.mkdir(), self.kept.mkdir()
        for task in TASKS:
            (self.data / task).mkdir(parents=True)
            for split, count in (("train", 17), ("test", 12)):
                rows = toy_rows("toy", task, split)[:count]
                (self.data / task / f"{split}.json").write_text(json.dumps(rows, indent=1))
        own = {"data.path": str(self.data)}
        graded = ["--tasks", ",".join(TASKS), "--batch-size", "3", "--data", str(self.data)]
        few = {"training.max_steps": 4, "training.save_steps": 2, "data.validation_rows": 6}
        self.cases = {
            "train": Case("train", ["train", "demo", *words(**own, **VALIDATES)]),
            "train by length": Case("train", ["train", "demo", *words(**own, **BY_LENGTH)]),
            "train with pictures": Case("train", ["train", "demo", *words(**own)], draws=True),
            "train, two processes": Case("train", ["train", "demo", *words(**own)], 2),
            "evaluate choice": Case("evaluate", ["evaluate", *graded, "--protocol", "choice"], prepared="train"),
            "evaluate official": Case("evaluate", ["evaluate", *graded, "--protocol", "official", "--limit", "6"], prepared="train"),
            "evaluate, two processes": Case("evaluate", ["evaluate", *graded, "--protocol", "generate"], 2, prepared="train"),
            "compare": Case("compare", ["compare", "demo", *words(**own | few), "--methods", "lora,d2mora", "--seeds", "0", "--learning-rates", "0.003", "--limit", "6"]),
            "compare rates": Case("compare", ["compare", "demo", *words(**own | few), "--methods", "d2mora", "--seeds", "1", "--learning-rates", "0.001,0.003", "--limit", "6"]),
            "export": Case("export", ["export", str(self.kept / "train"), "--tasks", "boolq", "--rows", "8", "--limit", "8", "--rank", "3", "--distill", "4"]),
        }  # fmt: skip

    def line(self, case, resume=False):
        "The command line of a case."
        at = {"evaluate": [str(self.run)], "export": [str(self.run)]}.get(case.command, ["--output", str(self.run)])
        return [*case.words, *at, *["--resume"] * resume]

    def begin(self, case):
        "Clear the folder for a case."
        for path in self.out.iterdir():
            shutil.rmtree(path)
        if case.prepared:
            shutil.copytree(self.kept / case.prepared, self.run)

    def start(self, case, resume=False, inside=None, rank=0, more=()):
        "Start a command; in its process `rank`, `inside()` is called first. Its processes."
        port = free_port() if case.processes > 1 else 0
        own = lambda r: command([*self.line(case, resume), *more], case, r, port, inside if r == rank else None)
        return [Fork(lambda r=r: own(r)) for r in range(case.processes)]

    def whole(self, case, **more):
        "A command that nothing disturbs, or that runs on its own into its fault: its exit status, and what it said."
        forks = self.start(case, **more)
        return together(forks)

    def finish(self, case):
        "Give the command again, as its own messages say. None, or what went wrong."
        status, said = self.whole(case, resume=case.command == "train")
        if status == 2 and "leave --resume out" in said:
            status, said = self.whole(case)
        if case.command == "export" and "that is not there yet" in said:  # it was whole before the fault
            return None
        return None if status == 0 else f"on going on: status {status}: {said[-600:]}"

    def reference(self, name):
        "Run a case undisturbed, twice; keep the result, count its file operations. The names of files that differ between the two."
        case, log = self.cases[name], self.root / "events.jsonl"
        self.begin(case)
        before, old = size(self.run), set(self.run.rglob("*"))

        def counting():
            file = log.open("w", buffering=1)
            watch(self.out, lambda number, event, path: file.write(json.dumps([event, path]) + "\n"))

        began = time.monotonic()
        status, said = self.whole(case, inside=counting)
        assert status == 0, (name, status, said)
        case.seconds, case.bytes = time.monotonic() - began, (before, size(self.run))
        case.largest = max(path.stat().st_size for path in self.run.rglob("*") if path.is_file() and path not in old)
        case.events = [json.loads(line) for line in log.read_text().splitlines()]
        shutil.copytree(self.run, self.kept / name)
        self.begin(case)
        status, said = self.whole(case)
        assert status == 0, (name, status, said)
        return sorted(self.differences(name))

    def differences(self, name, stopped=False):
        "Files of the undisturbed result that are missing or other here, with their bytes; and files that are left over, with 0."
        there, here = (tree(folder) for folder in (self.kept / name, self.run))
        noted = "trainer_state.json" if stopped else "/"  # the Trainer's own state notes that it was asked to stop
        equal = lambda path: alike(path, there[path], here[path]) or path.endswith(noted)
        lost = {path: len(content) for path, content in there.items() if path not in here or not equal(path)}
        later = lambda path: stopped and path.startswith("checkpoints/checkpoint-")
        extra = [path for path in here.keys() - there.keys() if not later(path)]
        return lost | dict.fromkeys(extra + [path.name for path in self.out.iterdir() if path != self.run], 0)

    def half_written(self, name, stopped=False):
        "Files that bear their final name and are not what they are to be. What grows by lines may be shorter; what depends on others is left out."
        there, here = tree(self.kept / name), tree(self.run) if self.run.exists() else {}
        settled = ["safetensors", "adapter_config.json", "recipe.yaml", "data.json", ".pt", ".pth", "export.json"]
        settled = tuple(settled + ["trainer_state.json"] * (not stopped))
        aside = lambda path: any(part.startswith(".") or ".tmp" in part for part in Path(path).parts)
        final = [path for path in here if path in there and path.endswith(settled) and not aside(path)]
        folders = [folder for folder in self.run.glob("checkpoints/checkpoint-*") if defect(folder)]
        torn = tuple(f"{folder.relative_to(self.run)}/" for folder in folders)  # left out on resuming
        return [path for path in final if not path.startswith(torn) and not alike(path, there[path], here[path])]


def command(line, case, rank, port, inside):
    "What a fork does: be process `rank` of a command."
    if case.processes > 1:
        own = {"RANK": rank, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        own |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), case.processes)
        os.environ |= {key: str(value) for key, value in own.items()} | {"ACCELERATE_USE_CPU": "true"}
    if not case.draws:
        d2mora.analysis.draw = lambda *args, **kwargs: []
    if inside:
        inside()
    return d2mora.cli.main(line)


def together(forks, patience=60.0):
    "Wait for the processes of one command, as torchrun does: where one fails, the others are asked to end, then made to."
    if len(forks) == 1:
        status = forks[0].wait()
        return status, ended(forks[0])
    until = time.monotonic() + 900
    while time.monotonic() < until and "hangs" in [fork.wait(0.01) for fork in forks]:
        if any(fork.status not in (None, 0) for fork in forks):
            break
    for fork in forks:
        fork.wait(patience / 2)
    for fork in forks:
        fork.kill(signal.SIGTERM)
    states, said = [fork.wait(patience / 2) for fork in forks], "".join(map(ended, forks))
    return "hangs" if "hangs" in states else next((state for state in states if state != 0), 0), said


def ended(fork):
    "What a process said; one that hangs is killed."
    if fork.status is None:
        fork.kill()
        fork.wait()
    return fork.said()


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def size(folder):
    "Bytes of a folder's files, in whole pages, as a tmpfs counts them."
    files = [path for path in folder.rglob("*") if path.is_file()] if folder.exists() else []
    return sum(-(-path.stat().st_size // PAGE) * PAGE for path in files)


def tree(folder, but=""):
    "Each file's content by its name."
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in (*UNEVEN, but)]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def alike(path, a, b):
    "Whether two files are equal; a Trainer's state without its times."
    if a == b or not path.endswith("trainer_state.json"):
        return a == b
    try:
        return timeless(json.loads(a)) == timeless(json.loads(b))
    except ValueError:
        return False


def timeless(value):
    if isinstance(value, dict):
        return {key: timeless(own) for key, own in value.items() if not key.endswith(("_runtime", "_per_second"))}
    return [timeless(own) for own in value] if isinstance(value, list) else value


def one_line(status, said, *parts):
    "None if a command ended with status 2 and one line that says these; else what is wrong."
    lines = [line for line in said.splitlines() if line.startswith("d2mora: ")]
    good = status == 2 and len(lines) == 1 and "Traceback" not in said and all(part in lines[0] for part in parts)
    return None if good else f"status {status}, not one line with {parts}: {said[-600:]}"


def at_operation(place, number, act):
    "For `inside`: call `act` before the file operation of this number."
    return lambda: watch(place.out, lambda n, event, path: n == number and act())


def kill(number=signal.SIGKILL):
    os.kill(os.getpid(), number)


def unless(holds, status, said):
    "None, or what a command did where something else was expected."
    return None if holds else f"status {status}: {said[-600:]}"


class Missed(Exception):
    "The fault came too late, or not at all: draw again."


# Faults. Each takes the place, a case, and dice; disturbs the case; returns (where, complaint or None).


def at_moment(place, case, dice, number=signal.SIGKILL):
    "A signal at a random moment of the run."
    moment, rank = dice.uniform(0, 0.95 * case.seconds), dice.randrange(case.processes)
    forks = place.start(case)
    time.sleep(moment)
    forks[rank].kill(number)
    status, said = together(forks)
    if forks[rank].status == 0 and "stopped by SIGTERM" not in said:
        raise Missed
    return f"{moment / case.seconds:.2f} of the time, process {rank}", "hangs" if status == "hangs" else None


def at_write(place, case, dice, number=signal.SIGKILL):
    "A signal before a file operation, drawn from all that an undisturbed run does."
    chosen = dice.randrange(len(case.events))

    forks = place.start(case, inside=at_operation(place, chosen + 1, lambda: kill(number)))
    status, said = together(forks)
    event, path = case.events[chosen]
    if forks[0].status == 0 and "stopped by SIGTERM" not in said:
        raise Missed
    where = f"operation {chosen + 1} of {len(case.events)}, {event} {Path(path).name}"
    return where, "hangs" if status == "hangs" else None


def torn_checkpoint(place, case, dice):
    "A kill in the middle of writing a part of a checkpoint, half of it written."
    point, step = dice.choice([p for p in POINTS if p != "rotating"]), dice.choice((6, 9, 12))
    status, said = place.whole(case, inside=lambda: arm(point, f"checkpoint-{step}"))
    return f"{point} of checkpoint-{step}", None if status == -signal.SIGKILL else f"status {status}: {said[-600:]}"


def full_disk(place, case, dice):
    "No room after a random part of what the run writes: a small tmpfs, given room afterwards; without the right to mount, as `file_limit`."
    if not mounts():
        return file_limit(place, case, dice)
    before, after = case.bytes
    room = before + int(dice.uniform(0.05, 0.85) * (after - before))
    place.begin(Case("", []))
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={room}", "none", place.out], check=True)
    place.begin(case)
    status, said = place.whole(case)
    subprocess.run(["mount", "-o", "remount,size=1g", place.out], check=True)
    if status == 0:
        raise Missed
    return f"{room} bytes of room", one_line(status, said, "make room")


def file_limit(place, case, dice):
    "No file may become larger than a random size (RLIMIT_FSIZE)."
    import resource

    limit = int(dice.uniform(0.02, 0.9) * case.largest)
    limits = (limit, resource.RLIM_INFINITY)
    status, said = place.whole(case, inside=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limits))
    if status == 0:
        raise Missed
    return f"files up to {limit} bytes", one_line(status, said, "make room")


def read_only(place, case, dice):
    "From a file operation on, or from the beginning, nothing may be written in the folder."
    chosen = dice.choice((0, dice.randrange(len(case.events))))
    status, said = place.whole(case, inside=at_operation(place, chosen + 1, lambda: forbid(place.out)))
    forbid(place.out, False)
    if status == 0:
        raise Missed
    return f"from operation {chosen + 1} of {len(case.events)}", one_line(status, said, "")


def dead_worker(place, case, dice):
    "One of two processes is killed; the other must end, by itself or when asked to."
    return dice.choice((at_moment, at_write))(place, case, dice)


def changed_data(place, case, dice):
    "The run is killed; a training file changes, also within its old time; going on is refused and changes nothing."
    begun = [n for n, (event, path) in enumerate(case.events) if "data" in Path(path).name and event == "os.rename"][0]
    last = max(n for n, (event, path) in enumerate(case.events) if "adapter" in Path(path).name)
    late = dice.randrange(begun + 2, last)
    status, said = place.whole(case, inside=at_operation(place, late, kill))
    file = place.data / dice.choice(TASKS) / "train.json"
    text, times = file.read_text(), file.stat()
    how = dice.choice(("a row more", "a row less", "two rows swapped", "one word, same time"))
    rows = json.loads(text)
    rows = {"a row more": [*rows, rows[0]], "a row less": rows[:-1], "two rows swapped": [rows[1], rows[0], *rows[2:]],
            "one word, same time": [rows[0] | {"instruction": "So " + rows[0]["instruction"]}, *rows[1:]]}[how]  # fmt: skip
    file.write_text(json.dumps(rows, indent=1))
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    before = tree(place.run, but=".lock")
    refused = one_line(*place.whole(case, resume=case.command == "train"), "have changed since this run began")
    changed = tree(place.run, but=".lock") != before and "the refusal changed the folder"
    file.write_text(text)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    survived = unless(status == -signal.SIGKILL, status, said)
    return f"{how}, after operation {late}", refused or changed or survived


def clock_backwards(place, case, dice):
    "The clock jumps back a day now and then, the files' times are reversed, the run is killed and goes on a year earlier."
    chosen, every = dice.randrange(len(case.events)), dice.randrange(20, 200)

    def inside():
        turn_back(every)
        at_operation(place, chosen + 1, kill)()

    status, said = place.whole(case, inside=inside)
    if status == 0:
        raise Missed
    files = sorted(place.out.rglob("*"), key=lambda path: path.lstat().st_mtime_ns)
    for n, path in enumerate(files):
        os.utime(path, (2e9 - n, 2e9 - n))
    turned = place.whole(case, resume=case.command == "train", inside=lambda: turn_back(every, 365 * 86400))
    if turned[0] == 2 and "leave --resume out" in turned[1]:
        turned = place.whole(case, inside=lambda: turn_back(every, 365 * 86400))
    where = f"a day back at every {every}th look, killed at operation {chosen + 1}"
    return where, unless(turned[0] == 0, *turned)


def two_writers(place, case, dice):
    "While the command is halted somewhere between taking and giving back its lock, the same command again is refused and changes nothing."
    locks = [n for n, (event, path) in enumerate(case.events) if Path(path).name == ".lock"]
    chosen = dice.randrange(locks[0] + 2, locks[-1])
    forks = place.start(case, inside=at_operation(place, chosen + 1, lambda: kill(signal.SIGSTOP)))
    if forks[0].wait(stopped=True) != "stopped":
        raise Missed
    before = tree(place.out)
    resume = case.command == "train"
    refused = one_line(*place.whole(case, resume=resume), "another process is writing")
    changed = tree(place.out) != before and "the second writer changed the folder"
    forks[0].kill(signal.SIGCONT)
    status, said = together(forks)
    where = f"halted at operation {chosen + 1} of {len(case.events)}"
    return where, refused or changed or unless(status == 0, status, said)


def turn_back(every, start=0.0):
    "In this process: a clock that jumps back a day at every so many looks."
    real, real_ns, looks = time.time, time.time_ns, 0

    def back():
        nonlocal looks
        looks += 1
        return start + 86400 * (looks // every)

    time.time, time.time_ns = lambda: real() - back(), lambda: real_ns() - int(1e9 * back())


def mounts():
    "Whether this process may mount."
    root = hasattr(os, "geteuid") and os.geteuid() == 0
    return root and bool(shutil.which("mount")) and not os.environ.get("CHAOS_NO_MOUNT")


def forbid(folder, on=True):
    "Let nothing be written in a folder: by its mode, or for root, who may all the same, by the immutable flag."
    if os.geteuid() == 0:
        return subprocess.run(["chattr", "-R", "+i" if on else "-i", folder], check=on, stderr=subprocess.DEVNULL)
    for path in [folder, *(p for p in folder.rglob("*") if p.is_dir())]:
        path.chmod(0o500 if on else 0o700)


KINDS = {
    "SIGKILL at a moment": at_moment, "SIGKILL at a file operation": at_write, "SIGTERM at a moment": lambda *args: at_moment(*args, signal.SIGTERM),
    "SIGTERM at a file operation": lambda *args: at_write(*args, signal.SIGTERM), "torn checkpoint": torn_checkpoint, "full disk": full_disk,
    "file-size limit": file_limit, "read-only output": read_only, "dead worker of two": dead_worker, "changed data": changed_data,
    "clock backwards": clock_backwards, "two writers": two_writers,
}  # fmt: skip
PLAN = {  # how often, by case
    "SIGKILL at a moment": "5 train; 4 train by length; 1 train with pictures; 4 evaluate choice; 3 evaluate official; 2 compare; 2 compare rates; 3 export",
    "SIGKILL at a file operation": "4 train; 4 train by length; 1 train with pictures; 3 evaluate choice; 2 evaluate official; 2 compare; 2 compare rates; 3 export",
    "SIGTERM at a moment": "3 train; 2 train by length; 1 evaluate choice; 1 compare",
    "SIGTERM at a file operation": "2 train; 1 train by length; 1 evaluate official; 1 export",
    "torn checkpoint": "8 train",
    "full disk": "3 train; 2 evaluate choice; 1 compare; 2 export",
    "file-size limit": "2 train; 1 evaluate choice; 1 compare rates; 1 export",
    "read-only output": "2 train; 2 evaluate choice; 1 compare; 1 export",
    "dead worker of two": "4 train, two processes; 2 evaluate, two processes",
    "changed data": "3 train; 1 compare",
    "clock backwards": "2 train; 1 evaluate choice; 1 compare rates; 1 export",
    "two writers": "1 train; 1 evaluate choice; 1 compare; 1 export",
}
SHORT = [("SIGKILL at a file operation", "train"), ("torn checkpoint", "train"), ("full disk", "train"), ("changed data", "train"), ("read-only output", "evaluate choice"),
         ("SIGKILL at a moment", "evaluate choice"), ("two writers", "evaluate choice"), ("clock backwards", "train")]  # fmt: skip


def throw(place, kind, name, dice):
    "One fault, the way back from it, and the comparison."
    case = place.cases[name]
    for draw in range(1, 11):
        try:
            place.begin(case)
            where, wrong = KINDS[kind](place, case, dice)
            break
        except Missed:
            unmount(place)
    else:
        return {
            "kind": kind,
            "case": name,
            "command": case.command,
            "survived": False,
            "wrong": "ten times the fault came too late",
        }
    torn = place.half_written(name, "SIGTERM" in kind) if place.run.exists() else []
    wrong = wrong or (f"half-written: {torn}" if torn else None) or place.finish(case)
    lost = place.differences(name, "SIGTERM" in kind) if place.run.exists() else {"everything": case.bytes[1]}
    wrong = wrong or (f"differs: {lost}" if lost else None)
    unmount(place)
    return {
        "kind": kind,
        "case": name,
        "command": case.command,
        "where": where,
        "draws": draw,
        "survived": not wrong,
        "bytes_lost": sum(lost.values()),
        **({"wrong": wrong} if wrong else {}),
    }


def unmount(place):
    if os.path.ismount(place.out):
        subprocess.run(["umount", "-l", place.out], check=True)


def plan_of(count, dice):
    "The faults to throw, case by case: all of `PLAN`, a sample of it, or some of `SHORT`."
    if count <= len(SHORT):
        return SHORT[:count]
    cases = [(kind, *part.split(" ", 1)) for kind, own in PLAN.items() for part in own.split("; ")]
    every = [(kind, name) for kind, times, name in cases for _ in range(int(times))]
    order = ["train", "train by length", "evaluate choice", "evaluate official", "export", "evaluate, two processes"]
    order += ["train, two processes", "compare", "compare rates", "train with pictures"]
    return sorted(dice.sample(every, min(count, len(every))), key=lambda own: order.index(own[1]))


def summary(faults, uneven, args, seconds):
    "All figures."
    count = lambda key, own: dict(sorted(Counter(fault[key] for fault in own).items()))
    kinds = {kind: [f for f in faults if f["kind"] == kind] for kind in count("kind", faults)}
    return {
        "command": f"python benchmarks/chaos.py --faults {args.faults} --seed {args.seed}",
        "seed": args.seed,
        "faults": len(faults),
        "survived": sum(f["survived"] for f in faults),
        "bytes_lost": sum(f.get("bytes_lost", 0) for f in faults),
        "by_kind": count("kind", faults),
        "by_command": count("command", faults),
        "kinds_by_command": {kind: count("command", own) for kind, own in kinds.items()},
        "methods": {
            "full disk": "tmpfs" if mounts() else "RLIMIT_FSIZE",
            "read-only output": "immutable flag" if os.geteuid() == 0 else "mode",
            "two processes": "gloo, forked with torchrun's environment",
        },
        "seconds": round(seconds),
        "undisturbed_twice": uneven,
        "not_compared": list(UNEVEN),
        "versions": versions(*PACKAGES),
        "thrown": faults,
    }


def tell(*words):
    print(*words, file=sys.stderr, flush=True)


def main():
    parser = command_line(__doc__)
    parser.add_argument("--faults", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="Faults of this kind, or on this case.")
    parser.add_argument(
        "--at-most", type=int, default=1000, help="Throw so many now; the command goes on with the next."
    )
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "chaos.json")
    args = parser.parse_args()
    dice, began, root = random.Random(args.seed), time.monotonic(), Path(tempfile.mkdtemp(prefix="chaos-"))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # and clear up
    place = Place(root)
    d2mora.cli.hush()
    load_base("toy")  # fills caches of the libraries that every fork inherits
    gc.freeze()
    plan = [(kind, name) for kind, name in plan_of(args.faults, dice) if args.only in (None, kind, name)]
    part = args.output.with_suffix(".part.jsonl")  # this driver may be killed too
    about = {"seed": args.seed, "plan": plan, "versions": versions(*PACKAGES)}
    faults, uneven, spent = done_before(part, json.loads(json.dumps(about)))
    left = plan[len(faults) :][: args.at_most]
    try:
        for name in dict.fromkeys(name for _, name in left):
            for needed in (place.cases[name].prepared or "train", name):
                if not place.cases[needed].events:
                    uneven[needed] = {"differing": place.reference(needed), "files": len(tree(place.kept / needed))}
        differing = [own["differing"] for own in uneven.values() if own["differing"]]
        tell(
            f"{len(uneven)} commands undisturbed, twice each: {time.monotonic() - began:.0f} s; differing: {differing}"
        )
        for kind, name in left:
            faults.append(throw(place, kind, name, random.Random(f"{args.seed} {len(faults)}")))
            seconds = time.monotonic() - began
            store(part, about | {"seconds": spent + seconds, "uneven": uneven, "thrown": faults})
            tell(f"{len(faults):3} {seconds:5.0f} s  {kind}, {name}: {faults[-1].get('wrong') or 'survived'}")
    finally:
        forbid(place.out, False)
        unmount(place)
        shutil.rmtree(root, ignore_errors=True)
    if len(faults) < len(plan):
        return print(f"{len(faults)} of {len(plan)} faults thrown; given again, the command goes on") or 3
    result = summary(faults, uneven, args, spent + time.monotonic() - began)
    store(args.output, result)
    part.unlink()
    tell(*(f"{key}: {result[key]}" for key in ("faults", "survived", "bytes_lost", "seconds")), args.output)
    return int(result["survived"] < result["faults"] or any(own["differing"] for own in uneven.values()))


def done_before(part, about):
    "What an earlier call with the same seed, plan and versions has thrown: faults, undisturbed runs, seconds."
    if not part.exists() or any((old := json.loads(part.read_text()))[key] != value for key, value in about.items()):
        return [], {}, 0.0
    return old["thrown"], old["uneven"], old["seconds"]


if __name__ == "__main__":
    sys.exit(main())
