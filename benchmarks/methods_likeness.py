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

from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from sklearn.metrics import silhouette_score

from d2mora.analysis import as_model, layer_similarity, named_experts, place_of
from d2mora.utils import write_text

METHODS, KINDS, SEED = ("d2mora-no-loss", "d2mora", "one-to-many", "one-to-one"), ("q_proj", "k_proj", "v_proj"), 0

def rounded(table: np.ndarray) -> list: return np.asarray(table, float).round(4).tolist()

def expert_points(model, side: str) -> tuple[np.ndarray, list]:
    "The experts of the q, k and v layers as unit vectors (points, r · d), and the block and kind of each."
    layers = [(place_of(name), (A, B)[side == "up"].flatten(1)) for name, A, B in named_experts(model)]
    layers = [(place, W / (W.norm(dim=1, keepdim=True) + 1e-6)) for place, W in layers if place[1] in KINDS]
    return np.concatenate([W.numpy() for _, W in layers]), [place for place, W in layers for _ in W]

def maps_of(points: np.ndarray, places: list) -> dict:
    "Silhouette of the layers, and the points by t-SNE and by PCA; the sign of an expert does not count in the first two."
    distance = (1 - np.abs(points @ points.T).clip(0, 1)) * (1 - np.eye(len(points)))
    perplexity = round(min(30.0, max(2.0, (len(points) - 1) / 4)), 1)
    tsne = TSNE(perplexity=perplexity, init="random", metric="precomputed", random_state=SEED, learning_rate=max(10, len(points) / 48))
    pca = PCA(2, random_state=SEED).fit(points)
    maps = {f"t-SNE, perplexity {perplexity:g}, seed {SEED}": tsne.fit_transform(distance),
            f"PCA, {100 * pca.explained_variance_ratio_.sum():.0f} % of variance": pca.transform(points)}
    layers = [f"{kind} {block}" for block, kind in places]
    return {"places": places, "silhouette": float(silhouette_score(distance, layers, metric="precomputed")), "maps": {how: rounded(flat) for how, flat in maps.items()}}

def measured(folder: Path) -> dict:
    "The pairs of each layer and side, and where each expert lies on the maps."
    model = as_model(folder)
    layers = [f | {m: rounded(f[m]) for m in ("cosine", "overlap")} for f in layer_similarity(model) if f["kind"] in KINDS]
    maps = {}
    for side in ("down", "up"):
        points, places = expert_points(model, side)
        if len(points) > len(set(places)): maps[side] = maps_of(points, places)  # one expert a layer: nothing that could lie together
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
