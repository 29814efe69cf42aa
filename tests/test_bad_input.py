"""Bad input: what is typed or found in a file, and what the one-line answer must name. Exit status 2, and nothing is written."""

import codecs
import gzip
import json
import re
import shlex
import shutil
from hashlib import sha256
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from d2mora.cli import main
from d2mora.data import read_task
from d2mora.recipe import load_recipe
from d2mora.toy import toy_base, toy_rows

DEMO = Path(__file__).parents[1] / "nbs" / "results" / "demo"
ROWS = toy_rows("toy", "boolq", "train")[:4]
RECIPE = {
    "base": "toy",
    "adapter": {"r": 2, "num_down_experts": 2, "num_up_experts": 2, "target_modules": ["q_proj"]},
    "data": {"path": "toy", "tasks": ["boolq"], "cutoff": 128},
    "training": {"max_steps": 2, "seed": 0, "use_cpu": True},
}
TEXT = yaml.safe_dump(RECIPE, sort_keys=False)

OVERRIDES = """
adapter.r=0                                      | r=0 | at least 1
adapter.r=eight                                  | adapter.r='eight' is not a whole number
adapter.r=2.5                                    | adapter.r=2.5
adapter.r=true                                   | adapter.r=True
adapter.r=                                       | adapter.r=None
adapter.r=1000000000                             | r=1000000000 | below 65536
adapter.lora_alpha=0                             | lora_alpha=0 | above 0
adapter.lora_alpha=.nan                          | adapter.lora_alpha=nan is not a number
adapter.lora_dropout=1                           | lora_dropout=1 | below 1
adapter.num_down_experts=0                       | num_down_experts=0
adapter.num_up_experts=0                         | num_up_experts=0
adapter.pairing=many-to-some                     | 'many-to-some' | 'many-to-many'
adapter.pairing=one-to-one                       | num_down_experts = num_up_experts
adapter.pairing=one-to-many                      | num_down_experts=1
adapter.orthogonality_weight=-1e-4               | orthogonality_weight | at least 0
adapter.expert_dropout=both                      | expert_dropout | shared, independent
adapter.num_experts=3                            | 'adapter.num_up_experts'
adapter.use_dora=true                            | adapter.use_dora | no field of the 'adapter' section
adapter.peft_type=D2MORE                         | 'D2MORE' | 'D2MORA'
adapter.task_type=CAUSAL                         | 'CAUSAL' | 'CAUSAL_LM'
adapter.target_modules=[]                        | target_modules=[] | list of names
adapter.target_modules=[q_porj]                  | q_porj is near q_proj
adapter.target_modules=[embed_tokens]            | embed_tokens | linear layers only
adapter.target_modules=(q_proj                   | '(q_proj' is no regular expression
adapter.exclude_modules=.*proj                   | exclude_modules='.*proj' may leave none
adapter.layers_to_transform=[-1]                 | layers_to_transform=-1
adapter.modules_to_save=[lm_haed]                | 'lm_haed' | 'lm_head'
data.tasks=[bolq]                                | 'bolq' | 'boolq'
data.tasks=[boolq,boolq]                         | names boolq twice
data.tasks=[]                                    | data.tasks is empty
data.tasks=boolq                                 | data.tasks='boolq' is not a list
data.tasks=[../../boolq]                         | unknown task '../../boolq'
data.path=toy-hrad                               | toy-hrad | toy-hard
data.path=/no/such/folder                        | /no/such/folder | no such file or folder
data.prompt=oficial                              | 'oficial' | 'official'
data.truncation=cut                              | 'cut' | published
data.cutof=3                                     | data.cutof | 'data.cutoff'
data.learning_rate=1                             | 'training.learning_rate'
data.cutoff=0                                    | data.cutoff=0
data.cutoff=4096                                 | 256 tokens that base 'toy' can read
data.cutoff=8 data.truncation=skip               | skips every row | data.truncation=prompt
data.validation_rows=99999999                    | data.validation_rows=99999999
data.validation_rows=-1                          | data.validation_rows=-1
training.max_steps=0                             | training.max_steps=0
training.num_train_epochs=0                      | training.num_train_epochs=0
training.learning_rat=1                          | 'training.learning_rate'
training.learning_rate=fast                      | 'fast' is not a number
training.learning_rate=.inf                      | inf is not a number
training.learning_rate=-0.001                    | learning_rate=-0.001 | at least 0
training.seed=-1                                 | training.seed=-1 | below 2**32
training.adam_beta1=2                            | training.adam_beta1=2
training.gradient_accumulation_steps=0           | gradient_accumulation_steps=0 | at least 1
training.lr_scheduler_type=linea                 | 'linea' | 'linear'
training.save_strategy=sometimes                 | 'sometimes' | 'steps'
training.optim=adamm                             | training.optim='adamm'
training.output_dir=x                            | training.output_dir | --output
training.resume_from_checkpoint=x                | training.resume_from_checkpoint | --resume
training.push_to_hub=true                        | push the finished adapter
training.eval_strategy=steps                     | data.validation_rows
training.fp16=true                               | set training.fp16=false
training.report_to=wandbb                        | wandbb
trainig.seed=1                                   | 'training.seed'
seed=1                                           | training.seed
seed                                             | section.key=value
data=toy                                         | 'data.path'
base=./no/such/base                              | ./no/such/base | no such folder
base=                                            | base=NAME
data.tasks=[boolq                                | not YAML
training.max_steps=!!python/name:os.system       | not YAML
training.lr_scheduler_kwargs.num_cycles=3        | training.lr_scheduler_kwargs
"""
COMMANDS = """
trian                                            | 'trian' | train
train                                            | 'RECIPE'
train demo                                       | --output is missing
train demo --outptu out                          | --outptu | --output
train demo --output                              | '--output'
train demo --output ''                           | --output | name a folder
train demo --output out --resume=3               | '--resume'
train comonsense-mini --output out               | 'comonsense-mini' | 'commonsense-mini'
train commonsense-mini base=toy --output out     | D2MORA_DATA
train demo --output file                         | 'file' is a file
train demo --output file/run                     | file/run | cannot be written
train demo --output /proc/run                    | /proc/run | cannot be written
train demo --output LONG                         | take a shorter name
train demo --output full                         | 'full' already holds a run | --resume
train demo --output out --resume                 | holds no run to resume
train demo --output out --gpu H100               | --dry-run
train demo --output out --dry-run                | --dry-run writes nothing
train demo --dry-run --gpu H10                   | 'H10' | 'H100'
train demo --dry-run --gpu '{"name": "mine"}'    | "tflops": 100
train demo --dry-run --gpu gpu.json              | 'gpu.json' | RTX-4090
train demo --dry-run --tokenizer ./words         | './words' | --tokenizer FOLDER
evaluate                                         | nothing to grade | --base
evaluate no-run                                  | 'no-run' | no such folder
evaluate empty                                   | 'empty' holds no adapter
evaluate --protocl choice                        | --protocol
evaluate --base ./nowhere --data toy             | ./nowhere | no such folder
evaluate --base toy                              | D2MORA_DATA
evaluate --base toy --data rows                  | rows | toy-hard
evaluate --base toy --data toy --protocol choise | 'choise' | choice
evaluate --base toy --data toy --limit 0         | limit=0
evaluate --base toy --data toy --limit many      | --limit | 'many'
evaluate --base toy --data toy --batch-size 0    | batch_size=0
evaluate --base toy --data toy --tasks bolq      | 'bolq' | 'boolq'
evaluate --base toy --data toy --tasks ,         | --tasks | names nothing
evaluate --base toy --data toy --prompt oficial  | 'oficial' | 'official'
evaluate --base toy --data toy --protocol official --prompt plain | leave --prompt plain out
evaluate --base toy --data toy --limit 1 --tasks boolq --output file | file | cannot be written
evaluate one two --output out                    | --output is for one DIR
evaluate --base toy --ask ''                     | --ask has no question
demo --outptu x                                  | --output
demo data.cutof=3 --output out                   | 'data.cutoff'
demo --output full                               | 'full' already holds a run
demo --resume                                    | no demo in runs
compare demo                                     | '--output'
compare demo --output out --methods lorra        | 'lorra' | 'lora'
compare demo --output out --methods lora,lora    | lora, lora
compare demo --output out --methods ,            | --methods | names nothing
compare demo --output out --seeds one            | 'one' is not a list of whole numbers
compare demo --output out --seeds -1             | seed=-1
compare demo --output out --seeds 0,0            | 0, 0
compare demo --output out --seeds 0,1000         | seed 1000
compare demo --output out --learning-rates fast  | 'fast' is not a list of numbers
compare demo --output out --learning-rates -1e-3 | learning rate=-0.001
compare demo --output out --budget same          | 'same' | equal
compare demo --output out --protocols choise     | 'choise' | choice
compare demo --output out --limit 0              | limit=0
compare lora-r64 base=toy data.path=toy --output out | adapter.peft_type=LORA
export run                                       | 'DIR'
export no-run out                                | 'no-run' holds no adapter
export run full                                  | 'full' exists
export run out --rank 0                          | rank=0
export run out --rank 99                         | give 1 to 9
export run out --form avrage                     | 'avrage' | mean, fitted
export run out --form distilled                  | --distill 100
export run out --distill -5                      | distill=-5
export run out --distill 5 --learning-rate nan   | learning_rate=nan
export run out --rows 0                          | rows=0
export run out --tasks bolq                      | 'bolq' | 'boolq'
export run out --data rows                       | rows | toy-hard
"""


def table(text):
    "(what is typed, what the answer must name), one a line."
    return [
        (line.split(" | ")[0].strip(), [part.strip() for part in line.split(" | ")[1:]])
        for line in text.strip().splitlines()
    ]


@pytest.fixture
def here(tmp_path, monkeypatch):
    "An empty folder to work in, without a path to real data."
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("D2MORA_DATA", raising=False)
    return tmp_path


def contents(folder):
    return {
        str(p.relative_to(folder)): sha256(p.read_bytes()).hexdigest() if p.is_file() else "" for p in folder.rglob("*")
    }


def check(line, parts, folder, capsys):
    "The command fails with one line that names the parts, and leaves the folder as it was."
    before = contents(folder)
    capsys.readouterr()
    status, (out, err) = main(shlex.split(line)), capsys.readouterr()
    assert (status, out, err.count("\n")) == (2, "", 1), (status, out[-500:], err[-2000:])
    assert [part for part in parts if part not in err] == [], err
    assert err.startswith("d2mora: ") and len(err) < 700 and "Traceback" not in err and " at 0x" not in err
    assert contents(folder) == before, "something was written"


@pytest.mark.parametrize("typed, parts", table(OVERRIDES))
def test_overrides(typed, parts, here, capsys):
    check(f"train demo {shlex.join(typed.split())} --output out", parts, here, capsys)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("typed, parts", table(COMMANDS))
def test_commands(typed, parts, here, capsys):
    (here / "file").write_text("precious")
    (here / "empty").mkdir()
    (here / "full" / "adapter").mkdir(parents=True)
    if typed.startswith("export run "):
        shutil.copytree(DEMO, here / "run")
    check(typed.replace("LONG", "x" * 300), parts, here, capsys)


@pytest.mark.parametrize("worse", ["traceback", "two lines", "a file"])
def test_a_worse_answer_is_noticed(worse, here, capsys, monkeypatch):
    def answer(*_):
        if worse == "traceback":
            raise KeyError("cutof")
        if worse == "two lines":
            print("looking")
        if worse == "a file":
            Path("out").mkdir()
        raise ValueError("unknown key data.cutof (did you mean 'data.cutoff'?)")

    monkeypatch.setattr("d2mora.recipe.load_recipe", answer)
    with pytest.raises(AssertionError):
        check("train demo data.cutof=3 --output out", ["data.cutof"], here, capsys)


# ---- recipes ----
RECIPES = {
    "nothing": ("", "not a recipe"),
    "a list": ("- base: toy", "not a recipe"),
    "a part is a text": ("base: toy\ndata: rows", "'data' must hold keys and values"),
    "unknown part": (TEXT + "trainer: {seed: 1}", "'training'"),
    "a key that is a number": (TEXT + "7: 3", "'7'"),
    "no base": (TEXT.replace("base: toy\n", ""), "base=NAME"),
    "base is a list": (TEXT.replace("base: toy", "base: [toy]"), "base=['toy'] is not a text"),
    "a key twice": (TEXT.replace("  r: 2\n", "  r: 2\n  r: 4\n"), "the key 'r' stands there twice"),
    "a part twice": (TEXT + "data: {path: toy-hard}", "the key 'data' stands there twice"),
    "tabs": (TEXT.replace("  ", "\t"), "not YAML"),
    "two documents": (TEXT + "---\n" + TEXT, "not YAML"),
    "open bracket": (TEXT + "x: [1, 2", "not YAML"),
    "nested": ("base: " + "[" * 5000 + "]" * 5000, "not YAML"),
    "UTF-16": (TEXT.encode("utf-16"), "save it as UTF-8"),
    "Python object": ("base: !!python/object/apply:os.system ['touch out']", "not YAML"),
}


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_files(name, here, capsys):
    content, part = RECIPES[name]
    (here / "own.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    check("train own.yaml --output out", [part], here, capsys)


@pytest.mark.parametrize("name, content, plain", [
    ("byte-order mark", codecs.BOM_UTF8 + TEXT.encode(), TEXT),
    ("lines ended as on Windows", TEXT.replace("\n", "\r\n").encode(), TEXT),
    ("JSON", json.dumps(RECIPE).encode(), TEXT),
    ("1e-3, a text to YAML", TEXT.encode() + b"  learning_rate: 1e-3\n", TEXT + "  learning_rate: 0.001\n"),
    ("a bare no, false to YAML", TEXT.encode() + b"  save_strategy: no\n", TEXT + "  save_strategy: 'no'\n"),
])  # fmt: skip
def test_odd_recipes_that_are_right(name, content, plain, here):
    (here / "own.yaml").write_bytes(content)
    (here / "plain.yaml").write_text(plain)
    assert load_recipe("own.yaml") == load_recipe("plain.yaml")


# ---- data ----
def rows(i=0, **change):
    "Four good rows as JSON, with fields of row i changed; None takes a field out."
    changed = [row | (change if n == i else {}) for n, row in enumerate(ROWS)]
    return json.dumps([{key: value for key, value in row.items() if value is not None} for row in changed])


def gz(text):
    return gzip.compress(text.encode(), mtime=0)


OTHER = "the correct answer is " + {"true": "false", "false": "true"}[ROWS[0]["answer"]]
DATA = {  # content of train.json or train.json.gz -> what the answer must name
    "empty": ("", "not JSON"),
    "no rows": ("[]", "is not an array with rows"),
    "a mapping": ('{"a": 3}', "is not an array with rows"),
    "rows are texts": ('["a", "b"]', "row 0"),
    "null among rows": (rows()[:-1] + ", null]", "row 4"),
    "cut off": (rows()[:-40], "not JSON"),
    "JSON lines": ("".join(json.dumps(row) + "\n" for row in ROWS), "not JSON"),
    "UTF-16": (rows().encode("utf-16"), "cannot be read"),
    "binary": (bytes(range(256)) * 64, "cannot be read"),
    "nested": ("[" * 100_000 + "]" * 100_000, "cannot be read"),
    "field missing": (rows(1, answer=None), "row 1: field 'answer' is missing or not a text: None"),
    "field empty": (rows(instruction=""), "row 0: field 'instruction'"),
    "field a number": (rows(1, output=3), "row 1: field 'output' is missing or not a text: 3"),
    "field a list": (rows(instruction=["so?"]), "row 0: field 'instruction' is missing or not a text"),
    "answer unknown": (rows(2, answer="yes"), "row 2: field 'answer' is 'yes', not one of true/false"),
    "output contradicts": (rows(output=OTHER), "row 0: field 'output' does not contain the answer"),
    "huge answer": (rows(output="word " * 60_000 + ROWS[0]["output"]), "raise data.cutoff"),
    "gz cut off": (gz(rows())[:-30], "train.json.gz: cannot be read"),
    "gz that is none": (rows(), "train.json.gz: cannot be read"),
    "a zip": (b"PK\x03\x04" + bytes(60), "train.json.gz: cannot be read"),
    "absent": (None, "no train.json"),
}  # fmt: skip


@pytest.mark.parametrize("name", DATA)
def test_data_files(name, here, capsys):
    content, part = DATA[name]
    (here / "data" / "boolq").mkdir(parents=True)
    if content is not None:
        path = here / "data" / "boolq" / ("train.json.gz" if ".gz" in part else "train.json")
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    where = [] if "cutoff" in part else ["data/boolq"]
    check("train demo data.path=data data.tasks=[boolq] --output out", [part, *where], here, capsys)


@pytest.mark.parametrize("task, content, part", [
    ("boolq", rows(instruction="Say something."), "row 0: field 'instruction' belongs to none of the eight tasks"),
    ("ARC-Easy", rows(), "cannot be told apart"),
])  # fmt: skip
def test_a_mixed_file(task, content, part, here, capsys):
    (here / "mixed.json").write_text(content)
    check(f"train demo data.path=mixed.json data.tasks=[{task}] --output out", ["mixed.json", part], here, capsys)


@pytest.mark.parametrize("name, content", [
    ("train.json", codecs.BOM_UTF8 + rows().encode()),
    ("train.json", json.dumps(ROWS, indent=1).replace("\n", "\r\n").encode()),
    ("train.json", json.dumps([dict(reversed(row.items())) | {"source": "x"} for row in ROWS]).encode()),
    ("train.json.gz", gz(rows())),
])  # fmt: skip
def test_odd_data_that_are_right(name, content, here):
    for folder, file, text in (("data", name, content), ("plain", "train.json", rows().encode())):
        (here / folder / "boolq").mkdir(parents=True)
        (here / folder / "boolq" / file).write_bytes(text)
    assert read_task("data", "boolq", "train").to_list() == read_task("plain", "boolq", "train").to_list()


# ---- adapters and bases ----
def config(**keys):
    return lambda folder: edit(folder / "adapter_config.json", keys)


def edit(path, keys):
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


def written(name, content):
    "Replace a file; None deletes it, a number cuts it off there."

    def change(folder):
        path = folder / name
        whole = path.read_bytes() if path.exists() else b""
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_bytes(whole[:content] if isinstance(content, int) else content.encode())

    return change


def tensors(change):
    "Change the adapter's tensors: a dict by name, first name first."
    return lambda folder: save_file(
        {name: t.contiguous() for name, t in change(dict(sorted(load_file(folder / WEIGHTS).items()))).items()},
        folder / WEIGHTS,
    )


def first(change):
    return tensors(lambda held: {name: change(t) if i == 0 else t for i, (name, t) in enumerate(held.items())})


CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
ADAPTERS = {
    "no configuration": (written(CONFIG, None), "there is no adapter_config.json"),
    "no weights": (written(WEIGHTS, None), "no adapter_model.safetensors"),
    "configuration cut off": (written(CONFIG, 30), "adapter_config.json is no JSON"),
    "configuration a list": (written(CONFIG, "[1, 2]"), "holds no peft_type"),
    "configuration nested": (written(CONFIG, "[" * 100_000), "adapter_config.json"),
    "method unknown": (config(peft_type="D3MORA"), "'D2MORA'"),
    "a field of a later version": (config(top_k=2), "D2MORA has no top_k"),
    "rank a text": (config(r="3"), "r='3'"),
    "more experts than the file": (config(num_up_experts=9), "does not fit base 'toy': size mismatch"),
    "another pairing": (config(pairing="one-to-many"), "num_down_experts=1"),
    "targets fewer": (config(target_modules=["q_proj"]), "72 of its 84 tensors have no place here"),
    "targets not there": (config(target_modules=["c_attn"]), "match no layer"),
    "no base": (config(base_model_name_or_path=None), "give it by --base"),
    "base not there": (config(base_model_name_or_path="./nowhere"), "no such folder"),
    "weights empty": (written(WEIGHTS, ""), "cannot be read"),
    "weights cut off": (written(WEIGHTS, 300_000), "cannot be read"),
    "weights no safetensors": (written(WEIGHTS, "weights"), "cannot be read"),
    "a tensor missing": (tensors(lambda held: dict(list(held.items())[1:])), "it lacks 1 tensors of 84"),
    "a tensor too many": (tensors(lambda held: held | {"base_model.model.x.d2mora_A.weight": torch.ones(9, 128)}), "1 of its 85"),
    "turned on its side": (first(lambda t: t.T), "does not fit base 'toy': size mismatch"),
    "NaN": (first(lambda t: t * float("nan")), "holds NaN or infinity"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters(name, here, capsys):
    shutil.copytree(DEMO / "adapter", here / "adapter")
    change, part = ADAPTERS[name]
    change(here / "adapter")
    check("evaluate adapter --data toy --tasks boolq --limit 2", [part], here, capsys)
    if name in ("NaN", "a tensor missing"):
        check("export adapter out --data toy --tasks boolq --rows 2 --limit 2", [part], here, capsys)


@pytest.mark.parametrize("name, content", [
    ("model.safetensors", None), ("model.safetensors", 5000), ("config.json", "{"), ("config.json", "[" * 200_000), ("tokenizer.json", None),
])  # fmt: skip
def test_bases(name, content, here, capsys):
    shutil.copytree(toy_base(), here / "base")
    written(name, content)(here / "base")
    check("train demo base=./base --output out", ["/base' cannot be loaded"], here, capsys)


# ---- what an earlier call left ----
@pytest.mark.parametrize("line, name, content, part", [
    ("evaluate run --tasks boolq --limit 2", "recipe.yaml", "", "not a recipe"),
    ("evaluate run --tasks boolq --limit 2", "metrics.jsonl", '{"step": 1', "metrics.jsonl: line 1 is no JSON"),
    ("evaluate run --tasks boolq --limit 2", "evaluation-choice.jsonl", "{}\n", "line 1 holds no hash"),
    ("evaluate run --tasks boolq --limit 2", "evaluation-content.json", "{", "evaluation-content.json is no JSON"),
    ("train demo --output run --resume", "recipe.yaml", "base: [toy", "recipe.yaml: not YAML"),
    ("train demo training.seed=7 --output run --resume", None, None, "training.seed (0 there, 7 now)"),
    ("evaluate run", None, None, "its run is unfinished"),
    ("export run out", None, None, "holds no adapter to export"),
])  # fmt: skip
def test_run_folders(line, name, content, part, here, capsys):
    shutil.copytree(DEMO, here / "run", copy_function=shutil.copyfile)
    if name:
        (here / "run" / name).write_text(content)
    if name is None or "--resume" in line:
        shutil.rmtree(here / "run" / "adapter")
    check(line, [part], here, capsys)


def test_the_tables_are_large_and_each_line_another():
    typed = [line for line, _ in table(OVERRIDES) + table(COMMANDS)]
    assert len(typed) == len(set(typed)) >= 130 and not [line for line in typed if re.search(r"\s\|$", line)]
