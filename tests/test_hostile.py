"""Files from utils, attacked: what is sent to us is read, never run; nothing is written elsewhere; no secret is handed on.

Each attack that could run something would leave a sentinel, and each kind of bomb is first shown to go off where nobody checks.
"""

import ast
import gzip
import io
import json
import os
import pickle
import resource
import shutil
import socket
import struct
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
import yaml
from program import program
from safetensors import safe_open
from safetensors.torch import save_file

from d2mora import utils
from d2mora.cli import main
from d2mora.recipe import load_base, load_recipe
from d2mora.utils import check_words, read_tensors, read_yaml
from d2mora.tasks import TASKS
from d2mora.toy import toy_base, toy_rows
from d2mora.train import train

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "nbs" / "results" / "demo"
GRADE = ["--data", "toy", "--tasks", "boolq", "--limit", "4"]


class Bomb:
    "What makes a folder when it is unpickled."

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.fixture
def sentinel(tmp_path):
    "What must not be there in the end."
    path = tmp_path / "SENTINEL"
    yield path
    assert not path.exists(), "code of a stranger has run"


@pytest.fixture
def adapter(tmp_path):
    "A copy of a good adapter, for the embedded base."
    shutil.copytree(DEMO / "adapter", tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.fixture
def base(tmp_path):
    "A copy of the embedded base."
    shutil.copytree(toy_base(), tmp_path / "base")
    return tmp_path / "base"


def changed(path, **keys):
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


def refused(capsys, monkeypatch, *args):
    "Run the command, with a y for whoever asks: it must fail with one line and exit 2, and ask nobody. The line."
    monkeypatch.setattr("builtins.input", lambda *a: pytest.fail("it asked"))
    capsys.readouterr()
    status, (out, err) = main(list(map(str, args))), capsys.readouterr()
    lines = [line for line in err.splitlines() if line.startswith("d2mora: ")]
    assert (status, out, len(lines)) == (2, "", 1) and "Traceback" not in err, (status, out, err)
    return lines[0]


# ---- pickles ----
def zipped(path, bomb):
    torch.save({"base_model.model.x": bomb, "y": torch.ones(1)}, path)


def raw(path, bomb):
    path.write_bytes(pickle.dumps(bomb))


def legacy(path, bomb):
    torch.save({"x": bomb}, path, _use_new_zipfile_serialization=False)


PICKLES = {"zipped": zipped, "raw": raw, "legacy": legacy}


@pytest.mark.parametrize("form", PICKLES)
def test_the_bomb_goes_off_where_nobody_checks(form, tmp_path):
    PICKLES[form](tmp_path / "file", Bomb(tmp_path / "ran"))
    if form == "raw": pickle.loads((tmp_path / "file").read_bytes())
    else: torch.load(tmp_path / "file", weights_only=False)
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("form", PICKLES)
@pytest.mark.parametrize("command", ["evaluate", "export"])
def test_a_pickled_adapter_runs_nothing(form, command, adapter, sentinel, tmp_path, capsys, monkeypatch):
    (adapter / "adapter_model.safetensors").unlink()
    PICKLES[form](adapter / "adapter_model.bin", Bomb(sentinel))
    words = [command, adapter, *(GRADE if command == "evaluate" else [tmp_path / "out", "--data", "toy"])]
    assert "not run: ask for safetensors" in refused(capsys, monkeypatch, *words)
    (adapter / "adapter_model.bin").rename(adapter / "adapter_model.safetensors")
    assert "adapter_model.safetensors" in refused(capsys, monkeypatch, *words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("form", PICKLES)
def test_a_pickled_base_runs_nothing(form, base, sentinel, tmp_path, capsys, monkeypatch):
    (base / "model.safetensors").unlink()
    PICKLES[form](base / "pytorch_model.bin", Bomb(sentinel))
    assert "not run: ask for safetensors" in refused(capsys, monkeypatch, "evaluate", "--base", base, *GRADE)
    assert "not run" in refused(capsys, monkeypatch, "train", "demo", f"base={base}", "--output", tmp_path / "run")
    (base / "pytorch_model.bin").rename(base / "model.safetensors")
    assert "cannot be loaded" in refused(capsys, monkeypatch, "evaluate", "--base", base, *GRADE)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("form", PICKLES)
@pytest.mark.parametrize("name", ["best_model.pth", "adapter_model.bin", "model.safetensors"])
def test_a_published_checkpoint_runs_nothing(form, name, sentinel, tmp_path):
    PICKLES[form](tmp_path / name, Bomb(sentinel))
    with pytest.raises(ValueError, match=name):
        read_tensors(tmp_path / name)


@pytest.fixture(scope="module")
def unfinished(tmp_path_factory):
    "A run folder with one checkpoint, as a killed run leaves it."
    run = tmp_path_factory.mktemp("unfinished") / "run"
    keys = {"data.tasks": ["boolq"], "adapter.target_modules": ["q_proj"], "training.max_steps": 2, "training.per_device_train_batch_size": 2,
            "training.save_strategy": "steps", "training.save_steps": 1, "training.use_cpu": True, "training.disable_tqdm": True}
    train(load_recipe("demo", keys), run)
    shutil.rmtree(run / "adapter"), shutil.rmtree(run / "checkpoints" / "checkpoint-2")
    return run, keys


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "adapter_model.bin", "adapter_model.safetensors"])
def test_a_trainers_checkpoint_runs_nothing(name, unfinished, sentinel, tmp_path, capsys, monkeypatch):
    shutil.copytree(unfinished[0], tmp_path / "run")
    checkpoint = tmp_path / "run" / "checkpoints" / "checkpoint-1"
    if name == "adapter_model.bin": (checkpoint / "adapter_model.safetensors").unlink()
    raw(checkpoint / name, Bomb(sentinel))
    words = ["train", "demo", *(f"{key}={json.dumps(value)}" for key, value in unfinished[1].items()), "--output", tmp_path / "run", "--resume"]
    line = refused(capsys, monkeypatch, *words)
    assert "checkpoint-1" in line and "cannot be read" in line and not (tmp_path / "run" / "adapter").exists()


def test_the_trainers_own_pickle_of_its_arguments_is_not_read(unfinished, sentinel, tmp_path):
    shutil.copytree(unfinished[0], tmp_path / "run")
    raw(tmp_path / "run" / "checkpoints" / "checkpoint-1" / "training_args.bin", Bomb(sentinel))
    train(load_recipe("demo", unfinished[1]), tmp_path / "run", resume=True)
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").exists()


# ---- code that comes with a model ----
CODE = "import os\nos.mkdir({!r})\nclass Evil: pass\n"


def with_code(base, sentinel, part):
    (base / "evil.py").write_text(CODE.format(str(sentinel)))
    own = {"auto_map": {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}, "model_type": "evil", "architectures": ["Evil"]}
    if part == "model": changed(base / "config.json", **own)
    elif part == "beside a known type": changed(base / "config.json", auto_map=own["auto_map"])
    else: changed(base / "tokenizer_config.json", tokenizer_class="Evil", auto_map={"AutoTokenizer": ["evil.Evil", "evil.Evil"]})
    return base


@pytest.mark.parametrize("part", ["model", "tokenizer"])
def test_the_code_would_run_where_it_is_trusted(part, base, tmp_path):
    import transformers

    with_code(base, tmp_path / "ran", part)
    kind = transformers.AutoTokenizer if part == "tokenizer" else transformers.AutoModelForCausalLM
    with pytest.raises(Exception): kind.from_pretrained(base, trust_remote_code=True)
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("part", ["model", "tokenizer"])
def test_code_that_comes_with_a_base_is_not_run_and_nobody_is_asked(part, base, adapter, sentinel, tmp_path, capsys, monkeypatch):
    with_code(base, sentinel, part)
    changed(adapter / "adapter_config.json", base_model_name_or_path=str(base))
    for words in (["evaluate", "--base", base, *GRADE], ["evaluate", adapter, *GRADE], ["train", "demo", f"base={base}", "--output", tmp_path / "run"],
                  ["train", "demo", f"base={base}", "--dry-run"], ["export", adapter, tmp_path / "out", "--data", "toy"],
                  ["export", DEMO / "adapter", tmp_path / "out", "--data", "toy", "--base", base], ["evaluate", "--base", base, "--ask", "is it so?"]):
        assert "brings code of its own, which is not run" in refused(capsys, monkeypatch, *words), words
    assert not (tmp_path / "run").exists() and not (tmp_path / "out").exists()


def test_code_beside_a_known_architecture_is_left_alone(base, sentinel):
    model, _ = load_base(str(with_code(base, sentinel, "beside a known type")))
    assert type(model).__name__ == "LlamaForCausalLM"


def test_a_yes_that_was_piped_in_trusts_nobody(base, sentinel):
    with_code(base, sentinel, "model")
    done = program("evaluate", "--base", base, *GRADE, stdin="y\n" * 9)
    assert (done.returncode, done.stdout) == (2, "") and "not run" in done.stderr


@pytest.mark.parametrize("override", ["adapter.tokenizer_kwargs={trust_remote_code: true}", "adapter.megatron_config={a: 1}", "training.trust_remote_code=true"])
def test_no_recipe_turns_code_on(override, tmp_path, capsys, monkeypatch):
    kind = "adapter.peft_type=" + ("PROMPT_TUNING" if "tokenizer" in override else "LORA")
    assert "cannot be set" in refused(capsys, monkeypatch, "train", "demo", kind, override, "--output", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_no_adapter_imports_what_it_names(adapter, sentinel, tmp_path, capsys, monkeypatch):
    "PEFT imports the module that `megatron_core` names; older ones whatever it is."
    (tmp_path / "evil_core.py").write_text(CODE.format(str(sentinel)))
    monkeypatch.syspath_prepend(tmp_path)
    config = {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"], "megatron_config": {"x": 1}, "megatron_core": "evil_core", "base_model_name_or_path": "toy"}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    assert "megatron_config cannot be set" in refused(capsys, monkeypatch, "evaluate", adapter, *GRADE)


def test_nothing_of_ours_trusts_code():
    "Every `from_pretrained` of a library's class says so."
    calls = [(path.name, node) for path in sorted((ROOT / "d2mora").glob("*.py")) for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
             if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "from_pretrained"]
    bare = [(name, node.lineno) for name, node in calls if "UNTRUSTED" not in ast.unparse(node) and "PeftModel" not in ast.unparse(node.func)]
    assert len(calls) >= 5 and bare == []
    text = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "d2mora").glob("*.py"))
    assert "weights_only=False" not in text and 'trust_remote_code": True' not in text and "trust_remote_code=True" not in text
    for call in ("pickle.load", "yaml.unsafe", "yaml.load(", "yaml.Loader", " eval(", " exec(", "os.system", "shell=True"):
        assert not [line for line in text.splitlines() if call in line and "OneMeaning" not in line], call
    assert issubclass(utils.OneMeaning, yaml.SafeLoader)


# ---- paths ----
@pytest.mark.parametrize("name", ["../outside.safetensors", "{tmp}/outside.safetensors", "part/../../outside.safetensors"])
@pytest.mark.parametrize("index", ["model.safetensors.index.json", "pytorch_model.bin.index.json"])
def test_an_index_reads_nothing_outside(name, index, base, tmp_path, capsys, monkeypatch):
    shutil.move(base / "model.safetensors", tmp_path / "outside.safetensors")
    with safe_open(tmp_path / "outside.safetensors", "pt") as file: keys = list(file.keys())
    (base / index).write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(keys, name.format(tmp=tmp_path))}))
    assert "outside its folder" in refused(capsys, monkeypatch, "evaluate", "--base", base, *GRADE)


def test_an_index_of_its_own_shards_is_read(base):
    (base / "model.safetensors").rename(base / "model-1.safetensors")
    with safe_open(base / "model-1.safetensors", "pt") as file: keys = list(file.keys())
    (base / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(keys, "model-1.safetensors")}))
    assert load_base(str(base))[0].num_parameters() > 1000


LINKS = {  # name in the run folder -> what it leads to: a file or a folder outside
    "metrics.jsonl": "file", "recipe.yaml": "file", ".lock": "file", ".recipe.tmp.yaml": "file", "checkpoints": "folder", "adapter": "folder",
    "adapter.tmp": "folder", "plots": "folder", "report.md": "file", "evaluation-choice.part-0.jsonl": "file", "plots/evaluation-choice.png": "file",
}  # fmt: skip


@pytest.mark.parametrize("name", LINKS)
@pytest.mark.parametrize("command", ["train", "evaluate", "resume"])
def test_no_link_in_a_run_folder_is_written_through(name, command, tmp_path, capsys, monkeypatch):
    run, precious = tmp_path / "run", tmp_path / "precious"
    shutil.copytree(DEMO, run)
    if command != "evaluate": shutil.rmtree(run / "adapter"), (run / "metrics.jsonl").unlink()
    if command == "train": (run / "recipe.yaml").unlink()
    if command == "evaluate" and name in ("recipe.yaml", "adapter"): pytest.skip("without it there is nothing to grade")
    precious.mkdir(), (precious / "file").write_text("precious")
    (run / name).parent.mkdir(exist_ok=True), (run / name).unlink(missing_ok=True)
    (run / name).symlink_to(precious / "file" if LINKS[name] == "file" else precious)
    words = ["evaluate", run, *GRADE] if command == "evaluate" else ["train", "demo", "--output", run, *["--resume"] * (command == "resume")]
    line = refused(capsys, monkeypatch, *words)
    assert "leads out of it" in line or "already holds a run" in line or "not a recipe" in line, line
    assert [p.name for p in precious.iterdir()] == ["file"] and (precious / "file").read_text() == "precious"


@pytest.mark.parametrize("task", ["../../boolq", "/etc", "boolq/../../x", "..", ""])
def test_no_task_is_a_path(task, tmp_path, capsys, monkeypatch):
    assert "unknown task" in refused(capsys, monkeypatch, "train", "demo", f"data.tasks=[{task!r}]", "--output", tmp_path / "run")
    if task: assert "unknown task" in refused(capsys, monkeypatch, "evaluate", "--base", "toy", "--data", "toy", "--tasks", task)
    if task: assert "unknown task" in refused(capsys, monkeypatch, "export", DEMO / "adapter", tmp_path / "out", "--per-task", "--data", "toy", "--tasks", task)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("key", ["output_dir", "resume_from_checkpoint", "logging_dir"])
def test_a_recipe_names_no_place_to_write(key, tmp_path, capsys, monkeypatch):
    (tmp_path / "own.yaml").write_text(yaml.safe_dump({"base": "toy", "data": {"path": "toy"}, "training": {key: str(tmp_path / "elsewhere"), "max_steps": 1}}))
    line = refused(capsys, monkeypatch, "train", tmp_path / "own.yaml", "--output", tmp_path / "run")
    assert key in line and {p.name for p in tmp_path.iterdir()} == {"own.yaml"}


def archive(kind, path):
    "A file that is named .json.gz and is an archive with members that would land elsewhere."
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as made: made.writestr("../../evil", "x"), made.writestr("/evil", "x")
    if kind == "tar":
        with tarfile.open(path, "w:gz") as made:
            link, inside = tarfile.TarInfo("link"), tarfile.TarInfo("link/evil")
            link.type, link.linkname, inside.size = tarfile.SYMTYPE, str(path.parents[2] / "SENTINEL-folder"), 1
            made.addfile(link), made.addfile(inside, io.BytesIO(b"x"))
    if kind == "name":
        with path.open("wb") as out, gzip.GzipFile("../../../evil", "wb", fileobj=out) as made: made.write(b"not json")


@pytest.mark.parametrize("kind", ["zip", "tar", "name"])
def test_no_archive_unpacks_elsewhere(kind, tmp_path, capsys, monkeypatch):
    (tmp_path / "data" / "boolq").mkdir(parents=True), (tmp_path / "SENTINEL-folder").mkdir()
    archive(kind, tmp_path / "data" / "boolq" / "train.json.gz")
    assert "train.json.gz" in refused(capsys, monkeypatch, "train", "demo", f"data.path={tmp_path / 'data'}", "data.tasks=[boolq]", "--output", tmp_path / "run")
    assert not list(tmp_path.rglob("evil")) and not Path("/evil").exists() and not list((tmp_path / "SENTINEL-folder").iterdir())


# ---- words ----
@pytest.mark.parametrize("text", ["!!python/object/apply:os.mkdir [{sentinel}]", "!!python/object/new:os.mkdir [{sentinel}]", "!!python/name:os.system", "!!python/module:os"])
def test_yaml_names_no_objects(text, sentinel, tmp_path, capsys, monkeypatch):
    (tmp_path / "own.yaml").write_text("base: toy\ntraining: " + text.format(sentinel=sentinel))
    assert "not YAML" in refused(capsys, monkeypatch, "train", tmp_path / "own.yaml", "--output", tmp_path / "run")
    assert "not YAML" in refused(capsys, monkeypatch, "train", "demo", "training.max_steps=" + text.format(sentinel=sentinel), "--output", tmp_path / "run")


def test_the_yaml_bomb_goes_off_where_nobody_checks(sentinel):
    yaml.load(f"!!python/object/apply:os.mkdir [{sentinel}]", yaml.UnsafeLoader)
    assert sentinel.exists() and sentinel.rmdir() is None


def peak(code):
    "What a process of its own prints that runs this, `mib()` being how much it came to hold since its imports; a bomb is to hurt itself only."
    limit = "resource.setrlimit(resource.RLIMIT_DATA, (6 * 2**30, 6 * 2**30))"
    script = f"import resource, pathlib, yaml\nfrom d2mora.strangers import read_yaml, read_adapter\n{limit}\nheld = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024\nbefore = held()\nmib = lambda: held() - before\n{code}"
    done = program(script, {}, call=exec)
    assert done.returncode == 0, done.stderr[-500:]
    return done.stdout.split("\n")


ALIASES = "a0: &a0 [lol]\n" + "\n".join(f"a{n + 1}: &a{n + 1} [{', '.join([f'*a{n}'] * 9)}]" for n in range(9))
BOMBS = [ALIASES, "base: toy\ntraining:\n  " + ALIASES.replace("\n", "\n  "), "[" * 100_000, "{a: " * 30_000, "a: [" + "1," * 70_000, "a: &a [*a]"]
TAKEN = """
for text in {texts!r}:
    try: read_yaml(text, "x")
    except ValueError as error: print(error)
    else: print("taken")
print(mib())
print(len(repr(yaml.safe_load({control!r}))), mib())
"""


def test_yaml_bombs_do_not_eat_memory():
    control = ALIASES.split("a7:")[0]  # a nine-hundredth of it, where nobody checks
    *said, held, unchecked, _ = peak(TAKEN.format(texts=BOMBS, control=control))
    assert len(said) == len(BOMBS) and all("not YAML" in line for line in said), said
    assert float(held) < 50 < 4e6 < int(unchecked.split()[0])


def test_deep_json_is_one_line(adapter, base, capsys, monkeypatch):
    (adapter / "adapter_config.json").write_text("[" * 200_000)
    assert "adapter_config.json" in refused(capsys, monkeypatch, "evaluate", adapter, *GRADE)
    (base / "config.json").write_text("[" * 200_000)
    assert "cannot be loaded" in refused(capsys, monkeypatch, "evaluate", "--base", base, *GRADE)


# ---- sizes ----
def header(size, text=b""): return struct.pack("<Q", size) + text


HEADERS = {
    "header of 2**63 bytes": header(2**63), "header beyond the file": header(10**6, b"{}"), "tensor beyond the file": None, "negative offsets": None,
    "shape of 2**62": None, "no JSON": header(8, b"notjson!"), "empty": b"",
}  # fmt: skip
TENSORS = {
    "tensor beyond the file": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}, "negative offsets": {"dtype": "F32", "shape": [1], "data_offsets": [8, 4]},
    "shape of 2**62": {"dtype": "F32", "shape": [2**62, 2**62], "data_offsets": [0, 4]},
}  # fmt: skip


@pytest.mark.parametrize("name", HEADERS)
def test_absurd_safetensors_are_refused(name, adapter, base, capsys, monkeypatch):
    text = json.dumps({"base_model.model.x.d2mora_A.weight": TENSORS.get(name)}).encode()
    content = HEADERS[name] if HEADERS[name] is not None else header(len(text), text) + b"\0" * 8
    (adapter / "adapter_model.safetensors").write_bytes(content), (base / "model.safetensors").write_bytes(content)
    assert "adapter_model.safetensors" in refused(capsys, monkeypatch, "evaluate", adapter, *GRADE)
    assert "cannot be loaded" in refused(capsys, monkeypatch, "evaluate", "--base", base, *GRADE)


@pytest.mark.parametrize("keys", [{"r": 60_000}, {"num_down_experts": 60_000}, {"num_up_experts": 60_000}, {"r": 2**70}])
def test_an_adapter_that_asks_for_all_memory_is_not_built(keys, adapter, capsys, monkeypatch):
    changed(adapter / "adapter_config.json", **keys)
    monkeypatch.setattr("peft.PeftModel.from_pretrained", lambda *a, **k: pytest.fail("PEFT was asked to build it"))
    assert next(iter(keys)) in refused(capsys, monkeypatch, "evaluate", adapter, *GRADE)


# ---- secrets ----
SECRETS = {"HF_TOKEN": "hf_SENTINELSECRETaaaaaaaaaaaaaaaaaaaa", "WANDB_API_KEY": "wandbSENTINELSECRET", "OPENAI_API_KEY": "sk-SENTINELSECRET", "AWS_SECRET_ACCESS_KEY": "awsSENTINELSECRET"}


def test_no_secret_is_written_anywhere(tmp_path, monkeypatch, capfd):
    "All that a run, a grading and an export leave, and what they print."
    words = ["training.max_steps=2", "training.save_strategy=steps", "training.save_steps=1", "data.tasks=[boolq]", "data.validation_rows=4", "training.use_cpu=true"]
    for name, value in SECRETS.items(): monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    for args in (["train", "demo", *words, "--output", "run"], ["evaluate", "run", "--limit", "4"], ["export", "run", "lora", "--rows", "4", "--limit", "4"], ["train", "demo", "adapter.r=0", "--output", "x"]):
        assert main(args) == (2 if "adapter.r=0" in args else 0), capfd.readouterr().err[-2000:]
    files, said = [p for p in tmp_path.rglob("*") if p.is_file()], "".join(capfd.readouterr())
    assert len(files) > 20 and any(p.suffix == ".bin" for p in files)
    assert "SENTINELSECRET" not in said and [p for p in files if b"SENTINELSECRET" in p.read_bytes()] == []
    (tmp_path / "planted").write_text(os.environ["HF_TOKEN"])
    assert [p.name for p in tmp_path.rglob("*") if p.is_file() and b"SENTINELSECRET" in p.read_bytes()] == ["planted"]  # it would be found


@pytest.mark.parametrize("override", ["training.hub_token=SENTINELSECRET", "training.hub_token=[SENTINELSECRET]", "adapter.tokenizer_kwargs={token: SENTINELSECRET}", "training.token=SENTINELSECRET"])
def test_a_secret_in_a_recipe_is_refused_and_not_repeated(override, tmp_path, capsys, monkeypatch):
    kind = "adapter.peft_type=PROMPT_TUNING" if override.startswith("adapter") else "adapter.r=8"
    line = refused(capsys, monkeypatch, "train", "demo", kind, override, "--output", tmp_path / "run")
    assert "environment" in line and "SENTINELSECRET" not in line and not list(tmp_path.iterdir())


def test_check_words_lets_the_shipped_recipes_pass():
    for path in (ROOT / "d2mora" / "recipes").glob("*.yaml"): check_words(read_yaml(path.read_text(), path))
    for tokens in ({"include_num_input_tokens_seen": "all"}, {"num_virtual_tokens": 8}, {"trust_remote_code": False}, {"hub_token": None}): check_words(tokens)


# ---- the network ----
def test_nothing_of_ours_downloads():
    "No module of ours speaks to the network; the hub's own client does, where a base is named that is no folder."
    network = {"socket", "urllib", "http", "requests", "httpx", "aiohttp", "ftplib", "wget"}
    for path in (ROOT / "d2mora").glob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = {alias.name.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        names |= {(node.module or "").split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level == 0}
        assert not names & network, path.name


def test_a_run_on_local_files_opens_no_connection(tmp_path, monkeypatch):
    def refuse(self, address): raise AssertionError(f"connects to {address}")

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    train(load_recipe("demo", {"training.max_steps": 1, "data.tasks": ["boolq"], "training.disable_tqdm": True, "training.use_cpu": True}), tmp_path / "run")
    assert main(["evaluate", str(tmp_path / "run"), *GRADE]) == 0


def test_what_the_hub_sends_is_checked_by_size_and_checksum(tmp_path):
    "A hub on loopback sends other bytes, more, fewer, and a body that goes on; of a small file too. Only the good one is loaded and kept."
    script = [sys.executable, str(Path(__file__).with_name("evil_hub.py")), str(tmp_path)]
    done = subprocess.run(script, capture_output=True, text=True, timeout=600, env={k: v for k, v in os.environ.items() if not k.startswith("HF_")})
    found = {line["how"]: line for line in map(json.loads, done.stdout.splitlines())}
    assert found.keys() == {"good", "bytes", "more", "less", "endless", "small"}, done.stderr[-2000:]
    assert found["good"]["said"].startswith("loaded") and found["good"]["kept"] > 2e6
    assert all("checksum" in found[how]["said"] for how in ("bytes", "small"))
    assert all("size" in found[how]["said"] for how in ("more", "less", "endless"))
    assert all(line["kept"] < (1e6 if how != "small" else 4e6) for how, line in found.items() if how != "good"), found


def test_the_embedded_base_is_checked_byte_by_byte(tmp_path):
    shutil.copytree(Path(toy_base()).parent / "toy-base", tmp_path / "toy-base"), shutil.copy(Path(toy_base()).parent / "toy.sha256", tmp_path)
    weights = tmp_path / "toy-base" / "model.safetensors"
    assert toy_base(tmp_path)
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(ValueError, match="damaged"): toy_base(tmp_path)


# ---- pages ----
def test_a_text_with_markup_stays_text():
    "The page of tokens, which is opened in a browser, holds no tag of a stranger's row."
    from d2mora.analysis import router_page

    evil = ["</script><script>alert(1)</script>", "<img src=x onerror=alert(1)>", "<!--<script>"]
    page = router_page({"tokens": evil, "layers": {"l": {"down": [[60, 40]] * 3, "up": [[50, 50]] * 3}}})
    script = page.split("const map = ")[1].split(";\n")[0]
    assert "</script" not in script and "<!--" not in script and "innerHTML" not in page


def test_rows_with_markup_train_and_grade(tmp_path, capsys):
    rows = [row | {"instruction": row["instruction"].replace("question:", "question: </script><script>alert(1)</script> | `x` ")} for row in toy_rows("toy", "boolq", "train")[:8]]
    (tmp_path / "data" / "boolq").mkdir(parents=True)
    for split in ("train", "test"): (tmp_path / "data" / "boolq" / f"{split}.json").write_text(json.dumps(rows))
    words = [f"data.path={tmp_path / 'data'}", "data.tasks=[boolq]", "training.max_steps=1", "training.use_cpu=true"]
    assert main(["train", "demo", *words, "--output", str(tmp_path / "run")]) == 0
    page = next((tmp_path / "run" / "plots").glob("*.html")).read_text()
    assert page.count("<script") == page.count("</script") == 1  # the page's own


def test_the_tasks_are_as_many_as_their_names(): assert len(TASKS) == 8 and all(name == Path(name).name for name in TASKS)
