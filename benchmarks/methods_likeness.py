"""How alike the experts of the compared methods are, from the runs that `d2mora compare demo-hard --output runs/toy-hard` left.

    python benchmarks/methods_likeness.py nbs/results/likeness-toy-hard.json --runs runs/toy-hard/equal

For each method with experts, of the first seed: |cosine| and overlap of subspaces of every pair in the q, k and v layers, and the maps
of all these experts by t-SNE and PCA with the silhouette of the layers. Nothing is trained.
"""
import argparse
import json
from pathlib import Path

import numpy as np
import transformers

from d2mora.analysis import as_model, expert_points, layer_silhouette, likeness, maps_of
from d2mora.utils import write_text

METHODS, KINDS, SEED = ("d2mora-no-loss", "d2mora", "one-to-many", "one-to-one"), ("q_proj", "k_proj", "v_proj"), 0

def rounded(table: np.ndarray) -> list: return np.asarray(table, float).round(4).tolist()

def measured(folder: Path) -> dict:
    "The pairs of each layer and side, and where each expert lies on the maps."
    model = as_model(folder)
    layers = [f | {m: rounded(f[m]) for m in ("cosine", "overlap")} for f in likeness(model) if f["kind"] in KINDS]
    maps = {}
    for side in ("down", "up"):
        points, places = expert_points(model, side, KINDS)
        if len(points) == len(set(places)): continue  # one expert a layer: nothing that could lie together
        maps[side] = {"places": places, "silhouette": layer_silhouette(points, places), "maps": {how: rounded(flat) for how, flat in maps_of(points).items()}}
    return {"layers": layers, "maps": maps}

def main():
    "Command line."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--runs", type=Path, default=Path("runs/toy-hard/equal"))
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    found = {method: measured(args.runs / method / f"seed-{SEED}") for method in METHODS}
    write_text(args.output, json.dumps({"command": f"python benchmarks/methods_likeness.py {args.output}", "seed": SEED, "methods": found}) + "\n")

if __name__ == "__main__":
    main()
