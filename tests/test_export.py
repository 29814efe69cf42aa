"""Static exports: exact for constant routers, best at each rank, loadable without d2mora, complete or absent; bad input is one line."""

import json
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from unittest.mock import patch

import peft
import pytest
import torch
import transformers

from d2mora import tuner
from d2mora.cli import main
from d2mora.data import DataConfig, read_task
from d2mora.evaluate import evaluate, load_target
from d2mora.evaluate import test_rows as rows_to_grade
from d2mora.export import calibrate, constant_map, distill, divergences, encoded_rows, export, fitted_map, low_rank
from d2mora.export import static_lora
from d2mora.recipe import load_base
from d2mora.toy import toy_base, toy_rows
from helpers import PAIRS, adapted, difference, fill, our_config, tokens

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "nbs/results/demo"
SMALL = dict(tasks=["boolq", "piqa"], rows=8, limit=8)


def base(folder=None):
    return transformers.AutoModelForCausalLM.from_pretrained(folder or toy_base())


def rows(count=12):
    "Token rows of two lengths."
    return [{"input_ids": row} for length in (9, 14) for row in tokens(count // 2, length, seed=length).tolist()]


def constant(model, moments):
    "A router function that gives each router's mean, whatever the token."
    means = {}
    for name, layer in model.named_modules():
        for side in ("down", "up") if isinstance(layer, tuner.D2MoraLinear) else ():
            if "default" in (routers := getattr(layer, f"d2mora_router_{side}")):
                means[routers["default"].weight.data_ptr()] = moments[name][side].float()
    return lambda v, R: means[R.data_ptr()].expand(*v.shape[:-1], -1)


@pytest.mark.parametrize("pairing", PAIRS)
def test_constant_routers_are_exactly_a_lora(pairing):
    model, ids = adapted(pairing=pairing, r=2), tokens()
    moments = calibrate(model, rows())
    static = static_lora(model, moments, "mean")
    assert static.peft_config["default"].r == (2 * PAIRS[pairing][0] if pairing == "one-to-one" else 2)
    with torch.no_grad():
        with patch.object(tuner, "route", constant(model, moments)):
            expected = model(ids).logits
        assert difference(static(ids).logits, expected) < 1e-4 * expected.abs().max()
        assert difference(static(ids).logits, model(ids).logits) > 1e-3  # and routing does something


@pytest.mark.parametrize("pairing", PAIRS)
def test_fitted_map_is_the_best_there_is(pairing):
    "No neighbour of the fitted map has a smaller error over the calibration tokens, at full rank and cut to rank 1."
    model = adapted(pairing=pairing, r=2)
    name, m = next(iter(calibrate(model, rows(40)).items()))
    config = model.peft_config["default"]
    A, B = (W.detach() for W in model.get_submodule(name).experts("default"))
    K, Bt, A2 = fitted_map(config, m), B.flatten(0, 1).double().T, A.flatten(0, 1).double()
    error = lambda W: torch.trace(W @ m["hh"] @ W.T) - 2 * torch.trace(W @ m["eh"].T @ Bt.T)  # E|B e - W h|² + constant
    best = error(Bt @ K)
    down, up = low_rank(K, m["hh"], A, B, 1)
    cut = down @ torch.linalg.pinv(A2)
    for _ in range(20):
        assert error(Bt @ (K + 0.01 * torch.randn_like(K))) > best
        assert error((up + 0.02 * torch.randn_like(up)) @ cut) >= error(up @ cut) - 1e-12
    assert error(0.97 * Bt @ K) > best < error(1.03 * Bt @ K) and error(Bt @ constant_map(config, m)) >= best - 1e-12


def test_distillation_comes_closer_and_trains_the_lora_only():
    model, tokenizer, config = load_target(DEMO)
    train = [row for task in SMALL["tasks"] for row in encoded_rows(tokenizer, config, task, "train", 16)]
    static = static_lora(model, calibrate(model, train), "fitted", 3)
    before = divergences(model, static, train, tokenizer)
    frozen = {name: p.clone() for name, p in static.named_parameters() if "lora_" not in name}
    losses = distill(model, static, train, tokenizer, steps=8, learning_rate=3e-3, size=16)
    assert divergences(model, static, train, tokenizer)["text"] < 0.7 * before["text"] and len(losses) == 8
    assert all(torch.equal(p, frozen[name]) for name, p in static.named_parameters() if name in frozen)


WITHOUT_D2MORA = """
import sys
sys.modules["d2mora"] = None
import torch, peft
known = torch.load("expected.pt")
model = peft.AutoPeftModelForCausalLM.from_pretrained("lora").eval()
with torch.no_grad():
    loaded, merged = model(known["ids"]).logits, model.merge_and_unload()(known["ids"]).logits
torch.testing.assert_close(loaded, known["expected"])
torch.testing.assert_close(merged, known["expected"], rtol=1e-3, atol=1e-3)
"""


def test_an_export_needs_no_d2mora_and_merges_to_the_same(tmp_path):
    "In a process where d2mora cannot be imported the LoRA loads, gives the same logits, and merges."
    found = export(DEMO, tmp_path / "lora", rank=3, form="fitted", **SMALL)
    plain, ids = base(), tokens()
    with torch.no_grad():
        before = plain(ids).logits
        expected = peft.PeftModel.from_pretrained(plain, tmp_path / "lora").eval()(ids).logits
        assert difference(before, expected) > 1e-2
    assert found[""]["taken"] == "fitted"
    torch.save({"ids": ids, "expected": expected}, tmp_path / "expected.pt")
    subprocess.run([sys.executable, "-c", WITHOUT_D2MORA], cwd=tmp_path, check=True, timeout=300)


def tied_adapter(folder, dtype=torch.float32, **fields):
    "A base whose last layer is its embedding, and a filled adapter on it: the folder of each."
    model = transformers.AutoModelForCausalLM.from_pretrained(toy_base(), dtype=dtype)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(folder / "base")
    transformers.AutoTokenizer.from_pretrained(toy_base()).save_pretrained(folder / "base")
    model = fill(peft.get_peft_model(base(folder / "base"), our_config(r=2, **fields)), std=0.1)
    for name, p in model.named_parameters():
        if "modules_to_save" in name:
            p.data += 0.1 * torch.randn_like(p)
    model.save_pretrained(folder / "adapter")
    return folder / "base", folder / "adapter"


def expected_lora(adapter, tasks):
    "The fitted LoRA of the routed model as it was before any export, on the rows that `export` takes."
    model, tokenizer, _ = load_target(adapter)
    config = DataConfig(path="toy", cutoff=128)
    train = [row for task in tasks for row in encoded_rows(tokenizer, config, task, "train", SMALL["rows"])]
    return static_lora(model, calibrate(model, train), "fitted")


TIED = {  # what is adapted on a base with tied embeddings, its precision, and how it is exported
    "lm_head and others": (dict(target_modules=["lm_head", "q_proj"]), "merged"),
    "lm_head saved whole": (dict(modules_to_save=["lm_head"]), "merged"),
    "embeddings saved whole": (dict(modules_to_save=["embed_tokens"]), "per task"),
    "bf16": (dict(target_modules=["lm_head", "down_proj"], dtype=torch.bfloat16), "LoRA"),
}


@pytest.mark.parametrize("what", TIED)
def test_the_card_says_what_lies_on_the_disk(what, tmp_path):
    "An export is graded from its folder as anybody would grade it: the same figures, and the embeddings as they were."
    fields, how = TIED[what]
    folder, adapter = tied_adapter(tmp_path, **fields)
    settings = dict(data="toy", form="fitted", merge=how != "LoRA", per_task=how == "per task")
    for task, one in export(adapter, tmp_path / "out", **settings, **SMALL).items():
        place, tasks = tmp_path / "out" / task, [task] if task else SMALL["tasks"]
        graded = evaluate(place, data="toy", tasks=tasks, limit=SMALL["limit"], progress=False)["tasks"]
        written = json.loads((place / "export.json").read_text())["costs"]["fitted"]["tasks"]
        assert {t: own["accuracy"] for t, own in graded.items()} == {t: own["accuracy"] for t, own in written.items()}
        assert f"library_name: {'peft' if how == 'LoRA' else 'transformers'}" in (place / "README.md").read_text()
        whole, tokenizer, _ = load_target(place)
        ids = tokenizer(
            rows_to_grade(DataConfig("toy"), ["piqa"], 1)["piqa"][0]["instruction"], return_tensors="pt"
        ).input_ids
        with torch.no_grad():
            expected, read = expected_lora(adapter, tasks)(ids).logits.float(), whole.eval()(ids).logits.float()
        assert difference(read, expected) < (0.05 if what == "bf16" else 1e-3) * expected.abs().max()
        if "embed" not in what:
            before = load_base(str(folder))[0].get_input_embeddings().weight
            assert torch.equal(whole.get_input_embeddings().weight, before)


def test_command_writes_one_for_each_task_and_says_what_it_costs(tmp_path, capsys):
    words = "--per-task --rank 3 --tasks boolq,piqa --rows 8 --limit 8 --distill 2"
    assert main(["export", str(DEMO), str(tmp_path / "out"), *words.split()]) == 0
    out = capsys.readouterr().out
    for task in ("boolq", "piqa"):
        written = json.loads((tmp_path / "out" / task / "export.json").read_text())
        assert set(written["costs"]) == {"mean", "fitted", "distilled"}
        assert written["rank"] == 3 and written["base"] == "toy" and f"out/{task}" in out
        assert (tmp_path / "out" / task / "adapter_model.safetensors").is_file()
    assert all(word in out for word in ("agreement", "95 % interval", "divergence", "take ", "routed"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def test_nothing_is_left_when_writing_fails(tmp_path):
    failing = patch.object(import_module("d2mora.export"), "_write_static", side_effect=OSError("disk full"))
    with failing, pytest.raises(OSError):
        export(DEMO, tmp_path / "out", rank=3, **SMALL)
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    "Folders that cannot be exported; what is mistyped is in test_bad_input.py."
    folder = tmp_path_factory.mktemp("others")
    peft.get_peft_model(base(), peft.LoraConfig(target_modules=["q_proj"])).save_pretrained(folder / "lora")
    ia3 = peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[])
    peft.get_peft_model(base(), ia3).save_pretrained(folder / "ia3")
    quantized = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    shutil.copytree(toy_base(), folder / "quantized")
    config = json.loads((folder / "quantized/config.json").read_text())
    (folder / "quantized/config.json").write_text(json.dumps(config | quantized))
    (folder / "some/boolq").mkdir(parents=True)
    for split in ("train", "test"):
        (folder / f"some/boolq/{split}.json").write_text(json.dumps(toy_rows("toy", "boolq", split, 8)))
    run = shutil.copytree(DEMO, folder / "run")  # as if it had been trained on boolq alone
    text = (run / "recipe.yaml").read_text()
    start, end = text.index("  - boolq"), text.index("  prompt:")
    (run / "recipe.yaml").write_text(text[:start] + "  - boolq\n" + text[end:])
    return folder


BAD = {  # words behind `d2mora export` -> what the line must name; {o}: others, {d}: the demo, {x}: what would be written
    "{o}/lora {x}": "LORA",
    "{o}/ia3 {x}": "IA3",
    "{o}/run {x} --tasks piqa": "not trained on piqa",
    "{d} {x} --data {o}/some": "files here: boolq",
    "{d} {x} --base {o}/quantized --merge": "quantized",
    "{d}/adapter {x}": "data.path",
}


@pytest.mark.parametrize("words", BAD)
def test_bad_input_is_one_line_and_writes_nothing(words, others, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("D2MORA_DATA", raising=False)
    status = main(["export", *words.format(o=others, d=DEMO, x=tmp_path / "x").split()])
    out, err = capsys.readouterr()
    assert (status, out, err.strip().count("\n")) == (2, "", 0) and not list(tmp_path.iterdir()), (out, err)
    assert BAD[words] in err


def test_server_answers_as_the_model_does_in_python(tmp_path, monkeypatch):
    "A merged export behind a real server that speaks OpenAI's protocol, on loopback."
    for name in ("fastapi", "uvicorn", "openai"):
        pytest.importorskip(name, reason=f"{name} is missing: pip install 'd2mora[serve]'")
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from serving import answers

    tasks = ["piqa", "openbookqa"]
    export(DEMO, tmp_path / "served", rank=9, merge=True, form="fitted", tasks=tasks, rows=16, limit=4)
    found = answers(tmp_path / "served", {task: read_task("toy", task, "test")[1] for task in tasks})
    for row in found:
        assert row["python"] == row["server"] and row["python"].startswith("the correct answer is "), row
    assert len({row["python"] for row in found}) == 2  # it did read the prompts
