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
from program import program

from d2mora.cli import main
from d2mora.recipe import load_base, load_recipe
from d2mora.toy import toy_base, toy_rows
from d2mora.train import train
from d2mora.utils import check_words, read_tensors, read_yaml

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "nbs" / "results" / "demo"
GRADE = ["--data", "toy", "--tasks", "boolq", "--limit", "4"]
SHORT = [
    "data.tasks=[boolq]",
    "training.max_steps=2",
    "training.save_strategy=steps",
    "training.save_steps=1",
    "training.disable_tqdm=true",
]


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


def changed(path, **keys):
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


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
def test_the_pickle_runs_where_nobody_checks(form, tmp_path):
    PICKLES[form](tmp_path / "file", MakesAFolder(tmp_path / "ran"))
    if form == "raw":
        pickle.loads((tmp_path / "file").read_bytes())
    else:
        torch.load(tmp_path / "file", weights_only=False)
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("form", PICKLES)
@pytest.mark.parametrize("name", ["best_model.pth", "adapter_model.bin", "model.safetensors"])
def test_read_tensors_runs_nothing(form, name, ran, tmp_path):
    PICKLES[form](tmp_path / name, MakesAFolder(ran))
    with pytest.raises(ValueError, match=name):
        read_tensors(tmp_path / name)


def test_a_list_of_tensors_is_no_checkpoint(tmp_path):
    torch.save([torch.ones(2)], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="more than tensors by name"):
        read_tensors(tmp_path / "list.pth")


@pytest.mark.parametrize("form", ["zipped"])  # the other forms: above
def test_a_pickled_adapter_or_base_runs_nothing(form, adapter, base, ran, tmp_path, refused):
    (adapter / "adapter_model.safetensors").unlink()
    (base / "model.safetensors").unlink()
    PICKLES[form](adapter / "adapter_model.bin", MakesAFolder(ran))
    PICKLES[form](base / "pytorch_model.bin", MakesAFolder(ran))
    commands = [
        ["evaluate", adapter, *GRADE],
        ["export", adapter, tmp_path / "out", "--data", "toy"],
        ["evaluate", "--base", base, *GRADE],
        ["train", "demo", f"base={base}", "--output", tmp_path / "out"],
    ]
    assert [c for c in commands if "not run: ask for safetensors" not in refused(*c)] == []
    (adapter / "adapter_model.bin").rename(adapter / "adapter_model.safetensors")
    (base / "pytorch_model.bin").rename(base / "model.safetensors")
    for command in commands:
        refused(*command)
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def unfinished(tmp_path_factory):
    "A run folder with one checkpoint, as a killed run leaves it."
    run = tmp_path_factory.mktemp("unfinished") / "run"
    train(load_recipe("demo", SHORT), run)
    shutil.rmtree(run / "adapter")
    shutil.rmtree(run / "checkpoints" / "checkpoint-2")
    return run


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_checkpoint_of_a_run_runs_nothing(name, unfinished, ran, tmp_path, refused):
    run = Path(shutil.copytree(unfinished, tmp_path / "run"))
    PICKLES["raw"](run / "checkpoints" / "checkpoint-1" / name, MakesAFolder(ran))
    line = refused("train", "demo", *SHORT, "--output", run, "--resume")
    assert "checkpoint-1" in line and "cannot be read" in line and not (run / "adapter").exists()


def test_the_trainers_own_pickle_of_its_arguments_is_not_read(unfinished, ran, tmp_path):
    run = Path(shutil.copytree(unfinished, tmp_path / "run"))
    PICKLES["raw"](run / "checkpoints" / "checkpoint-1" / "training_args.bin", MakesAFolder(ran))
    train(load_recipe("demo", SHORT), run, resume=True)
    assert (run / "adapter" / "adapter_model.safetensors").exists()


# ---- code beside a model ----
OWN = {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}
KEYS = {
    "config.json": dict(auto_map=OWN, model_type="evil", architectures=["Evil"]),
    "tokenizer_config.json": dict(tokenizer_class="Evil", auto_map={"AutoTokenizer": ["evil.Evil", "evil.Evil"]}),
}


def with_code(base, ran, part):
    (base / "evil.py").write_text(f"import os\nos.mkdir({str(ran)!r})\nclass Evil: pass\n")
    changed(base / part, **KEYS[part])


@pytest.mark.parametrize("part", KEYS)
def test_the_code_runs_where_it_is_trusted(part, base, tmp_path):
    with_code(base, tmp_path / "ran", part)
    kind = transformers.AutoModelForCausalLM if part == "config.json" else transformers.AutoTokenizer
    with pytest.raises(Exception):
        kind.from_pretrained(base, trust_remote_code=True)
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("part", KEYS)
def test_code_beside_a_base_is_not_run_and_nobody_is_asked(part, base, adapter, ran, tmp_path, refused):
    with_code(base, ran, part)
    changed(adapter / "adapter_config.json", base_model_name_or_path=str(base))
    out = tmp_path / "out"
    for words in (
        ["evaluate", "--base", base, *GRADE],
        ["evaluate", adapter, *GRADE],
        ["train", "demo", f"base={base}", "--output", out],
        ["export", adapter, out, "--data", "toy"],
    ):
        assert "brings code of its own, which is not run" in refused(*words), words
    assert not out.exists()


def test_a_yes_that_was_piped_in_trusts_nobody(base, ran):
    with_code(base, ran, "config.json")
    done = program("evaluate", "--base", base, *GRADE, stdin="y\n" * 9)
    assert (done.returncode, done.stdout) == (2, "") and "not run" in done.stderr


def test_code_beside_a_known_architecture_is_left_alone(base, ran):
    with_code(base, ran, "config.json")
    changed(base / "config.json", model_type="llama", architectures=["LlamaForCausalLM"])
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
@pytest.mark.parametrize(
    "text", ["!!python/object/apply:os.mkdir [{ran}]", "!!python/name:os.system", "!!python/module:os"]
)
def test_yaml_makes_no_objects(text, ran, tmp_path, refused):
    text = text.format(ran=ran)
    (tmp_path / "own.yaml").write_text("base: toy\ntraining: " + text)
    assert "not YAML" in refused("train", tmp_path / "own.yaml", "--output", tmp_path / "run")
    assert "not YAML" in refused("train", "demo", f"training.max_steps={text}", "--output", tmp_path / "run")


def test_the_yaml_runs_where_nobody_checks(tmp_path):
    yaml.load(f"!!python/object/apply:os.mkdir [{tmp_path / 'ran'}]", yaml.UnsafeLoader)
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("override, part", [
    ("adapter.tokenizer_kwargs={trust_remote_code: true}", "not run"),
    ("adapter.megatron_config={a: 1}", "import what it names"),
    ("training.trust_remote_code=true", "not run"),
    ("training.hub_token=SECRET", "environment"),
    ("training.token=[SECRET]", "environment"),
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


def test_no_secret_of_the_environment_is_written_anywhere(tmp_path, monkeypatch, capfd):
    "All that a run, a grading and an export leave, and what they print."
    for name in ("HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "hf_SENTINELSECRETaaaaaaaaaaaaaaaaaaaa")
    monkeypatch.chdir(tmp_path)
    assert main(["train", "demo", *SHORT, "data.validation_rows=4", "--output", "run"]) == 0
    assert main(["evaluate", "run", "--limit", "4"]) == 0
    assert main(["export", "run", "lora", "--rows", "4", "--limit", "4"]) == 0
    files = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert len(files) > 20 and [p for p in files if b"SENTINELSECRET" in p.read_bytes()] == []
    assert "SENTINELSECRET" not in "".join(capfd.readouterr())


# ---- the network, and pages ----
def test_work_on_local_files_opens_no_connection(tmp_path, monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(socket.socket, "connect", lambda self, address: pytest.fail(f"connects to {address}"))
    train(load_recipe("demo", SHORT), tmp_path / "run")
    assert main(["evaluate", str(tmp_path / "run"), *GRADE]) == 0


def test_rows_with_markup_stay_text(tmp_path):
    "No page that a run leaves, and a browser opens, holds a tag of its rows."
    (tmp_path / "data" / "boolq").mkdir(parents=True)
    rows = [
        row | {"instruction": "</script><script>alert(1)</script> " + row["instruction"]}
        for row in toy_rows("toy", "boolq", "train")[:8]
    ]
    for split in ("train", "test"):
        (tmp_path / "data" / "boolq" / f"{split}.json").write_text(json.dumps(rows))
    assert main(["train", "demo", *SHORT, f"data.path={tmp_path / 'data'}", "--output", str(tmp_path / "run")]) == 0
    for page in (tmp_path / "run").rglob("*.html"):
        assert "<script>alert" not in page.read_text(encoding="utf-8")
