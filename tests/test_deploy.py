"""Static exports: exact at mean routing, best at each rank, loadable without d2mora, whole or not at all; bad input is one line."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import peft
import pytest
import torch
import transformers

from d2mora import export, tuner
from d2mora.cli import main
from d2mora.export import export
from d2mora.data import DataConfig
from d2mora.evaluate import evaluate, load_target
from d2mora.evaluate import test_rows as rows_to_grade
from d2mora.recipe import load_base
from d2mora.export import calibrate, encoded_rows, fitted_map, low_rank, mean_map, static_lora
from d2mora.toy import toy_base
from helpers import PAIRS, adapted, difference, fill, our_config, tiny_llama, tokens

DEMO = Path(__file__).parents[1] / "nbs/results/demo"
SMALL = dict(tasks=["boolq", "piqa"], rows=8, limit=8)


def rows(count=12):
    "Token rows of two lengths."
    return [{"input_ids": row} for length in (9, 14) for row in tokens(count // 2, length, seed=length).tolist()]


def held(model, moments):
    "A router function that gives each router's mean, whatever the token."
    means = {}
    for name, layer in model.named_modules():
        if isinstance(layer, tuner.D2MoraLinear):
            for side in ("down", "up"):
                if "default" in getattr(layer, f"d2mora_router_{side}"): means[getattr(layer, f"d2mora_router_{side}")["default"].weight.data_ptr()] = moments[name][side]
    return lambda v, R: means[R.data_ptr()].float().expand(*v.shape[:-1], -1)


@pytest.mark.parametrize("pairing", PAIRS)
def test_mean_routing_is_exactly_a_lora(pairing):
    model, ids = adapted(pairing=pairing, r=2), tokens()
    moments = calibrate(model, rows())
    static = static_lora(model, moments, "mean")
    M, _ = PAIRS[pairing]
    assert static.peft_config["default"].r == (2 * M if pairing == "one-to-one" else 2)
    with torch.no_grad():
        with patch.object(tuner, "route", held(model, moments)): expected = model(ids).logits
        assert difference(static(ids).logits, expected) < 1e-4 * expected.abs().max()
        assert difference(static(ids).logits, model(ids).logits) > 1e-3  # and routing does something


@pytest.mark.parametrize("pairing", PAIRS)
def test_fitted_map_is_the_best_there_is(pairing):
    "No neighbour of the fitted map has a smaller error over the calibration tokens, at full rank and cut."
    model = adapted(pairing=pairing, r=2)
    name, m = next(iter(calibrate(model, rows(40)).items()))
    config = model.peft_config["default"]
    layer, K = model.get_submodule(name), fitted_map(config, m)
    A, B = (W.detach() for W in layer.experts("default"))
    Bt, A2 = B.flatten(0, 1).double().T, A.flatten(0, 1).double()
    error = lambda W: torch.trace(W @ m["hh"] @ W.T) - 2 * torch.trace(W @ m["eh"].T @ Bt.T)  # E|B e - W h|² but for a constant
    best = error(Bt @ K)
    for _ in range(20): assert error(Bt @ (K + 0.01 * torch.randn_like(K))) > best
    assert error(0.97 * Bt @ K) > best < error(1.03 * Bt @ K)
    down, up = low_rank(K, m["hh"], A, B, 1)
    cut = down @ torch.linalg.pinv(A2)
    for _ in range(20): assert error((up + 0.02 * torch.randn_like(up)) @ cut) >= error(up @ cut) - 1e-12
    assert error(Bt @ mean_map(config, m)) >= best - 1e-12


def test_exported_adapter_needs_no_d2mora(tmp_path):
    "In a process where d2mora cannot be imported: it loads, gives the same logits, and merges to them."
    found = export(DEMO, tmp_path / "lora", rank=3, **SMALL)
    base = transformers.AutoModelForCausalLM.from_pretrained(toy_base())
    ids = tokens()
    with torch.no_grad():
        plain = base(ids).logits
        expected = peft.PeftModel.from_pretrained(base, tmp_path / "lora").eval()(ids).logits
    assert difference(plain, expected) > 1e-2 and found[""]["taken"] in ("mean", "fitted")
    torch.save({"ids": ids, "expected": expected}, tmp_path / "expected.pt")
    code = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "d2mora": raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Block())
import torch, peft
known = torch.load("expected.pt")
model = peft.AutoPeftModelForCausalLM.from_pretrained("lora").eval()
with torch.no_grad():
    loaded = model(known["ids"]).logits
    merged = model.merge_and_unload()(known["ids"]).logits
torch.testing.assert_close(loaded, known["expected"])
torch.testing.assert_close(merged, known["expected"], rtol=1e-3, atol=1e-3)
assert "d2mora" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, timeout=300)


def test_merged_export_is_a_whole_model(tmp_path):
    export(DEMO, tmp_path / "lora", rank=3, form="fitted", **SMALL)
    export(DEMO, tmp_path / "model", rank=3, form="fitted", merge=True, **SMALL)
    base, ids = transformers.AutoModelForCausalLM.from_pretrained(toy_base()), tokens()
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    with torch.no_grad(): assert difference(peft.PeftModel.from_pretrained(base, tmp_path / "lora").eval()(ids).logits, merged(ids).logits) < 1e-3
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "model")("is it so").input_ids
    assert "library_name: transformers" in (tmp_path / "model/README.md").read_text()


def test_command_writes_one_for_each_task_and_says_what_it_costs(tmp_path, capsys):
    args = ["export", str(DEMO), str(tmp_path / "out"), "--per-task", "--rank", "3", "--tasks", "boolq,piqa", "--rows", "8", "--limit", "8", "--distill", "2"]
    assert main(args) == 0
    out = capsys.readouterr().out
    for task in ("boolq", "piqa"):
        written = json.loads((tmp_path / "out" / task / "export.json").read_text())
        assert set(written["costs"]) == {"mean", "fitted", "distilled"} and written["rank"] == 3 and written["base"] == "toy"
        assert (tmp_path / "out" / task / "adapter_model.safetensors").is_file() and f"out/{task}" in out
    for word in ("agreement", "95 % interval", "divergence", "take ", "routed", "chance"): assert word in out
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def test_distillation_comes_closer():
    from d2mora.export import divergences
    from d2mora.export import distill, encoded_rows
    from d2mora.evaluate import load_target

    model, tokenizer, config = load_target(DEMO)
    train = [row for task in SMALL["tasks"] for row in encoded_rows(tokenizer, config, task, "train", 32)]
    static = static_lora(model, calibrate(model, train), "fitted", 3)
    before = divergences(model, static, train, tokenizer)
    frozen = {name: p.clone() for name, p in static.named_parameters() if "lora_" not in name}
    losses = distill(model, static, train, tokenizer, steps=12, learning_rate=3e-3)
    after = divergences(model, static, train, tokenizer)
    assert after["text"] < 0.7 * before["text"] and len(losses) == 12
    assert all(torch.equal(p, frozen[name]) for name, p in static.named_parameters() if name in frozen)


def test_modules_to_save_go_along(tmp_path):
    model = adapted(modules_to_save=["lm_head"])
    head = "base_model.model.lm_head"
    with torch.no_grad(): model.get_submodule(head).modules_to_save["default"].weight.add_(1)
    static = static_lora(model, calibrate(model, rows()), "mean")
    static.save_pretrained(tmp_path / "lora")
    loaded, ids = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "lora").eval(), tokens()
    for m in (static, loaded): assert torch.equal(m.get_submodule(head).modules_to_save["default"].weight, model.get_submodule(head).modules_to_save["default"].weight)
    assert torch.equal(static.get_submodule(head).original_module.weight, tiny_llama().lm_head.weight)
    with torch.no_grad(): assert difference(loaded(ids).logits, static(ids).logits) < 1e-5


def tied_adapter(folder, dtype=torch.float32, **fields):
    "A base whose last layer is its embedding, and a filled adapter on it: the folder of each."
    base = transformers.AutoModelForCausalLM.from_pretrained(toy_base(), dtype=dtype)
    assert base.lm_head.weight is base.model.embed_tokens.weight
    base.save_pretrained(folder / "base"), transformers.AutoTokenizer.from_pretrained(toy_base()).save_pretrained(folder / "base")
    model = fill(peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(folder / "base"), our_config(r=2, **fields)), std=0.1)
    for name, p in model.named_parameters():
        if "modules_to_save" in name: p.data += 0.1 * torch.randn_like(p)
    model.save_pretrained(folder / "adapter")
    return folder / "base", folder / "adapter"


TIED = {  # what is adapted on a base with tied embeddings, and its precision
    "lm_head": dict(target_modules=["lm_head"]),
    "lm_head and others": dict(target_modules=["lm_head", "q_proj"]),
    "lm_head saved whole": dict(modules_to_save=["lm_head"]),
    "embeddings saved whole": dict(modules_to_save=["embed_tokens"]),
    "bf16": dict(target_modules=["lm_head", "down_proj"], dtype=torch.bfloat16),
}


@pytest.mark.parametrize("what, how", [*((what, "merged") for what in TIED), ("lm_head", "per task"), ("embeddings saved whole", "per task"), ("bf16", "LoRA")])
def test_the_card_says_what_lies_on_the_disk(what, how, tmp_path):
    "An export is graded from its folder as anybody would grade it: the same figures, and the embeddings as they were."
    base, adapter = tied_adapter(tmp_path, **TIED[what])
    found = export(adapter, tmp_path / "out", data="toy", form="fitted", merge=how != "LoRA", per_task=how == "per task", **SMALL)
    for task, one in found.items():
        folder = tmp_path / "out" / task
        graded = evaluate(folder, data="toy", tasks=[task] if task else SMALL["tasks"], limit=SMALL["limit"], progress=False)
        written = json.loads((folder / "export.json").read_text())["costs"]["fitted"]
        assert {t: own["accuracy"] for t, own in graded["tasks"].items()} == {t: own["accuracy"] for t, own in written["tasks"].items()}
        whole, tokenizer, _ = load_target(folder)
        lora = static_lora(*calibrated(adapter, list(one["costs"]["mean"]["tasks"])), "fitted")
        ids = tokenizer(rows_to_grade("toy", ["piqa"], 1)["piqa"][0]["instruction"], return_tensors="pt").input_ids
        with torch.no_grad(): expected, read = lora(ids).logits.float(), whole.eval()(ids).logits.float()
        assert difference(read, expected) < (0.05 if what == "bf16" else 1e-3) * expected.abs().max()
        if "embed" not in what: assert torch.equal(whole.get_input_embeddings().weight, load_base(str(base))[0].get_input_embeddings().weight)


def calibrated(adapter, tasks):
    "The routed model as it was before any export, and its moments on the rows that `export` takes."
    model, tokenizer, _ = load_target(adapter)
    return model, calibrate(model, [row for task in tasks for row in encoded_rows(tokenizer, DataConfig(path="toy", cutoff=128), task, "train", SMALL["rows"])])


def test_nothing_is_left_when_writing_fails(tmp_path):
    with patch.object(export, "write_static", side_effect=OSError("disk full")), pytest.raises(OSError): export(DEMO, tmp_path / "out", rank=3, **SMALL)
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    "Folders that cannot be exported."
    folder = tmp_path_factory.mktemp("others")
    for kind, config in {"lora": peft.LoraConfig(target_modules=["q_proj"]), "ia3": peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[])}.items():
        peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(toy_base()), config).save_pretrained(folder / kind)
    (folder / "empty").mkdir()
    for name, change in {"quantized": {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "unknown": {"model_type": "no-such-model", "architectures": ["NoSuch"]}}.items():
        shutil.copytree(toy_base(), folder / name)
        config = json.loads((folder / name / "config.json").read_text())
        (folder / name / "config.json").write_text(json.dumps(config | change))
    (folder / "some/boolq").mkdir(parents=True)
    from d2mora.toy import toy_rows
    for split in ("train", "test"): (folder / f"some/boolq/{split}.json").write_text(json.dumps(toy_rows("toy", "boolq", split, 8)))
    return folder


BAD = {  # words behind `d2mora export` -> what the line must name; {o} is the folder of others, {d} the demo, {x} what would be written
    "{o}/lora {x}": "LORA",
    "{o}/ia3 {x}": "IA3",
    "{o}/empty {x}": "no adapter",
    "{o}/nowhere {x}": "no adapter",
    "{d} {o}": "exists",
    "{d} {x} --rank 10": "1 to 9",
    "{d} {x} --rank 0": "rank=0",
    "{d} {x} --rows 0": "rows=0",
    "{d} {x} --form fited": "did you mean 'fitted'",
    "{d} {x} --form distilled": "--distill",
    "{d} {x} --distill -1": "distill=-1",
    "{d} {x} --tasks copa": "unknown task",
    "{d} {x} --data {o}/some": "files here: boolq",
    "{d} {x} --base {o}/quantized --merge": "quantized",
    "{d} {x} --base {o}/unknown": "no-such-model",
    "{d}/adapter {x}": "data.path",
}


@pytest.mark.parametrize("words", BAD)
def test_bad_input_is_one_line(words, others, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("D2MORA_DATA", raising=False)
    status = main(["export", *words.format(o=others, d=DEMO, x=tmp_path / "x").split()])
    out, err = capsys.readouterr()
    assert (status, out, err.strip().count("\n")) == (2, "", 0), (out, err)
    assert BAD[words] in err and not list(tmp_path.iterdir())


def test_rows_of_tasks_that_were_not_trained_are_refused(tmp_path, capsys):
    run = shutil.copytree(DEMO, tmp_path / "run")
    text = (run / "recipe.yaml").read_text()
    (run / "recipe.yaml").write_text(text[: text.index("  - boolq")] + "  - boolq\n" + text[text.index("  prompt:") :])
    assert main(["export", str(run), str(tmp_path / "x"), "--tasks", "piqa"]) == 2
    assert "not trained on piqa" in capsys.readouterr().err and not (tmp_path / "x").exists()


def test_bitsandbytes_missing_is_one_line(others, tmp_path, capsys):
    "A base that was saved quantized, on a machine without bitsandbytes."
    from transformers.quantizers import quantizer_bnb_4bit

    with patch.object(quantizer_bnb_4bit, "is_bitsandbytes_available", lambda: False, create=True), patch("transformers.utils.import_utils.is_bitsandbytes_available", lambda *a: False):
        hidden = dict.fromkeys([n for n in sys.modules if n.split(".")[0] == "bitsandbytes"])
        with patch.dict(sys.modules, hidden): status = main(["export", str(DEMO), str(tmp_path / "x"), "--base", str(others / "quantized")])
    out, err = capsys.readouterr()
    assert (status, out, err.strip().count("\n")) == (2, "", 0) and "bitsandbytes" in err and not list(tmp_path.iterdir())
