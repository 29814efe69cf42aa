"""Generating with a routed adapter, with the LoRA it is exported to, and merged: what each costs for a token (notebook 14).

    python benchmarks/generation.py      # nbs/results/generation.json, about ten minutes on one core, most of them compiling

q, k and v of a random LLaMA (d 1024, 2 layers) are adapted by D2MoRA {M 3, N 8, r 8}; by LoRA r 8, which a static export at mean routing is,
and by LoRA r 64, the paper's baseline; `merged` is the frozen model, as after merge_and_unload. One row, 32 tokens of prompt, 24 new tokens,
greedy: with the usual growing cache, with a static one, and with a static one and a compiled forward pass. All in turns in one run; what is
reported is the mean ratio within rounds with its 95 % interval, of wall time and of processor time, which other jobs disturb less. D2MoRA's
tokens under each cache are compared with those under the growing one.
"""

import argparse
import copy
import json
import time
from importlib.metadata import version
from pathlib import Path
from statistics import median

import peft
import torch
import transformers
from layer import COMMON, OURS, SHAPES, frozen, machine, ratio

ROOT = Path(__file__).resolve().parents[1]
METHODS = {
    "D2MoRA": OURS,
    "merged": None,
    **{f"LoRA r {r}": peft.LoraConfig(r=r, lora_alpha=2 * r, **COMMON) for r in (8, 64)},
}
NEW = 24
SHAPES["d 1024, 2 layers"] = SHAPES["d 1024, 6 layers"] | {"num_hidden_layers": 2}


def adapted(base, config):
    "The base with an adapter of random weights; the frozen weights are shared."
    model = copy.deepcopy(base, {id(p): p for p in base.parameters()})
    if config is None:
        return model.eval()
    model = peft.get_peft_model(model, config)
    torch.manual_seed(1)
    for p in model.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.02)
    return model.eval()


def writer(model, cache: str):
    "Greedy generation, ready to be called; it gives the new tokens."
    ids = (torch.arange(32) * 7 % 1000)[None]
    whole = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    if cache == "static, compiled":
        whole.forward = torch.compile(whole.forward)
    extra = {} if cache == "growing" else {"cache_implementation": "static"}

    def write():
        with torch.no_grad():
            out = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=NEW,
                min_new_tokens=NEW,
                pad_token_id=0,
                **extra,
            )
        return out[0, ids.shape[1] :].tolist()

    return write


def in_turns(calls: dict, rounds: int) -> dict:
    "(wall, processor) seconds of each call in each round, in changing order, after two rounds that warm up."
    seconds, names = {name: [] for name in calls}, list(calls)
    for r in range(-2, rounds):
        for name in names[r % len(names) :] + names[: r % len(names)]:
            wall, cpu = time.perf_counter(), time.process_time()
            calls[name]()
            if r >= 0:
                seconds[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    return seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--output", type=Path, default=ROOT / "nbs/results/generation.json")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    begun, about, base = time.perf_counter(), machine(), frozen("d 1024, 2 layers")
    caches = ("growing", "static", "static, compiled")
    calls = {
        (cache, name): writer(adapted(base, config), cache) for cache in caches for name, config in METHODS.items()
    }
    written = {cache: calls[cache, "D2MoRA"]() for cache in caches}
    assert all(tokens == written["growing"] for tokens in written.values()), written
    seconds = in_turns(calls, options.rounds)
    clocks = ("wall", "cpu")
    against = {
        cache: {
            name: {
                clock: ratio([s[i] for s in seconds[cache, "D2MoRA"]], [s[i] for s in seconds[cache, name]])
                for i, clock in enumerate(clocks)
            }
            for name in METHODS
            if name != "D2MoRA"
        }
        for cache in caches
    }
    caching = {
        cache: {
            clock: ratio([s[i] for s in seconds[cache, "D2MoRA"]], [s[i] for s in seconds["growing", "D2MoRA"]])
            for i, clock in enumerate(clocks)
        }
        for cache in caches[1:]
    }
    result = {
        "command": "python benchmarks/generation.py",
        "rounds": options.rounds,
        "new_tokens": NEW,
        "D2MoRA against": against,
        "D2MoRA, cache against growing": caching,
        "same_tokens": True,
        "median_seconds": {
            cache: {name: round(median(w for w, _ in seconds[cache, name]), 3) for name in METHODS} for cache in caches
        },
        "minutes": round((time.perf_counter() - begun) / 60, 1),
        "machine": about,
        "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
    }
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({k: result[k] for k in ("D2MoRA against", "D2MoRA, cache against growing", "minutes")}, indent=1))


if __name__ == "__main__":
    main()
