"""Rows per second of our protocols against the published way of grading: same model, adapter, rows and process, task by task in turn.

    python benchmarks/grade_main_job.py --world real     # trains the adapter that is graded (also --world toy)
    python benchmarks/evaluate_speed.py                  # writes benchmarks/results/evaluate_speed.json
    python benchmarks/evaluate_speed.py --full           # adds the seconds of all eight real test sets by `choice`

The published way: batch 1, no mask, 4 beams, 32 new tokens. Its adapter layers are put into eval mode, which the published script forgets.
Its predictions are first shown equal to those of protocol `official` at batch 1. Rows that leave no room for 32 tokens are left out.
A run grades a whole test set sorted by length; measured are the rows in the middle of that order, which would share a batch.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch
import transformers
from transformers import GenerationConfig

from d2mora.data import read_task
from d2mora.evaluate import load_target
from d2mora.recipe import max_positions
from d2mora.scoring import NEW_TOKENS, PROTOCOLS, Item, grade_rows, make_item, option_scores
from d2mora.tasks import TASKS, evaluation_prompt, parse_answer
from d2mora.utils import write_text

ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("D2MORA_SHARED", ROOT.parent / "shared"))
OUTPUT = ROOT / "benchmarks" / "results" / "evaluate_speed.json"
TARGETS = {"official": 6, "generate": 12, "choice": 25}
BATCH = {
    "official": 32,
    "generate": 32,
    "choice": 16,
    "content": 16,
}  # writing gains from rows at once, reading from the processor's cache


@torch.no_grad()
def published(model, tokenizer, row: dict) -> str:
    "What the published script writes for one row."
    ids = tokenizer(evaluation_prompt(row, "official"), return_tensors="pt").input_ids
    config = GenerationConfig(
        num_beams=4, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0, eos_token_id=tokenizer.eos_token_id
    )
    out = model.generate(input_ids=ids, generation_config=config)
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def timed(call):
    "What a call returns, and its seconds: of the wall, and of this process on the processor."
    wall, cpu = time.perf_counter(), time.process_time()
    result = call()
    return result, time.perf_counter() - wall, time.process_time() - cpu


def world(run: Path, data: str, rows_a_task: int, checked: int) -> dict:
    "Measure one run."
    model, tokenizer, _ = load_target(run)
    model.eval()
    seconds, cpu, rows_done, right, differing, equal = {}, {}, 0, {}, [], True
    for task in TASKS:
        rows = [
            r
            for r in read_task(data, task, "test").to_list()
            if len(tokenizer(evaluation_prompt(r, "official")).input_ids) + NEW_TOKENS <= max_positions(model)
        ]
        middle = max(0, len(rows) - rows_a_task) // 2
        rows = sorted(rows, key=lambda r: len(r["instruction"]))[middle : middle + rows_a_task]
        if not rows:
            continue
        published(model, tokenizer, rows[0])  # warm
        texts, wall, own = timed(lambda: [published(model, tokenizer, row) for row in rows])
        seconds["published"], cpu["published"] = seconds.get("published", 0) + wall, cpu.get("published", 0) + own
        alone = grade_rows(model, tokenizer, task, rows[:checked], "official", "official", batch_size=1)
        equal = equal and [g["text"] for g in alone] == texts[:checked]
        for protocol, size in BATCH.items():
            graded, wall, own = timed(lambda: grade_rows(model, tokenizer, task, rows, protocol, "official", size))
            seconds[protocol], cpu[protocol] = seconds.get(protocol, 0) + wall, cpu.get(protocol, 0) + own
            right[protocol] = right.get(protocol, 0) + sum(g["right"] for g in graded)
            if protocol == "official":
                differing += differences(model, tokenizer, task, rows, texts, graded)
        right["published"] = right.get("published", 0) + sum(
            parse_answer(t, task) == r["answer"] for t, r in zip(texts, rows)
        )
        rows_done += len(rows)
        print(
            f"{run.name} {task}: {len(rows)} rows, "
            + ", ".join(f"{p} {seconds['published'] / s:.1f}x" for p, s in seconds.items() if p != "published"),
            file=sys.stderr,
            flush=True,
        )
    ratios = {p: seconds["published"] / s for p, s in seconds.items()}
    return {
        "run": run.name,
        "rows": rows_done,
        "published equals official at batch 1": equal,
        "rows checked at batch 1": checked * len(TASKS),
        "rows that differ from the published text in a batch": differing,
        "seconds": seconds,
        "cpu_seconds": cpu,
        "rows_per_second": {p: rows_done / s for p, s in seconds.items()},
        "times_as_fast": ratios,
        "times_as_fast_by_cpu": {p: cpu["published"] / s for p, s in cpu.items()},
        "right": right,
        "targets_met": {p: ratios[p] >= target for p, target in TARGETS.items()},
    }


def differences(model, tokenizer, task, rows, texts, graded) -> list[dict]:
    "Rows whose text in the batch is not the published one, with the margin between the two."
    found = []
    for i, (row, text, g) in enumerate(zip(rows, texts, graded)):
        if text != g["text"]:
            head = make_item(tokenizer, PROTOCOLS["official"].pairs(row, task, "official"), None).head
            ids = [tokenizer(evaluation_prompt(row, "official") + t).input_ids[len(head) :] for t in (text, g["text"])]
            scores = option_scores(model, [Item(head, ids, [len(own) for own in ids], [], False)])[0].tolist()
            margin = abs(
                scores[0] / len(ids[0]) - scores[1] / len(ids[1])
            )  # nats per token, by which beam search ranks
            changed = parse_answer(text, task) != g["predicted"]
            found.append(
                {"task": task, "row": i, "alone": text, "batch": g["text"], "changed": changed, "margin": margin}
            )
    return found


def full() -> dict:
    "All eight real test sets by `choice` with stories260K, as on the command line: two processes of one thread share the rows."
    folder, spent = ROOT / "runs" / "full-choice", lambda: sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
    command = [
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        "-m",
        "d2mora.cli",
        "evaluate",
        "--base",
        str(SHARED / "models/stories260K"),
        "--data",
        str(SHARED / "data"),
        "--output",
        str(folder),
        "--again",
    ]
    wall, cpu, load = time.perf_counter(), spent(), os.getloadavg()[0]
    subprocess.run(
        [sys.executable, *command], env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True, stdout=subprocess.DEVNULL
    )
    wall, cpu = time.perf_counter() - wall, spent() - cpu
    result = json.loads((folder / "evaluation-choice.json").read_text())
    return {
        "rows": sum(t["n"] for t in result["tasks"].values()),
        "wall_seconds": round(wall, 1),
        "cpu_seconds": round(cpu, 1),
        "limit_seconds": 480,
        "processes": result["processes"],
        "batch_size": result["batch_size"],
        "load": [load, os.getloadavg()[0]],
        "average": result["average"],
        "tasks": {task: {"n": t["n"], "accuracy": t["accuracy"]} for task, t in result["tasks"].items()},
    }


def about() -> dict:
    "Machine and versions."
    cpu = (
        [
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ][:1]
        if Path("/proc/cpuinfo").is_file()
        else []
    )
    return {
        "machine": " ".join(cpu) or platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_at_start": os.getloadavg()[0],
        "versions": {name: version(name) for name in ("d2mora", "torch", "transformers", "peft")},
    }


def main(argv=None):
    "Command line."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=32, help="rows a task")
    parser.add_argument("--worlds", default="real,toy")
    parser.add_argument("--full", action="store_true")
    args = parser.parse_args(argv)
    transformers.logging.set_verbosity_error(), transformers.logging.disable_progress_bar()
    stored = json.loads(OUTPUT.read_text()) if OUTPUT.is_file() else {"worlds": {}}
    if args.full:
        stored["all eight test sets by choice"] = full() | {"about": about()}
    for name in args.worlds.split(",") if not args.full else ():
        run = ROOT / "runs" / f"grade-{name}" / "seed-0" / "D2MoRA"
        if not (run / "adapter").is_dir():
            sys.exit(f"{run}: not there: python benchmarks/grade_main_job.py --world {name} makes it")
        facts = about()
        stored["worlds"][name] = (
            facts | {"batch_size": BATCH} | world(run, {"real": str(SHARED / "data"), "toy": "toy"}[name], args.rows, 3)
        )
    OUTPUT.parent.mkdir(exist_ok=True)
    write_text(
        OUTPUT,
        json.dumps({"command": "python benchmarks/evaluate_speed.py", "targets": TARGETS} | stored, indent=1) + "\n",
    )


if __name__ == "__main__":
    main()
