"""What a static export keeps of a routed adapter, rank by rank: the frontier of notebook 15.

    python benchmarks/export_frontier.py --world toy     # nbs/results/demo; writes nbs/results/export-toy.json, about 5 minutes on one core
    python benchmarks/export_frontier.py --world real    # D2MoRA on stories260K; writes nbs/results/export-real.json, about half an hour

The real adapter is runs/grade-real/D2MoRA, which is trained first where it is missing (as `grade_main_job.py --world real` does).
Measured: both routers at their mean; the fitted map cut to each rank; the same distilled; and, as the other form that was
thought of, the fitted map from answer tokens alone. Then one export for all tasks against one for each task.
"""

import argparse
import json
import platform
import time
from importlib.metadata import version
from pathlib import Path
from unittest.mock import patch

import torch
import transformers

import d2mora.export
from d2mora.evaluate import load_target, test_rows
from d2mora.export import ExportSettings, adapt_settings, add_moments, calibrate, distill, encoded_rows, measure
from d2mora.export import static_lora
from d2mora.utils import write_text

ROOT = Path(__file__).resolve().parents[1]
WORLDS = {
    "toy": dict(
        run=ROOT / "nbs/results/demo",
        ranks=(1, 2, 3, 5, 7, 9),
        distilled=(1, 2, 3, 5, 7, 9),
        steps=100,
        limit=100,
        rows=100,
    ),
    "real": dict(
        run=ROOT / "runs/grade-real/D2MoRA", ranks=(2, 4, 8, 16, 24), distilled=(2, 8, 24), steps=60, limit=100, rows=60
    ),
}


def trained(world: str) -> Path:
    "The run whose adapter is exported."
    folder = WORLDS[world]["run"]
    if not (folder / "adapter").exists():
        from grade_main_job import real, trained

        name, overrides, adapters, _ = real()
        trained(folder, name, overrides, adapters["D2MoRA"])
    return folder


def answer_moments(model, rows: list[dict]) -> dict:
    "What `calibrate` gives, from the tokens alone that precede a graded one."
    total, tokens = {}, 0
    for row in rows:
        first, last = max(row["target_start"] - 1, 0), len(row["input_ids"]) - 1
        narrow = lambda sums, layer, adapter, x: add_moments(sums, layer, adapter, x[:, first:last])
        with patch.object(d2mora.export, "add_moments", narrow):
            found = calibrate(model, [row])
        tokens += last - first
        for layer, own in found.items():
            sums = total.setdefault(layer, {})
            for name, value in own.items():
                sums[name] = sums.get(name, 0) + (last - first) * value
    return {layer: {name: value / tokens for name, value in own.items()} for layer, own in total.items()}


def forms_of(model, tokenizer, rows, world, learning_rate):
    "Yield (name, static model) for every form and rank, one after the other: only one is kept at a time."
    moments, answers = calibrate(model, rows), answer_moments(model, rows)
    config, ranks = model.peft_config["default"], world["ranks"]
    yield "mean", static_lora(model, moments, "mean")
    for rank in ranks:
        yield f"fitted R {rank}", static_lora(model, moments, "fitted", rank)
    for rank in (config.r, ranks[-1]):
        yield f"answers R {rank}", static_lora(model, answers, "fitted", rank)
    for rank in world["distilled"]:
        static = static_lora(model, moments, "fitted", rank)
        distill(model, static, rows, tokenizer, world["steps"], learning_rate)
        yield f"distilled R {rank}", static


def by_task(model, tokenizer, config, tasks, train, limit, rank) -> dict:
    "One LoRA for all tasks against one for each, on each task's rows."
    shared, found = (
        static_lora(model, calibrate(model, [row for own in train.values() for row in own]), "fitted", rank),
        {},
    )
    for task in tasks:
        own = static_lora(model, calibrate(model, train[task]), "fitted", rank)
        costs = measure(
            model,
            {"all": shared, "own": own},
            tokenizer,
            test_rows(config, [task], limit),
            encoded_rows(tokenizer, config, task, "test", 32),
            config.prompt,
        )
        found[task] = {"routed": costs["own"]["routed"][task]} | {
            name: {"agreement": c["agreement"], "accuracy": c["average"], "divergence": c["divergence"]}
            for name, c in costs.items()
        }
        print(task, {name: found[task][name]["agreement"] for name in costs}, flush=True)
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", choices=WORLDS, required=True)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    transformers.utils.logging.set_verbosity_error(), transformers.utils.logging.disable_progress_bar()
    began, run, world = time.process_time(), trained(options.world), WORLDS[options.world]
    limit = world["limit"]
    model, tokenizer, config = load_target(run)
    settings, config = adapt_settings(ExportSettings(), run, config, None, model)
    train = {task: encoded_rows(tokenizer, config, task, "train", world["rows"]) for task in config.tasks}
    rows, texts = (
        test_rows(config, config.tasks, limit),
        [row for task in config.tasks for row in encoded_rows(tokenizer, config, task, "test", 32)],
    )
    forms = {}
    for name, static in forms_of(
        model, tokenizer, [row for own in train.values() for row in own], world, settings.learning_rate
    ):
        forms |= measure(model, {name: static}, tokenizer, rows, texts, config.prompt)
        print(
            name,
            round(forms[name]["agreement"], 3),
            round(forms[name]["average"], 3),
            forms[name]["divergence"],
            f"{time.process_time() - began:.0f} s",
            flush=True,
        )
    adapter = model.peft_config["default"]
    result = {
        "command": f"python benchmarks/export_frontier.py --world {options.world}",
        "n": sum(map(len, rows.values())),
        "rows_a_task": limit,
        "calibration_rows_a_task": world["rows"],
        "steps": world["steps"],
        "learning_rate": settings.learning_rate,
        "adapter": f"M {adapter.num_down_experts}, N {adapter.num_up_experts}, r {adapter.r}",
        "forms": forms,
        "per_task_rank": adapter.r,
        "per_task": by_task(model, tokenizer, config, config.tasks, train, limit, adapter.r),
        "cpu_seconds": round(time.process_time() - began),
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
    }
    write_text(options.output or ROOT / f"nbs/results/export-{options.world}.json", json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
