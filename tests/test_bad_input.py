"""Bad input: what is typed or found in a file, and what the one-line answer must name. Exit status 2, and nothing is written."""

import codecs
import gzip
import json
import shlex
import shutil
from hashlib import sha256
from pathlib import Path

import pytest
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
GRADE, EXPORT = (
    "evaluate adapter --data toy --tasks boolq --limit 2",
    "export adapter out --data toy --tasks boolq --rows 2",
)
TRAIN = "train demo data.path=data data.tasks=[boolq] --output out"

# a key without a command is an override of `train demo`
TYPED = """
adapter.r=0                                      | r=0 | at least 1
adapter.r=eight                                  | adapter.r='eight' | valid integer
adapter.r=2.5                                    | adapter.r=2.5
adapter.r=true                                   | adapter.r=True
adapter.r=                                       | adapter.r=None
adapter.r=1000000000                             | r=1000000000 | below 65536
adapter.lora_alpha=.nan                          | adapter.lora_alpha=nan | finite number
adapter.lora_dropout=1                           | lora_dropout=1 | below 1
adapter.pairing=many-to-some                     | 'many-to-some' | 'many-to-many'
adapter.pairing=one-to-one                       | num_down_experts = num_up_experts
adapter.orthogonality_weight=-1e-4               | orthogonality_weight | at least 0
adapter.num_experts=3                            | 'adapter.num_up_experts'
adapter.use_dora=true                            | unknown key adapter.use_dora
adapter.peft_type=D2MORE                         | 'D2MORE' | 'D2MORA'
adapter.target_modules=[]                        | target_modules=[] | list of names
adapter.target_modules=[q_porj]                  | q_porj is near q_proj
adapter.target_modules=[embed_tokens]            | embed_tokens | linear layers only
adapter.target_modules=(q_proj                   | '(q_proj' is no regular expression
adapter.modules_to_save=[lm_haed]                | 'lm_haed' | 'lm_head'
data.tasks=[bolq]                                | 'bolq' | 'boolq'
data.tasks=[boolq,boolq]                         | names boolq twice
data.tasks=[]                                    | data.tasks is empty
data.tasks=boolq                                 | data.tasks='boolq' | valid list
data.path=toy-hrad                               | toy-hrad | toy-hard
data.path=/no/such/folder                        | /no/such/folder | no such file or folder
data.prompt=oficial                              | 'oficial' | 'official'
data.cutof=3                                     | data.cutof | 'data.cutoff'
data.learning_rate=1                             | 'training.learning_rate'
data.cutoff=0                                    | data.cutoff=0
data.cutoff=4096                                 | 256 tokens that base 'toy' can read
data.cutoff=8 data.truncation=skip               | skips every row | data.truncation=prompt
data.validation_rows=99999999                    | data.validation_rows=99999999
training.max_steps=0                             | training.max_steps=0
training.num_train_epochs=0                      | training.num_train_epochs=0
training.learning_rate=fast                      | 'fast' | valid number
training.learning_rate=-0.001                    | learning_rate=-0.001 | at least 0
training.seed=-1                                 | training.seed=-1
training.adam_beta1=2                            | beta | 2.0
training.gradient_accumulation_steps=0           | gradient_accumulation_steps=0 | at least 1
training.lr_scheduler_type=linea                 | 'linea' | 'linear'
training.optim=adamm                             | training.optim='adamm'
training.output_dir=x                            | training.output_dir | --output
training.resume_from_checkpoint=x                | training.resume_from_checkpoint | --resume
training.eval_strategy=steps                     | data.validation_rows
training.fp16=true                               | set training.fp16=false
training.report_to=wandbb                        | wandbb
seed=1                                           | training.seed
seed                                             | section.key=value
base=./no/such/base                              | ./no/such/base | no such folder
base=                                            | base=NAME
data.tasks=[boolq                                | not YAML
training.max_steps=!!python/name:os.system       | not YAML
trian                                            | 'trian' | train
train                                            | 'RECIPE'
train demo                                       | --output is missing
train demo --outptu out                          | --outptu | --output
train demo --output ''                           | --output | name a folder
train comonsense-mini --output out               | 'comonsense-mini' | 'commonsense-mini'
train commonsense-mini base=toy --output out     | D2MORA_DATA
train demo --output file/run                     | file/run | cannot be written
train demo --output /proc/run                    | /proc/run | cannot be written
train demo --output LONG                         | take a shorter name
train demo --output full                         | 'full' already holds a run | --resume
train demo --output out --resume                 | holds no run to resume
train demo --output out --gpu H100               | --dry-run
train demo --output out --dry-run                | --dry-run writes nothing
train demo --dry-run --gpu H10                   | 'H10' | 'H100'
train demo --dry-run --tokenizer ./words         | './words' | --tokenizer FOLDER
evaluate                                         | nothing to grade | --base
evaluate no-run                                  | 'no-run' | no such folder
evaluate empty                                   | 'empty' holds no adapter
evaluate --base ./nowhere --data toy             | ./nowhere | no such folder
evaluate --base toy                              | D2MORA_DATA
evaluate --base toy --data toy --protocol choise | 'choise' | choice
evaluate --base toy --data toy --limit 0         | limit=0
evaluate --base toy --data toy --batch-size 0    | batch_size=0
evaluate --base toy --data toy --tasks bolq      | 'bolq' | 'boolq'
evaluate --base toy --data toy --protocol official --prompt plain | leave --prompt plain out
evaluate one two --output out                    | --output is for one DIR
evaluate --base toy --ask ''                     | --ask has no question
demo data.cutof=3 --output out                   | 'data.cutoff'
demo --resume                                    | no demo in runs
compare demo                                     | '--output'
compare demo --output out --methods lorra        | 'lorra' | 'lora'
compare demo --output out --seeds one            | 'one' is not a list of whole numbers
compare demo --output out --seeds 0,1000         | seed 1000
compare demo --output out --learning-rates fast  | 'fast' is not a list of numbers
compare demo --output out --protocols choise     | 'choise' | choice
compare lora-r64 base=toy data.path=toy --output out | adapter.peft_type=LORA
export no-run out                                | 'no-run' holds no adapter
export run full                                  | 'full' exists
export run out --rank 99                         | give 1 to 9
export run out --form avrage                     | 'avrage' | fitted, distilled
export run out --form distilled                  | --distill 100
export run out --tasks bolq                      | 'bolq' | 'boolq'
"""


def rows(i=0, **change):
    "Four good rows as JSON, with fields of row i changed; None takes a field out."
    changed = [row | (change if n == i else {}) for n, row in enumerate(ROWS)]
    return json.dumps([{key: value for key, value in row.items() if value is not None} for row in changed])


def gz(text):
    return gzip.compress(text.encode(), mtime=0)


def recipe(content, part):
    return {"own.yaml": content}, "train own.yaml --output out", part


def data(content, part, name="data/boolq/train.json"):
    return {name: content}, TRAIN, part


def config(part, **keys):
    "Keys of the adapter's configuration."
    return {CONFIG: lambda text: json.dumps(json.loads(text) | keys)}, GRADE, part


def tensor(change, part):
    "The first of the adapter's tensors, changed; None takes it out."

    def changed(folder):
        held = load_file(folder / WEIGHTS)
        name = min(held)
        new = change(held.pop(name))
        save_file(held | ({} if new is None else {name: new.contiguous()}), folder / WEIGHTS)

    return changed, GRADE, part


CONFIG, WEIGHTS = "adapter/adapter_config.json", "adapter/adapter_model.safetensors"
OTHER = "the correct answer is " + {"true": "false", "false": "true"}[ROWS[0]["answer"]]
FOUND = {  # files with their content (a function of the old one, None: missing), the command, what the answer must name
    "recipe empty": recipe("", "not a recipe"),
    "recipe with a part that is a text": recipe("base: toy\ndata: rows", "not a recipe"),
    "recipe with an unknown part": recipe(TEXT + "trainer: {seed: 1}", "not a recipe"),
    "recipe without a base": recipe(TEXT.replace("base: toy\n", ""), "base=NAME"),
    "base is a list": recipe(TEXT.replace("base: toy", "base: [toy]"), "base=['toy']"),
    "a key twice": recipe(TEXT.replace("  r: 2\n", "  r: 2\n  r: 4\n"), "the key 'r' stands there twice"),
    "tabs": recipe(TEXT.replace("  ", "\t"), "not YAML"),
    "recipe nested": recipe("base: " + "[" * 5000 + "]" * 5000, "not YAML"),
    "recipe in UTF-16": recipe(TEXT.encode("utf-16"), "not YAML"),
    "Python object": recipe("base: !!python/object/apply:os.system ['touch out']", "not YAML"),
    "data empty": data("", "data/boolq/train.json: not JSON"),
    "no rows": data("[]", "is not an array with rows"),
    "rows are texts": data('["a", "b"]', "row 0"),
    "data cut off": data(rows()[:-40], "not JSON"),
    "data in UTF-16": data(rows().encode("utf-16"), "cannot be read"),
    "data nested": data("[" * 100_000 + "]" * 100_000, "cannot be read"),
    "field missing": data(rows(1, answer=None), "row 1: field 'answer' is missing"),
    "field a number": data(rows(1, output=3), "row 1: field 'output' is missing or not a text: 3"),
    "answer unknown": data(rows(2, answer="yes"), "row 2: field 'answer' is 'yes', not one of true/false"),
    "output contradicts": data(rows(output=OTHER), "row 0: field 'output' does not contain the answer"),
    "huge answer": data(rows(output="word " * 60_000 + ROWS[0]["output"]), "raise data.cutoff"),
    "gz cut off": data(gz(rows())[:-30], "train.json.gz: cannot be read", "data/boolq/train.json.gz"),
    "data absent": ({"data/boolq/x": ""}, TRAIN, "no train.json"),
    "a mixed file of another form": ({"data": rows(instruction="Say so.")}, TRAIN, "belongs to none of the eight tasks"),
    "a mixed file without the task": ({"data": rows()}, TRAIN.replace("boolq", "piqa"), "no rows of piqa"),
    "no configuration": ({CONFIG: None}, GRADE, "there is no adapter_config.json"),
    "no weights": ({WEIGHTS: None}, GRADE, "no adapter_model.safetensors"),
    "configuration cut off": ({CONFIG: lambda text: text[:30]}, GRADE, "adapter_config.json is no JSON"),
    "configuration a list": ({CONFIG: "[1, 2]"}, GRADE, "holds no peft_type"),
    "method unknown": config("'D2MORA'", peft_type="D3MORA"),
    "a field of a later version": config("D2MORA has no top_k", top_k=2),
    "more memory than there is": config("does not fit base 'toy': size mismatch", r=60_000),
    "targets fewer": config("72 of its 84 tensors have no place here", target_modules=["q_proj"]),
    "base not there": config("no such folder", base_model_name_or_path="./nowhere"),
    "weights no safetensors": ({WEIGHTS: "weights"}, GRADE, "cannot be read"),
    "a tensor missing": tensor(lambda t: None, "it lacks 1 tensors of 84"),
    "turned on its side": tensor(lambda t: t.T, "does not fit base 'toy': size mismatch"),
    "NaN": tensor(lambda t: t * float("nan"), "holds NaN or infinity"),
    "NaN to export": (tensor(lambda t: t * float("nan"), "")[0], EXPORT, "holds NaN or infinity"),
    "base without weights": ({"base/model.safetensors": None}, "train demo base=./base --output out", "/base' cannot be loaded"),
    "base with nested configuration": ({"base/config.json": "[" * 200_000}, "train demo base=./base --output out", "/base' cannot be loaded"),
    "graded run without a recipe": ({"run/recipe.yaml": ""}, "evaluate run --tasks boolq --limit 2", "not a recipe"),
    "log of a run damaged": ({"run/metrics.jsonl": '{"step": 1'}, "evaluate run --tasks boolq --limit 2", "line 1 is no JSON"),
    "another recipe": ({"run/adapter": None}, "train demo training.seed=7 --output run --resume", "training.seed (0 there, 7 now)"),
    "unfinished run": ({"run/adapter": None}, "evaluate run", "its run is unfinished"),
}  # fmt: skip


@pytest.fixture
def here(tmp_path, monkeypatch):
    "An empty folder to work in, without a path to real data."
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("D2MORA_DATA", raising=False)
    return tmp_path


def contents(folder):
    files = (p for p in folder.rglob("*"))
    return {str(p.relative_to(folder)): sha256(p.read_bytes()).hexdigest() if p.is_file() else "" for p in files}


def check(line, parts, folder, capsys):
    "The command fails with one line that names the parts, and leaves the folder as it was."
    before = contents(folder)
    capsys.readouterr()
    status, (out, err) = main(shlex.split(line)), capsys.readouterr()
    assert (status, out, err.count("\n")) == (2, "", 1), (status, out[-500:], err[-2000:])
    assert [part for part in parts if part not in err] == [], err
    assert err.startswith("d2mora: ") and len(err) < 700 and "Traceback" not in err and " at 0x" not in err
    assert contents(folder) == before, "something was written"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("line", TYPED.strip().splitlines())
def test_typed(line, here, capsys):
    typed, *parts = (part.strip() for part in line.split(" | "))
    (here / "file").write_text("precious")
    (here / "empty").mkdir()
    (here / "full" / "adapter").mkdir(parents=True)
    if typed.startswith("export run "):
        shutil.copytree(DEMO, here / "run")
    if typed.split(".")[0] in ("adapter", "data", "training", "seed") or typed.startswith(("base=", "seed=")):
        typed = f"train demo {shlex.join(typed.split())} --output out"
    check(typed.replace("LONG", "x" * 300), parts, here, capsys)


def write(folder, files):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if callable(content):
            content = content(path.read_text())
        if content is None:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        else:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FOUND)
def test_found(name, here, capsys):
    files, line, part = FOUND[name]
    places = {"adapter": DEMO / "adapter", "run": DEMO, "base": toy_base()}
    for folder in places.keys() & {"adapter"} if callable(files) else places.keys() & {f.split("/")[0] for f in files}:
        shutil.copytree(places[folder], here / folder, copy_function=shutil.copyfile)
    files(here) if callable(files) else write(here, files)
    check(line, [part], here, capsys)


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


@pytest.mark.parametrize("content, plain", [
    (codecs.BOM_UTF8 + TEXT.encode(), TEXT),
    (TEXT.replace("\n", "\r\n"), TEXT),
    (json.dumps(RECIPE), TEXT),
    (TEXT + "  learning_rate: 1e-3\n", TEXT + "  learning_rate: 0.001\n"),  # a text to YAML
    (TEXT + "  save_strategy: no\n", TEXT + "  save_strategy: 'no'\n"),  # false to YAML
])  # fmt: skip
def test_odd_recipes_that_are_right(content, plain, here):
    write(here, {"own.yaml": content, "plain.yaml": plain})
    assert load_recipe("own.yaml") == load_recipe("plain.yaml")


@pytest.mark.parametrize("name, content", [
    ("train.json", codecs.BOM_UTF8 + rows().encode()),
    ("train.json", json.dumps(ROWS, indent=1).replace("\n", "\r\n")),
    ("train.json", json.dumps([dict(reversed(row.items())) | {"source": "x"} for row in ROWS])),
    ("train.json.gz", gz(rows())),
])  # fmt: skip
def test_odd_data_that_are_right(name, content, here):
    write(here, {f"data/boolq/{name}": content, "plain/boolq/train.json": rows()})
    assert read_task("data", "boolq", "train").to_list() == read_task("plain", "boolq", "train").to_list()
