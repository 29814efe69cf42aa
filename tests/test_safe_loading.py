"""Files from others: what is sent to us is read and never run, and no secret is passed on.

Each attack that could run something would make the folder `ran`, and is first shown to do so where nobody checks.
"""

import ast
import json
import os
import pickle
import shutil
import socket
from pathlib import Path

import pytest
import torch
import transformers
import yaml

from d2mora.cli import main
from d2mora.recipe import load_base, load_recipe
from d2mora.toy import toy_base
from d2mora.train import train
from d2mora.utils import check_words, read_tensors, read_yaml

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "nbs" / "results" / "demo"
GRADE = ["--data", "toy", "--tasks", "boolq", "--limit", "4"]
SHORT = "data.tasks=[boolq] training.max_steps=2 training.save_strategy=steps training.save_steps=1".split()
SHORT += ["training.disable_tqdm=true"]


@pytest.fixture
def ran(tmp_path):
    "What must not be there in the end."
    yield tmp_path / "ran"
    assert not (tmp_path / "ran").exists(), "code of a stranger has run"


@pytest.fixture
def adapter(tmp_path):
    return Path(shutil.copytree(DEMO / "adapter", tmp_path / "adapter"))


@pytest.fixture
def base(tmp_path):
    return Path(shutil.copytree(toy_base(), tmp_path / "base"))


@pytest.fixture
def refused(capsys, monkeypatch):
    "Run a command, with nobody to ask: it must fail with one line and exit status 2. The line."

    def call(*words):
        monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asked"))
        capsys.readouterr()
        status, (out, err) = main([str(word) for word in words]), capsys.readouterr()
        lines = [line for line in err.splitlines() if line.startswith("d2mora: ")]
        assert (status, out, len(lines)) == (2, "", 1) and "Traceback" not in err, (status, out, err)
        return lines[0]

    return call


def commands(adapter, base, out):
    "Everything that loads an adapter or a base."
    return [
        ["evaluate", adapter, *GRADE],
        ["export", adapter, out, "--data", "toy"],
        ["evaluate", "--base", base, *GRADE],
        ["train", "demo", f"base={base}", "--output", out],
    ]


# ---- pickles ----
class MakesAFolder:
    "What makes a folder when it is unpickled."

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


PICKLES = {
    "zipped": lambda path, bomb: torch.save({"base_model.model.x": bomb, "y": torch.ones(1)}, path),
    "raw": lambda path, bomb: path.write_bytes(pickle.dumps(bomb)),
    "legacy": lambda path, bomb: torch.save({"x": bomb}, path, _use_new_zipfile_serialization=False),
}


@pytest.mark.parametrize("form", PICKLES)
def test_read_tensors_runs_no_pickle_that_runs_where_nobody_checks(form, tmp_path):
    for name in ("best_model.pth", "model.safetensors"):
        PICKLES[form](tmp_path / name, MakesAFolder(tmp_path / "ran"))
        with pytest.raises(ValueError, match=name):
            read_tensors(tmp_path / name)
    assert not (tmp_path / "ran").exists()
    if form == "raw":
        pickle.loads((tmp_path / "best_model.pth").read_bytes())
    else:
        torch.load(tmp_path / "best_model.pth", weights_only=False)
    assert (tmp_path / "ran").exists()


def test_a_pickled_adapter_or_base_runs_nothing(adapter, base, ran, tmp_path, refused):
    (adapter / "adapter_model.safetensors").unlink()
    (base / "model.safetensors").unlink()
    PICKLES["zipped"](adapter / "adapter_model.bin", MakesAFolder(ran))
    PICKLES["zipped"](base / "pytorch_model.bin", MakesAFolder(ran))
    asked = commands(adapter, base, tmp_path / "out")
    assert [c for c in asked if "not run: ask for safetensors" not in refused(*c)] == []
    (adapter / "adapter_model.bin").rename(adapter / "adapter_model.safetensors")
    (base / "pytorch_model.bin").rename(base / "model.safetensors")
    for command in asked:
        refused(*command)
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_of_a_run_runs_nothing(ran, tmp_path, refused):
    "A killed run whose checkpoint somebody has changed; the Trainer's own pickle of its arguments is not read at all."
    run, checkpoint = tmp_path / "run", tmp_path / "run/checkpoints/checkpoint-1"
    train(load_recipe("demo", SHORT), run)
    shutil.rmtree(run / "adapter")
    shutil.rmtree(run / "checkpoints/checkpoint-2")
    PICKLES["raw"](checkpoint / "training_args.bin", MakesAFolder(ran))
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        kept = (checkpoint / name).read_bytes()
        PICKLES["raw"](checkpoint / name, MakesAFolder(ran))
        line = refused("train", "demo", *SHORT, "--output", run, "--resume")
        assert "checkpoint-1" in line and "cannot be read" in line and not (run / "adapter").exists()
        (checkpoint / name).write_bytes(kept)
    train(load_recipe("demo", SHORT), run, resume=True)
    assert (run / "adapter/adapter_model.safetensors").exists()


# ---- code beside a model ----
OWN = {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}
KEYS = {
    "config.json": dict(auto_map=OWN, model_type="evil", architectures=["Evil"]),
    "tokenizer_config.json": dict(tokenizer_class="Evil", auto_map={"AutoTokenizer": ["evil.Evil", "evil.Evil"]}),
}


def changed(path, **keys):
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


@pytest.mark.parametrize("part", KEYS)
def test_code_beside_a_base_is_not_run_and_nobody_is_asked(part, base, adapter, tmp_path, refused):
    (base / "evil.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'ran')!r})\nclass Evil: pass\n")
    changed(base / part, **KEYS[part])
    changed(adapter / "adapter_config.json", base_model_name_or_path=str(base))
    for words in commands(adapter, base, tmp_path / "out"):
        assert "brings code of its own, which is not run" in refused(*words), words
    assert not (tmp_path / "out").exists() and not (tmp_path / "ran").exists()
    kind = transformers.AutoModelForCausalLM if part == "config.json" else transformers.AutoTokenizer
    with pytest.raises(Exception):
        kind.from_pretrained(base, trust_remote_code=True)
    assert (tmp_path / "ran").exists()  # where it is trusted


def test_code_beside_a_known_architecture_is_left_alone(base, ran):
    (base / "evil.py").write_text(f"import os\nos.mkdir({str(ran)!r})\n")
    changed(base / "config.json", auto_map=OWN)
    assert type(load_base(str(base))[0]).__name__ == "LlamaForCausalLM"


def test_no_adapter_imports_what_it_names(adapter, ran, tmp_path, monkeypatch, refused):
    "PEFT imports the module that `megatron_core` names."
    (tmp_path / "evil_core.py").write_text(f"import os\nos.mkdir({str(ran)!r})\n")
    monkeypatch.syspath_prepend(tmp_path)
    keys = {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"], "megatron_config": {"x": 1}}
    (adapter / "adapter_config.json").write_text(json.dumps(keys | {"megatron_core": "evil_core"}))
    assert "megatron_config cannot be set" in refused("evaluate", adapter, *GRADE)


def test_every_load_in_the_package_is_a_safe_one():
    text = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "d2mora").glob("*.py"))
    calls = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)]
    loads = [ast.unparse(node) for node in calls if getattr(node.func, "attr", "") == "from_pretrained"]
    assert len(loads) >= 2 and [c for c in loads if "UNTRUSTED" not in c and "PeftModel" not in c] == []
    unsafe = ["weights_only=False", "trust_remote_code=True", 'trust_remote_code": True', "pickle.load", "yaml.unsafe"]
    unsafe += ["yaml.Loader", "yaml.FullLoader", " eval(", " exec(", "os.system", "shell=True"]
    assert [part for part in unsafe if part in text] == []


# ---- words ----
def test_yaml_makes_no_objects(tmp_path, refused):
    bomb = f"!!python/object/apply:os.mkdir [{tmp_path / 'ran'}]"
    for text in (bomb, "!!python/name:os.system"):
        (tmp_path / "own.yaml").write_text("base: toy\ntraining: " + text)
        assert "not YAML" in refused("train", tmp_path / "own.yaml", "--output", tmp_path / "run")
        assert "not YAML" in refused("train", "demo", f"training.max_steps={text}", "--output", tmp_path / "run")
    assert not (tmp_path / "ran").exists()
    yaml.load(bomb, yaml.UnsafeLoader)
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("override, part", [
    ("adapter.tokenizer_kwargs={trust_remote_code: true}", "not run"),
    ("adapter.megatron_config={a: 1}", "import what it names"),
    ("training.hub_token=SECRET", "environment"),
    ("adapter.tokenizer_kwargs={token: SECRET}", "environment"),
])  # fmt: skip
def test_no_recipe_turns_code_on_or_holds_a_secret(override, part, tmp_path, refused):
    kind = "adapter.peft_type=" + ("PROMPT_TUNING" if "tokenizer" in override else "LORA")
    line = refused("train", "demo", kind, override, "--output", tmp_path / "run")
    assert "cannot be set" in line and part in line and "SECRET" not in line and not list(tmp_path.iterdir())


def test_the_shipped_recipes_and_harmless_words_pass():
    for path in (ROOT / "d2mora" / "recipes").glob("*.yaml"):
        check_words(read_yaml(path.read_text(), path))
    check_words({"num_virtual_tokens": 8, "trust_remote_code": False, "hub_token": None})


# ---- secrets and the network ----
def test_local_work_opens_no_connection_and_writes_no_secret_of_the_environment(tmp_path, monkeypatch, capfd):
    "All that a run, a grading and an export leave, and what they print."
    for name in ("HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "hf_SENTINELSECRETaaaaaaaaaaaaaaaaaaaa")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(socket.socket, "connect", lambda self, address: pytest.fail(f"connects to {address}"))
    monkeypatch.chdir(tmp_path)
    assert main(["train", "demo", *SHORT, "data.validation_rows=4", "--output", "run"]) == 0
    assert main(["evaluate", "run", "--limit", "4"]) == 0
    assert main(["export", "run", "lora", "--rows", "4", "--limit", "4"]) == 0
    files = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert len(files) > 20 and [p for p in files if b"SENTINELSECRET" in p.read_bytes()] == []
    assert "SENTINELSECRET" not in "".join(capfd.readouterr())
