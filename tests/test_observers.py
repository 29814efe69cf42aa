"""What looks at adapted layers from outside, on models that call them otherwise than with (batch, tokens, d): flattened, twice, with some tokens, never."""

import shutil
from pathlib import Path

import peft
import pytest
import torch
import transformers
from helpers import adapted, fill, our_config, tiny_llama
from torch import nn

from d2mora import analysis, evaluate
from d2mora.analysis import Watch
from d2mora.cli import main
from d2mora.data import read_task
from d2mora.scoring import padded
from d2mora.recipe import load_base
from d2mora.train import read_metrics
from d2mora.export import calibrate, static_lora
from d2mora.tuner import mixture, watch_layers

ROOT = Path(__file__).parents[1]
VOCABULARY = 512  # the toy world's tokens among them
TEXTS = [list(range(5, 25)), list(range(30, 33)), [7, 8, 9, 90, 91, 92, 93], list(range(40, 60))]
SIZES = dict(vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=256)


def tiny_opt(**changes):
    "Flattens (batch, tokens) before fc1 and fc2."
    return transformers.OPTForCausalLM(transformers.OPTConfig(**{**SIZES, "ffn_dim": 96, "word_embed_proj_dim": 64, **changes}))


def tiny_moe():
    "Flattens (batch, tokens) before its shared expert."
    sizes = dict(intermediate_size=96, moe_intermediate_size=32, shared_expert_intermediate_size=48, num_key_value_heads=2, num_experts=4, num_experts_per_tok=2)
    return transformers.Qwen2MoeForCausalLM(transformers.Qwen2MoeConfig(**SIZES, **sizes))


class Experts(nn.Module):
    "Expert k is given the tokens whose largest of the first three features is k: some of the tokens, or none; expert 3 is never called."

    def __init__(self, width):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(width, width) for _ in range(4))

    def forward(self, x):
        out, chosen = torch.zeros_like(x), x[..., :3].argmax(-1)
        for k in range(3): out[chosen == k] = self.experts[k](x[chosen == k])
        return out


def sparse():
    model = tiny_llama(vocab_size=VOCABULARY)
    model.model.layers[1].mlp = Experts(64)
    return model


def looped():
    model = tiny_llama(vocab_size=VOCABULARY)
    model.model.layers[1] = model.model.layers[0]
    return model


BASES = {"flattened": (tiny_opt, ["q_proj", "fc1", "fc2"]), "shared expert": (tiny_moe, ["q_proj", "up_proj"]), "sparse": (sparse, "all-linear"), "called twice": (looped, ["q_proj", "up_proj"]),
         "output layer": (lambda: tiny_llama(vocab_size=VOCABULARY), ["q_proj", "k_proj", "lm_head"])}


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
        for side, w in seen.items(): found.setdefault(name, {}).setdefault(side, []).append(w.reshape(-1, w.shape[-1]))

    with watch_layers(model, see):
        for text in texts: model(torch.tensor([text]), use_cache=False)
    return {name: {side: torch.cat(own) for side, own in sides.items()} for name, sides in found.items() if len(sides["up"])}


@pytest.fixture(scope="module")
def toy():
    "The toy world's tokenizer, and rows of two tasks."
    return load_base("toy")[1], {task: read_task("toy", task, "train").to_list()[:3] for task in ("piqa", "boolq")}


def by_value(w): return w[w[:, 0].argsort()]


@pytest.mark.parametrize("name", BASES)
def test_routing_of_what_each_layer_is_given(name):
    model = model_of(name)
    found, expected = analysis.token_weights(model, TEXTS), given(model, TEXTS)
    assert found.keys() == expected.keys() and len(found) >= 2
    for layer, sides in expected.items():
        for side, w in sides.items(): torch.testing.assert_close(by_value(found[layer][side]), by_value(w), atol=1e-5, rtol=0)
    tokens = sum(map(len, TEXTS))
    counts = {n.rpartition("model.layers.")[2]: len(own["up"]) for n, own in found.items()}
    assert name != "called twice" or set(counts.values()) == {2 * tokens}
    assert name != "sparse" or 0 < counts["1.mlp.experts.0"] < tokens and "1.mlp.experts.3" not in counts


@pytest.mark.parametrize("name", BASES)
def test_instruments_and_pictures(name, toy):
    model, (tokenizer, rows) = model_of(name), toy
    text = rows["piqa"][0]["instruction"]
    table = evaluate.routing_table(model, tokenizer, text).splitlines()
    assert len(table) == 2 + len(tokenizer(text)["input_ids"]) and len(table[0].split("|")) == 1 + 1 + 3 + 8 + 1
    pages = analysis.token_map(model, tokenizer, text)
    assert "q_proj" in str(list(pages["layers"])) and not any("experts" in layer for layer in pages["layers"])  # a layer that is given some tokens has none to show at each
    found = analysis.routing_by_task(model, tokenizer, rows)
    figures = [analysis.draw_routers(found, list(rows)), analysis.draw_layers(found, list(rows)), analysis.draw_effective(found), analysis.draw_meetings(found), analysis.draw_tokens(pages)]
    assert found and all(len(value) == 2 for own in found.values() for value in own.values()) and not any("nan" in figure.get_label() for figure in figures)
    assert analysis.alarms(model, TEXTS).keys() == analysis.ALARMS.keys()
    with analysis.changed(model, lambda *part: analysis.one_mix(*part, weights=analysis.means_of(found, ["piqa", "boolq"])["piqa"])): model(torch.tensor([TEXTS[0]]))


@pytest.mark.parametrize("name", BASES)
def test_export_of_what_each_layer_is_given(name, recwarn):
    model = model_of(name)
    moments, expected = calibrate(model, [{"input_ids": text} for text in TEXTS]), given(model, TEXTS)
    for layer, sides in expected.items():
        for side, w in sides.items(): torch.testing.assert_close(moments[layer][side].float(), w.mean(0), atol=1e-5, rtol=0)
    idle = [str(w.message) for w in recwarn if "are given no token" in str(w.message)]
    assert len(idle) == (name == "sparse") and (not idle or "1 of 15" in idle[0] and "experts.3" in idle[0])
    with torch.no_grad():
        for parameter, p in model.named_parameters():
            if "router" in parameter: p.zero_()  # all weights equal: then the adapter is a LoRA
        answers = [m(torch.tensor([TEXTS[0]]), use_cache=False).logits for m in (static_lora(model, calibrate(model, [{"input_ids": text} for text in TEXTS]), "mean"), model, model.get_base_model())]
    torch.testing.assert_close(answers[0], answers[1], atol=2e-3, rtol=1e-3)


def trained(model, folder, watch):
    "Three steps of transformers' Trainer with a padded batch."
    from datasets import Dataset

    data = Dataset.from_list([{"input_ids": text, "labels": text, "task": "piqa"} for text in TEXTS])
    args = transformers.TrainingArguments(str(folder), max_steps=3, logging_steps=1, per_device_train_batch_size=4, report_to="none", disable_tqdm=True, use_cpu=True, remove_unused_columns=False, save_strategy="no")

    def collate(rows):
        ids, mask = padded([row["input_ids"] for row in rows], "right", "cpu")
        return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}

    trainer = transformers.Trainer(model, args, train_dataset=data, data_collator=collate, callbacks=[watch])
    trainer.train()
    return [line for line in trainer.state.log_history if "loss" in line]


@pytest.mark.parametrize("name", BASES)
def test_a_watched_run_of_every_shape(name, tmp_path, capsys):
    lines = trained(model_of(name), tmp_path, Watch())
    assert len(lines) == 3 and all({"alarms_dead", "grad_norm_A", "loss_piqa"} <= line.keys() for line in lines)
    assert "monitoring" not in capsys.readouterr().err


@pytest.mark.parametrize("part, kept", [("alarms", "loss_piqa"), ("losses_by_task", "alarms_dead"), ("gradient_norms", "alarms_dead"), ("task_index", "alarms_dead"), ("task_means", "alarms_dead")])
def test_monitoring_that_fails_is_told_once_and_ends_no_run(part, kept, tmp_path, capsys, monkeypatch):
    def broken(*_): raise IndexError("The shape of the mask\n does not fit")

    monkeypatch.setattr(analysis, part, broken)
    lines, told = trained(model_of("flattened"), tmp_path, Watch()), [line for line in capsys.readouterr().err.splitlines() if "monitoring" in line]
    assert len(lines) == 3 and all(kept in line for line in lines)
    assert len(told) == 1 and "IndexError: The shape of the mask" in told[0] and "the run goes on" in told[0]


# ---- a single expert on either side, or none ----
SINGLE = [("one-to-many", 1, 1), ("one-to-many", 1, 3), ("many-to-many", 1, 3), ("many-to-many", 3, 1), ("many-to-many", 1, 1), ("one-to-one", 1, 1), ("LoRA", 1, 1), ("DoRA", 1, 1)]


@pytest.mark.filterwarnings("error:Mean of empty slice", "error:invalid value")
@pytest.mark.parametrize("pairing, M, N", SINGLE)
def test_analysis_of_single_experts(pairing, M, N, toy, tmp_path):
    (tokenizer, rows), base = toy, load_base("toy")[0]
    config = our_config(pairing, num_down_experts=M, num_up_experts=N, target_modules="all-linear") if "oRA" not in pairing else peft.LoraConfig(r=2, use_dora=pairing == "DoRA", target_modules="all-linear")
    model = fill(peft.get_peft_model(base, config), std=0.05).eval()
    parts = [("similarity of two", analysis.draw_similarity, {"a": model, "b": model}), *analysis.expert_pictures(model, "a"), *analysis.router_pictures(model, tokenizer, rows, rows, "plain", tmp_path)]
    figures = {name: make(*args) for name, make, *args in parts}
    drawn = {name for name, figure in figures.items() if figure}
    assert not any("nan" in figure.get_label() or "of 1 " in figure.get_label() for figure in filter(None, figures.values()))
    assert ("similarity" in drawn) == ("heatmaps" in drawn) == (max(M, N) > 1) == ("routers" in drawn) == ("tokens" in drawn) and "meetings" not in drawn
    assert ("ablations" in drawn) == ("map" in drawn) == ("oRA" not in pairing)
    assert not any(analysis.alarms(model, TEXTS)[kind] for kind in ("twins", "collapsed"))


def test_a_map_of_one_layer_and_of_experts_that_are_all_zero():
    model = adapted(target_modules=r".*0\.self_attn\.q_proj", num_down_experts=5)
    titles = lambda: [ax.get_title("left")[:9] for ax in analysis.draw_map(model).axes]
    assert titles() == ["A's: t-SN", "A's: PCA,", "B's: t-SN", "B's: PCA,"] and "nan" not in analysis.draw_map(model).get_label()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "d2mora_B" in name: p.zero_()
    assert titles() == ["A's: t-SN", "A's: PCA,"]


def test_a_picture_that_fails_is_left_out_and_the_rest_is_drawn(tmp_path, monkeypatch, capsys):
    def broken(*_): raise ValueError("max() arg is an empty sequence")

    monkeypatch.setattr(analysis, "draw_heatmaps", broken), monkeypatch.setattr(analysis, "token_map", broken)
    drawn = analysis.draw(shutil.copytree(ROOT / "nbs/results/demo", tmp_path / "run"))
    told = [line for line in capsys.readouterr().err.splitlines() if "failed" in line]
    assert {path.stem for path in drawn} == {"loss", "similarity", "map", "routers", "layers", "effective", "meetings"}
    assert [line[:40] for line in told] == ["picture heatmaps failed and is left out,", "routing of a text failed and is left out"]


def test_a_run_on_a_base_that_flattens(tmp_path, capsys):
    "The whole of it, from the command: trained, watched, graded, drawn, exported."
    base = tmp_path / "base"
    tiny_opt().save_pretrained(base), load_base("toy")[1].save_pretrained(base)
    words = [f"base={base}", "training.max_steps=2", "training.logging_steps=1", "data.tasks=[piqa,boolq]", "training.disable_tqdm=true", "--output", str(tmp_path / "run")]
    assert main(["train", "demo", *words]) == 0 and main(["evaluate", str(tmp_path / "run"), "--limit", "4", "--ask", "what color?"]) == 0
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "lora"), "--rows", "4", "--limit", "2"]) == 0
    said = capsys.readouterr()
    assert "failed" not in said.err and "| token" in said.out and "alarms_dead" in read_metrics(tmp_path / "run")[-1]
    assert {"routers", "tokens", "meetings"} <= {path.stem for path in (tmp_path / "run/plots").glob("*.png")} and (tmp_path / "lora/adapter_config.json").is_file()
