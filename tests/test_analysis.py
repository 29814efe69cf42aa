"""Numbers about trained experts against obvious loops and planted truth, on models that call their layers in unusual ways, and the pictures of a run."""

import json
import shutil
from pathlib import Path

import peft
import pytest
import torch
import transformers
from helpers import adapted, fill, our_config, tiny_llama, tokens
from torch import nn

from d2mora import analysis, evaluate
from d2mora.export import calibrate
from d2mora.orthogonality import Experts
from d2mora.recipe import load_base
from d2mora.toy import toy_rows
from d2mora.tuner import mixture, watch_layers

ROOT = Path(__file__).parents[1]
TEXTS = [list(range(5, 25)), list(range(30, 33)), [7, 8, 9, 90, 91, 92, 93], list(range(40, 60))]
VOCABULARY = 512  # the toy world's tokens among them
SIZES = dict(vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=2, num_attention_heads=4)


def tiny_opt():
    "Flattens (batch, tokens) before fc1 and fc2."
    return transformers.OPTForCausalLM(transformers.OPTConfig(**SIZES, ffn_dim=96, word_embed_proj_dim=64))


class SparseMLP(nn.Module):
    "Gives linear layer k the tokens whose largest of the first three features is k; layer 3 is never called."

    def __init__(self, width):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(width, width) for _ in range(4))

    def forward(self, x):
        out, chosen = torch.zeros_like(x), x[..., :3].argmax(-1)
        for k in range(3):
            out[chosen == k] = self.experts[k](x[chosen == k])
        return out


def sparse():
    model = tiny_llama(vocab_size=VOCABULARY)
    model.model.layers[1].mlp = SparseMLP(64)
    return model


def looped():
    model = tiny_llama(vocab_size=VOCABULARY)
    model.model.layers[1] = model.model.layers[0]
    return model


BASES = {
    "flattened": (tiny_opt, ["q_proj", "fc1", "fc2"]),
    "sparse": (sparse, "all-linear"),
    "called twice": (looped, ["q_proj", "up_proj"]),
}


def model_of(name):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        base = BASES[name][0]().eval()
        return fill(peft.get_peft_model(base, our_config(target_modules=BASES[name][1]))).eval()


def given(model, texts):
    "What each layer is given by each text alone: name -> weights by side, all calls."
    found = {}

    def see(name, layer, adapter, x):
        mixture(layer, adapter, x, seen := {})
        for side, w in seen.items():
            found.setdefault(name, {}).setdefault(side, []).append(w.reshape(-1, w.shape[-1]))

    with watch_layers(model, see):
        for text in texts:
            model(torch.tensor([text]), use_cache=False)
    return {name: {side: torch.cat(own) for side, own in sides.items()} for name, sides in found.items()}


@pytest.fixture(scope="module")
def toy():
    "The toy world's tokenizer, and rows of two tasks."
    return load_base("toy")[1], {task: toy_rows("toy", task, "train", 3) for task in ("piqa", "boolq")}


@pytest.mark.parametrize("name", BASES)
def test_router_weights_of_unusual_models_are_those_of_each_text_alone(name, toy, recwarn):
    model, (tokenizer, rows) = model_of(name), toy
    found, expected = analysis.token_weights(model, TEXTS), given(model, TEXTS)
    moments = calibrate(model, [{"input_ids": text} for text in TEXTS])
    ordered = lambda w: w[w[:, 0].argsort()]
    assert found.keys() == expected.keys() and len(found) >= 2
    for layer, sides in expected.items():
        for side, w in sides.items():
            torch.testing.assert_close(ordered(found[layer][side]), ordered(w), atol=1e-5, rtol=0)
            torch.testing.assert_close(moments[layer][side].float(), w.mean(0), atol=1e-5, rtol=0)
    count = sum(map(len, TEXTS))
    counts = {n.rpartition("model.layers.")[2]: len(own["up"]) for n, own in found.items()}
    assert name != "called twice" or set(counts.values()) == {2 * count}
    assert name != "sparse" or 0 < counts["1.mlp.experts.0"] < count and "1.mlp.experts.3" not in counts
    idle = [str(w.message) for w in recwarn if "are given no token" in str(w.message)]
    assert len(idle) == (name == "sparse") and (not idle or "1 of 15" in idle[0] and "experts.3" in idle[0])

    routing = analysis.routing_by_task(model, tokenizer, rows)
    assert routing and all(len(value) == 2 for own in routing.values() for value in own.values())
    assert analysis.draw_routers(routing, list(rows))
    text = rows["piqa"][0]["instruction"]
    assert len(evaluate.routing_table(model, tokenizer, text).splitlines()) == 2 + len(tokenizer(text)["input_ids"])


def matrices(model, name="d2mora_B"):
    "Of each layer its matrices, views of the weights."
    return [m["default"].stack().detach() for n, m in model.named_modules() if n.endswith(name) and "default" in m]


def test_mean_similarity_equals_loops():
    model, pairs = adapted(), []
    for _, _, B in analysis.named_experts(model):
        cosines = [abs((a * b).sum() / a.norm() / b.norm()) for i, a in enumerate(B) for b in B[i + 1 :]]
        pairs.append(sum(cosines) / len(cosines))
    found = analysis.mean_similarity(analysis.layer_similarity(model), "up")
    assert found == pytest.approx(float(sum(pairs) / len(pairs)), abs=1e-5)


SMALLER = {
    ("many-to-many", "down"): {"num_down_experts": 2},
    ("many-to-many", "up"): {"num_up_experts": 7},
    ("one-to-many", "up"): {"num_up_experts": 3},
    ("one-to-one", "down"): {"num_down_experts": 3, "num_up_experts": 3},
}


@pytest.mark.parametrize("pairing, side", SMALLER)
def test_without_an_expert_is_the_model_that_never_had_it_and_leaves_no_trace(pairing, side):
    model, ids = adapted(pairing=pairing), tokens()
    before = model(ids).logits
    smaller = peft.get_peft_model(tiny_llama(), our_config(pairing, **SMALLER[pairing, side])).eval()
    with torch.no_grad():
        for name, own in smaller.named_modules():
            if isinstance(own, Experts):
                large = model.get_submodule(name)
                rows = [j for j in range(large.sizes[0]) if j != 1 or own.sizes == large.sizes]
                own.stack().copy_(large.stack()[rows])
    with analysis.changed_routing(model, analysis.without_expert(side, 1)):
        found = model(ids).logits
    torch.testing.assert_close(found, smaller(ids).logits)
    assert (before - found).abs().max() > 1e-3 and torch.equal(model(ids).logits, before)


def test_uniform_routers_are_routers_of_zeros():
    model, ids = adapted(), tokens()
    with analysis.changed_routing(model, dict(analysis._ablations(model))["uniform routers"]):
        found = model(ids).logits
    assert (found - model(ids).logits).abs().max() > 1e-3
    for R in [*matrices(model, "router_down"), *matrices(model, "router_up")]:
        R.zero_()
    torch.testing.assert_close(found, model(ids).logits, atol=1e-5, rtol=1e-5)


def test_an_ablation_that_fails_leaves_no_trace():
    model, ids = adapted(), tokens()
    before = model(ids).logits
    with pytest.raises(IndexError), analysis.changed_routing(model, analysis.without_expert("down", 3)):
        model(ids)
    assert torch.equal(model(ids).logits, before)
    with pytest.raises(ValueError, match="no active routers"), analysis.changed_routing(tiny_llama(), None):
        pass


@pytest.mark.filterwarnings("error:Mean of empty slice", "error:invalid value")
@pytest.mark.parametrize("pairing, M, N", [("one-to-many", 1, 3), ("one-to-one", 1, 1), ("LoRA", 1, 1)])
def test_pictures_of_single_experts(pairing, M, N, toy):
    config = peft.LoraConfig(r=2, target_modules="all-linear")
    if pairing != "LoRA":
        config = our_config(pairing, num_down_experts=M, num_up_experts=N)
    model = fill(peft.get_peft_model(load_base("toy")[0], config), std=0.05).eval().to(torch.bfloat16)
    (tokenizer, rows), found = toy, analysis.layer_similarity(model)
    routing = analysis.routing_by_task(model, tokenizer, rows)
    figures = {
        "similarity": analysis.draw_similarity(found),
        "routers": analysis.draw_routers(routing, list(rows)),
        "ablations": analysis.draw_ablations(analysis.ablate(model, tokenizer, rows)),
    }
    several = {"similarity", "routers"} if N > 1 else set()
    assert {n for n, figure in figures.items() if figure} == several | ({"ablations"} if pairing != "LoRA" else set())
    assert (analysis.mean_similarity(found, "up") > 0) == (N > 1)


def test_pictures_of_a_run_lie_in_its_folder_and_one_that_fails_is_left_out(tmp_path, monkeypatch, capsys):
    run = shutil.copytree(ROOT / "nbs/results/demo", tmp_path / "run")

    def broken(*_):
        raise ValueError("max() arg is an empty sequence")

    before, after = (json.loads((run / f"{name}.json").read_text()) for name in ("before", "evaluation-choice"))
    monkeypatch.setattr(analysis, "_ABLATION_ROWS", 1)
    monkeypatch.setattr(analysis, "_ROUTING_ROWS", 2)
    monkeypatch.setattr(analysis, "draw_similarity", broken)
    drawn = analysis.draw(run, before, after)
    assert [path.stem for path in drawn] == ["loss", "accuracy", "routers", "ablations"]
    text = evaluate.report(run)
    assert all(f"](plots/{path.name})" in text and path.with_suffix(".svg").is_file() for path in drawn)
    told = [line for line in capsys.readouterr().err.splitlines() if "failed" in line]
    assert len(told) == 1 and told[0].startswith("picture similarity failed and is left out,")
