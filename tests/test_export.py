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

from d2mora.cli import main
from d2mora.data import read_task
from d2mora.evaluate import evaluate, load_target
from d2mora.export import calibrate, distill, divergence, encoded_rows, export, fitted_map, low_rank, static_lora
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


def constant(model):
    "The model with routers that give every token the same weights: their own are zero."
    for name, p in model.named_parameters():
        if "d2mora_router" in name:
            p.data.zero_()
    return model


@pytest.mark.parametrize("pairing", PAIRS)
def test_constant_routers_are_exactly_a_lora(pairing):
    model, ids = adapted(pairing=pairing, r=2), tokens()
    with torch.no_grad():
        routed = model(ids).logits
        expected = constant(model)(ids).logits
        static = static_lora(model, calibrate(model, rows()), 2 * PAIRS[pairing][0] if pairing == "one-to-one" else 2)
        assert difference(static(ids).logits, expected) < 1e-4 * expected.abs().max()
    assert difference(routed, expected) > 1e-3  # and routing does something


@pytest.mark.parametrize("pairing", PAIRS)
def test_fitted_map_is_the_best_there_is(pairing):
    "No neighbour of the fitted map has a smaller error over the calibration tokens, at full rank and cut to rank 1."
    model = adapted(pairing=pairing, r=2)
    name, m = next(iter(calibrate(model, rows(40)).items()))
    A, B = (W.detach() for W in model.get_submodule(name).experts("default"))
    K, Bt, A2 = fitted_map(m), B.flatten(0, 1).double().T, A.flatten(0, 1).double()
    error = lambda W: torch.trace(W @ m["hh"] @ W.T) - 2 * torch.trace(W @ m["eh"].T @ Bt.T)  # E|B e - W h|² + constant
    best = error(Bt @ K)
    down, up = low_rank(K, m["hh"], A, B, 1)
    cut = down @ torch.linalg.pinv(A2)
    for _ in range(20):
        assert error(Bt @ (K + 0.01 * torch.randn_like(K))) > best
        assert error((up + 0.02 * torch.randn_like(up)) @ cut) >= error(up @ cut) - 1e-12
    assert error(0.97 * Bt @ K) > best < error(1.03 * Bt @ K)


def test_distillation_comes_closer_and_trains_the_lora_only():
    model, tokenizer, config = load_target(DEMO)
    train = [row for task in SMALL["tasks"] for row in encoded_rows(tokenizer, config, task, "train", 16)]
    static = static_lora(model, calibrate(model, train), 3)
    before = divergence(model, static, train, tokenizer)
    frozen = {name: p.clone() for name, p in static.named_parameters() if "lora_" not in name}
    distill(model, static, train, tokenizer, steps=8, learning_rate=3e-3, size=16)
    assert divergence(model, static, train, tokenizer) < 0.7 * before
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
    export(DEMO, tmp_path / "lora", rank=3, **SMALL)
    plain, ids = base(), tokens()
    with torch.no_grad():
        before = plain(ids).logits
        expected = peft.PeftModel.from_pretrained(plain, tmp_path / "lora").eval()(ids).logits
        assert difference(before, expected) > 1e-2
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


TIED = {  # what is adapted on a base with tied embeddings, its precision, and whether it is exported merged
    "lm_head and others": (dict(target_modules=["lm_head", "q_proj"]), True),
    "embeddings saved whole": (dict(modules_to_save=["embed_tokens"]), True),
    "bf16": (dict(target_modules=["lm_head", "down_proj"], dtype=torch.bfloat16), False),
}


@pytest.mark.parametrize("what", TIED)
def test_the_card_says_what_lies_on_the_disk(what, tmp_path):
    "An export is graded from its folder as anybody would grade it: the same figures, and the embeddings as they were."
    fields, merge = TIED[what]
    (folder, adapter), place = tied_adapter(tmp_path, **fields), tmp_path / "out"
    export(adapter, place, data="toy", merge=merge, **SMALL)
    graded = evaluate(place, data="toy", tasks=SMALL["tasks"], limit=SMALL["limit"], progress=False)["tasks"]
    written = json.loads((place / "export.json").read_text())["costs"]["fitted"]["tasks"]
    assert {t: own["accuracy"] for t, own in graded.items()} == {t: own["accuracy"] for t, own in written.items()}
    assert f"library_name: {'transformers' if merge else 'peft'}" in (place / "README.md").read_text()
    whole = load_target(place)[0]
    if "embed" not in what:
        before = load_base(str(folder))[0].get_input_embeddings().weight
        assert torch.equal(whole.get_input_embeddings().weight, before)


def test_command_writes_one_for_each_task_and_says_what_it_costs(tmp_path, capsys):
    words = "--per-task --rank 3 --tasks boolq,piqa --rows 8 --limit 8 --distill 2"
    assert main(["export", str(DEMO), str(tmp_path / "out"), *words.split()]) == 0
    out = capsys.readouterr().out
    for task in ("boolq", "piqa"):
        written = json.loads((tmp_path / "out" / task / "export.json").read_text())
        assert set(written["costs"]) == {"fitted", "distilled"} and written["form"] == "distilled"
        assert written["rank"] == 3 and written["base"] == "toy" and f"out/{task}" in out
        assert (tmp_path / "out" / task / "adapter_model.safetensors").is_file()
    assert all(word in out for word in ("agreement", "95 % interval", "divergence", "keeps", "routed"))
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
    shutil.copytree(toy_base(), folder / "quantized", copy_function=shutil.copyfile)
    config = json.loads((folder / "quantized/config.json").read_text())
    (folder / "quantized/config.json").write_text(json.dumps(config | {"quantization_config": {"load_in_4bit": True}}))
    (folder / "some/boolq").mkdir(parents=True)
    for split in ("train", "test"):
        (folder / f"some/boolq/{split}.json").write_text(json.dumps(toy_rows("toy", "boolq", split, 8)))
    return folder


BAD = {  # words behind `d2mora export` -> what the line must name; {o}: others, {d}: the demo, {x}: what would be written
    "{o}/lora {x}": "LORA",
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
    export(DEMO, tmp_path / "served", rank=9, merge=True, tasks=tasks, rows=16, limit=4)
    found = answers(tmp_path / "served", {task: read_task("toy", task, "test")[1] for task in tasks})
    for row in found:
        assert row["python"] == row["server"] and row["python"].startswith("the correct answer is "), row
    assert len({row["python"] for row in found}) == 2  # it did read the prompts
