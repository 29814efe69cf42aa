"""Rows per second of our protocols against the published way of grading: same model, adapter, rows and process, task by task in turn.

    python benchmarks/grade_main_job.py --world real     # trains the adapter that is graded (also --world toy)
    python benchmarks/evaluate_speed.py                  # writes benchmarks/results/evaluate_speed.json
    python benchmarks/evaluate_speed.py --full           # adds the seconds of all eight real test sets by `choice`

The published way: batch 1, no mask, 4 beams, 32 new tokens. Its adapter layers are put into eval mode, which the published script forgets.
Its predictions are first shown equal to those of protocol `official` at batch 1. Rows that leave no room for 32 tokens are left out.
A run grades a whole test set sorted by length; measured are the rows in the middle of that order, which would share a batch.
"""

import json
import os
import resource
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import torch
import transformers
from common import ROOT, SHARED, command_line, machine, store, versions
from transformers import GenerationConfig

from d2mora.data import read_task
from d2mora.evaluate import load_target
from d2mora.recipe import max_positions
from d2mora.scoring import NEW_TOKENS, PROTOCOLS, Item, grade_rows, make_item, option_scores
from d2mora.tasks import TASKS, evaluation_prompt, parse_answer

OUTPUT = ROOT / "benchmarks" / "results" / "evaluate_speed.json"
TARGETS = {"official": 6, "generate": 12, "choice": 25}
BATCH = {"official": 32, "generate": 32, "choice": 16, "content": 16}  # reading gains from the processor's cache


@torch.no_grad()
def published(model, tokenizer, row: dict) -> str:
    "What the published script writes for one row."
    ids = tokenizer(evaluation_prompt(row, "official"), return_tensors="pt").input_ids
    special = {"pad_token_id": 0, "eos_token_id": tokenizer.eos_token_id}
    config = GenerationConfig(num_beams=4, max_new_tokens=NEW_TOKENS, do_sample=False, **special)
    out = model.generate(input_ids=ids, generation_config=config)
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def middle_rows(model, tokenizer, data: str, task: str, count: int) -> list[dict]:
    "Rows from the middle of a test set sorted by length, which leave room for what is written."
    rows = read_task(data, task, "test").to_list()
    room = max_positions(model) - NEW_TOKENS
    rows = [row for row in rows if len(tokenizer(evaluation_prompt(row, "official")).input_ids) <= room]
    start = max(0, len(rows) - count) // 2
    return sorted(rows, key=lambda row: len(row["instruction"]))[start : start + count]


def world(run: Path, data: str, rows_a_task: int, checked: int) -> dict:
    "Measure one run."
    model, tokenizer, _ = load_target(run)
    model.eval()
    seconds, cpu, right, rows_done, differing, equal = Counter(), Counter(), Counter(), 0, [], True

    def timed(name, call):
        wall, own = time.perf_counter(), time.process_time()
        result = call()
        seconds[name] += time.perf_counter() - wall
        cpu[name] += time.process_time() - own
        return result

    for task in TASKS:
        rows = middle_rows(model, tokenizer, data, task, rows_a_task)
        if not rows:
            continue
        published(model, tokenizer, rows[0])  # warm
        texts = timed("published", lambda: [published(model, tokenizer, row) for row in rows])
        alone = grade_rows(model, tokenizer, task, rows[:checked], "official", "official", batch_size=1)
        equal = equal and [g["text"] for g in alone] == texts[:checked]
        for protocol, size in BATCH.items():
            graded = timed(protocol, lambda: grade_rows(model, tokenizer, task, rows, protocol, "official", size))
            right[protocol] += sum(g["right"] for g in graded)
            if protocol == "official":
                differing += differences(model, tokenizer, task, rows, texts, graded)
        right["published"] += sum(parse_answer(t, task) == r["answer"] for t, r in zip(texts, rows))
        rows_done += len(rows)
        said = ", ".join(f"{p} {seconds['published'] / seconds[p]:.1f}x" for p in BATCH)
        print(f"{run.name} {task}: {len(rows)} rows, {said}", file=sys.stderr, flush=True)
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
    "Rows whose text in the batch is not the published one, with the margin between the two in nats per token."
    found = []
    for i, (row, text, g) in enumerate(zip(rows, texts, graded)):
        if text != g["text"]:
            head = make_item(tokenizer, PROTOCOLS["official"].pairs(row, task, "official"), None).head
            ids = [tokenizer(evaluation_prompt(row, "official") + t).input_ids[len(head) :] for t in (text, g["text"])]
            scores = option_scores(model, [Item(head, ids, [len(own) for own in ids], [], False)])[0].tolist()
            margin = abs(scores[0] / len(ids[0]) - scores[1] / len(ids[1]))  # by which beam search ranks
            about = {"task": task, "row": i, "changed": parse_answer(text, task) != g["predicted"]}
            found.append(about | {"alone": text, "batch": g["text"], "margin": margin})
    return found


def full() -> dict:
    "All eight real test sets by `choice` with stories260K: two processes of one thread share the rows."
    folder, spent = ROOT / "runs" / "full-choice", lambda: sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "d2mora.cli", "evaluate"]
    command += ["--base", str(SHARED / "models/stories260K"), "--data", str(SHARED / "data")]
    command += ["--output", str(folder), "--again"]
    wall, cpu, load = time.perf_counter(), spent(), os.getloadavg()[0]
    subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True, stdout=subprocess.DEVNULL)
    took = {"wall_seconds": round(time.perf_counter() - wall, 1), "cpu_seconds": round(spent() - cpu, 1)}
    result = json.loads((folder / "evaluation-choice.json").read_text())
    tasks = {task: {"n": t["n"], "accuracy": t["accuracy"]} for task, t in result["tasks"].items()}
    about = {key: result[key] for key in ("processes", "batch_size", "average")}
    about |= {"rows": sum(t["n"] for t in tasks.values()), "limit_seconds": 480, "load": [load, os.getloadavg()[0]]}
    return about | took | {"tasks": tasks}


def main(argv=None):
    "Command line."
    parser = command_line(__doc__)
    parser.add_argument("--rows", type=int, default=32, help="rows a task")
    parser.add_argument("--worlds", default="real,toy")
    parser.add_argument("--full", action="store_true")
    args = parser.parse_args(argv)
    transformers.logging.set_verbosity_error(), transformers.logging.disable_progress_bar()
    stored = json.loads(OUTPUT.read_text()) if OUTPUT.is_file() else {"worlds": {}}
    about = machine() | {"versions": versions()}
    if args.full:
        stored["all eight test sets by choice"] = full() | {"about": about}
    for name in args.worlds.split(",") if not args.full else ():
        run = ROOT / "runs" / f"grade-{name}" / "seed-0" / "D2MoRA"
        if not (run / "adapter").is_dir():
            sys.exit(f"{run}: not there: python benchmarks/grade_main_job.py --world {name} makes it")
        data = {"real": str(SHARED / "data"), "toy": "toy"}[name]
        stored["worlds"][name] = about | {"batch_size": BATCH} | world(run, data, args.rows, 3)
    store(OUTPUT, {"command": "python benchmarks/evaluate_speed.py", "targets": TARGETS} | stored)


if __name__ == "__main__":
    main()
