"""The tables of the chapter Evaluation: frozen base, LoRA, one-to-many and D2MoRA, at equal steps and parameters equal to within 3 %, by all four protocols, over three seeds.

    python benchmarks/grade_main_job.py --world real     # stories260K on the real rows; writes nbs/results/main_job_methods.json
    python benchmarks/grade_main_job.py --world toy      # the embedded base on the toy world; writes nbs/results/toy_methods_protocols.json

Runs stand in runs/grade-WORLD/seed-N/METHOD. What is finished there is not done again, so a killed measurement goes on where it stopped.
"""

import json
import os
import time
from pathlib import Path

import torch
import transformers
from common import ROOT, SHARED, command_line, machine, versions

from d2mora.evaluate import evaluate, paired, read_graded
from d2mora.recipe import load_recipe
from d2mora.scoring import PROTOCOLS
from d2mora.train import train
from d2mora.utils import write_text

QKV = ["q_proj", "k_proj", "v_proj"]


def real() -> tuple:
    "Recipe, overrides, adapters, rows a task: the main job, shorter."
    ours = dict(
        peft_type="D2MORA", r=8, lora_alpha=16, lora_dropout=0.05, orthogonality_weight=1e-4, target_modules=QKV
    )
    adapters = {
        "LoRA": dict(peft_type="LORA", r=42, lora_alpha=84, lora_dropout=0.05, target_modules=QKV),
        "one-to-many": ours | dict(pairing="one-to-many", num_down_experts=1, num_up_experts=10),
        "D2MoRA": ours | dict(num_down_experts=3, num_up_experts=8),
    }
    short = {
        "base": str(SHARED / "models/stories260K"),
        "data.path": str(SHARED / "data"),
        "data.validation_rows": 140,
        "training.max_steps": 200,
        "training.warmup_steps": 20,
        "training.save_steps": 100,
        "training.save_total_limit": 1,
    }
    return "commonsense-mini", short, adapters, 150


def toy() -> tuple:
    "The recipe `demo` with three adapters of equal size; lora_alpha / r was chosen for each by held-out loss."
    every = dict(lora_dropout=0.0, target_modules="all-linear")
    ours = every | dict(peft_type="D2MORA", r=3, lora_alpha=96, orthogonality_weight=1e-4)
    adapters = {
        "LoRA": every | dict(peft_type="LORA", r=18, lora_alpha=36),
        "one-to-many": ours | dict(pairing="one-to-many", num_down_experts=1, num_up_experts=8),
        "D2MoRA": ours | dict(num_down_experts=3, num_up_experts=8),
    }
    saves = {"training.save_strategy": "steps", "training.save_steps": 200, "training.save_total_limit": 1}
    return "demo", saves, adapters, 100


def trained(folder: Path, name: str, overrides: dict, adapter: dict, seed: int) -> dict:
    "Train one method, or go on with it."
    recipe = load_recipe(name, overrides | {"training.disable_tqdm": True, "training.seed": seed})
    recipe.adapter = adapter
    began = time.process_time()
    train(recipe, folder, resume=(folder / "recipe.yaml").exists())
    return {
        "steps": recipe.training["max_steps"],
        "cpu_seconds": round(time.process_time() - began),
        "parameters": parameters(folder),
    }


def parameters(folder: Path) -> int:
    "How many numbers an adapter holds."
    from safetensors import safe_open

    with safe_open(folder / "adapter" / "adapter_model.safetensors", "pt") as file:
        return sum(file.get_tensor(key).numel() for key in file.keys())


def graded(target: Path | None, output: Path, base: str, data: str, limit: int | None) -> dict:
    "One method by all protocols."
    found, base = {}, None if target else base
    for protocol in PROTOCOLS:
        how = {"protocol": protocol, "data": data, "limit": limit, "output": output, "batch_size": 32}
        result = evaluate(target, base=base, **how)
        kept = ("prompt", "batch_size", "dtype", "average", "average_interval", "tasks")
        found[protocol] = {k: result[k] for k in kept}
    return found


def against_lora(runs: Path, seeds: list[int]) -> dict:
    "By protocol and seed: D2MoRA against LoRA on the same rows."
    rows = lambda seed, method, protocol: read_graded(runs / f"seed-{seed}" / method, protocol)
    return {p: [paired(rows(s, "LoRA", p), rows(s, "D2MoRA", p)) for s in seeds] for p in PROTOCOLS}


def main(argv=None):
    "Command line."
    parser = command_line(__doc__)
    parser.add_argument("--world", choices=("real", "toy"), default="real")
    parser.add_argument("--seeds", default="0,1,2", help="each method is trained once with each")
    args = parser.parse_args(argv)
    transformers.logging.set_verbosity_error(), transformers.logging.disable_progress_bar()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    name, overrides, adapters, limit = {"real": real, "toy": toy}[args.world]()
    runs, recipe = ROOT / "runs" / f"grade-{args.world}", load_recipe(name, overrides)
    seeds = [int(seed) for seed in args.seeds.split(",")]
    about, results = {}, {"frozen base": [graded(None, runs / "base", recipe.base, recipe.data.path, limit)]}
    for seed, (method, adapter) in ((s, a) for s in seeds for a in adapters.items()):
        folder = runs / f"seed-{seed}" / method
        stored = folder / "about.json"
        done = trained(folder, name, overrides, adapter, seed)
        about.setdefault(method, []).append(json.loads(stored.read_text()) if stored.exists() else done)
        write_text(stored, json.dumps(about[method][-1]))
        results.setdefault(method, []).append(graded(folder, folder, recipe.base, recipe.data.path, limit))
    result = {"command": f"python benchmarks/grade_main_job.py --world {args.world}", "machine": machine()}
    result |= {"seeds": seeds, "limit": limit, "versions": versions(), "methods": about, "results": results}
    result |= {"D2MoRA against LoRA": against_lora(runs, seeds)}
    file = {"real": "main_job_methods.json", "toy": "toy_methods_protocols.json"}[args.world]
    write_text(ROOT / "nbs" / "results" / file, json.dumps(result, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
