"""The catalogue of bad input: what is wrong, how it is given, and the one line that answers it.

A case is a command line (`d2mora …`) or a Python expression, run in an empty folder that holds the case's files.
`says` is the whole message; … stands for text that is a library's own or names this machine. `accepted` is input
that looks odd and is right: it must give what the expression `same` gives.
"""

import codecs
import gzip
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from d2mora.toy import toy_base, toy_rows

ADAPTER = Path(__file__).parents[1] / "nbs" / "results" / "demo" / "adapter"
ROWS = toy_rows("toy", "boolq", "train")[:4]
RECIPE = {
    "base": "toy",
    "adapter": {"r": 2, "num_down_experts": 2, "num_up_experts": 2, "target_modules": ["q_proj"]},
    "data": {"path": "toy", "tasks": ["boolq"], "cutoff": 128},
    "training": {"max_steps": 2, "seed": 0, "use_cpu": True},
}


@dataclass(frozen=True)
class Case:
    id: str        # its name in the catalogue
    wrong: str     # what is wrong, for a reader
    given: str     # a command line or an expression
    says: str      # the message; "accepted"
    files: dict = field(default_factory=dict)  # name -> text, bytes, or a function that makes it
    same: str = "" # of accepted input: an expression with the result that it must have


# ---- what the cases are made of ----
def recipe(**changes) -> str:
    "A good recipe as text; section__key=value replaces a value, section=value a section."
    made = json.loads(json.dumps(RECIPE))
    for name, value in changes.items():
        section, _, key = name.partition("__")
        if key: made[section][key] = value
        else: made[section] = value
    return yaml.safe_dump(made, sort_keys=False)


def rows(*changes: dict) -> str:
    "Four good rows as JSON; each change is laid over the row of its place, None takes a field out."
    made = [row | (changes[i] if i < len(changes) else {}) for i, row in enumerate(ROWS)]
    return json.dumps([{k: v for k, v in row.items() if v is not None} for row in made])


def gz(text: str) -> bytes: return gzip.compress(text.encode(), mtime=0)


def data(content, name="train.json", **more) -> dict: return {f"data/boolq/{name}": content, **more}


def adapter(config: dict | str | bytes | None = None, change: Callable | None = None, cut: int = 0, drop: tuple = ()) -> Callable:
    "The demo's adapter with another configuration, changed tensors, a shorter file, or without some files."
    def make(folder: Path):
        shutil.copytree(ADAPTER, folder, copy_function=shutil.copyfile)
        path, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
        if isinstance(config, dict): path.write_text(json.dumps({k: v for k, v in (json.loads(path.read_text()) | config).items() if v != "drop"}))
        elif config is not None: path.write_bytes(config if isinstance(config, bytes) else config.encode())
        if change: save_file(change(load_file(weights)), weights)
        if cut: weights.write_bytes(weights.read_bytes()[:cut])
        for name in drop: (folder / name).unlink()
    return make


def tensors(pick: str, to: Callable) -> Callable:
    "Change the tensors whose name holds `pick`; None takes them out."
    def change(held):
        new = {k: to(v) if pick in k else v for k, v in held.items()}
        return {k: v.contiguous() for k, v in new.items() if v is not None}
    return change


def first(change: Callable) -> Callable:
    "Change the first tensor only."
    return lambda held: {k: (change(v) if i == 0 else v).contiguous() for i, (k, v) in enumerate(sorted(held.items()))}


def poisoned(value: float) -> Callable:
    def put(t):
        t = t.clone()
        t.view(-1)[3] = value
        return t
    return put


def base(change: Callable) -> Callable:
    "A copy of the embedded base, changed."
    def make(folder: Path):
        shutil.copytree(toy_base(), folder, copy_function=shutil.copyfile)
        change(folder)
    return make


def another_base(folder: Path) -> None:
    "A base of other sizes with the same tokenizer."
    base(lambda f: None)(folder)
    sizes = dict(vocab_size=512, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2)
    LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(folder)


def run(change: Callable = lambda folder: None) -> Callable:
    "A copy of the demo's run, changed."
    def make(folder: Path):
        shutil.copytree(ADAPTER.parent, folder, copy_function=shutil.copyfile)
        change(folder)
    return make


def write(name: str, text: str | bytes) -> Callable:
    return lambda folder: (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())


def published(M=3, N=4, r=2, d=8, layers=2, order=1) -> dict:
    "Parameters as the authors publish them."
    draw, made = torch.Generator().manual_seed(0), {}
    for layer in range(layers):
        at = f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora_"
        made |= {f"{at}A.{i}.weight": torch.randn(r, d, generator=draw) for i in range(M)}
        made |= {f"{at}B.{j}.weight": torch.randn(d, r, generator=draw) for j in range(N)}
        made |= {f"{at}route1.weight": torch.randn(M, d, generator=draw), f"{at}route2.weight": torch.randn(N, r, generator=draw)}
    return dict(list(made.items())[::order])


def net() -> nn.Module:
    "Two linear layers and one that is none."
    return nn.Sequential(nn.Linear(8, 6), nn.LayerNorm(6), nn.Linear(6, 4))


# ---- recipes ----
TRAIN = "d2mora train own.yaml --output out"


def own(id, wrong, says, text, given=TRAIN, **more): return Case(f"recipe: {id}", wrong, given, says, {"own.yaml": text, **more})


BOMB = "base: toy\na: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(f"{b}: &{b} [{', '.join(['*' + a] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi")) + "data: *i\n"
RECIPES = [
    own("unknown part", "a part that no recipe has", "own.yaml: unknown key 'trainer' (did you mean 'training'?)", recipe(trainer={"seed": 1})),
    own("misspelt key", "a key with a slip of the pen", "unknown key data.cutof (did you mean 'data.cutoff'?)", recipe(data__cutof=64)),
    own("foreign key", "a key of another PEFT method", "unknown key adapter.use_dora (it is no field of the 'adapter' section)", recipe(adapter__use_dora=True)),
    own("key of another part", "a training key among the data's", "unknown key data.learning_rate (did you mean 'training.learning_rate'?)", recipe(data__learning_rate=1e-3)),
    own("key that is a number", "a key that is no text", "unknown key training.7 (it is no field of the 'training' section)", recipe(training__max_steps=2).replace("max_steps", "7")),
    own("part that is a number", "a top key that is no text", "own.yaml: unknown key '7' (there are: base, adapter, data, training)", recipe() + "7: 3\n"),
    own("empty key", "a key without a name", "own.yaml: unknown key '' (there are: base, adapter, data, training)", recipe() + "'': 3\n"),
    own("word for number", "a word where a number belongs", "adapter.r='eight' is not a whole number", recipe(adapter__r="eight")),
    own("fraction for whole", "a fraction where a whole number belongs", "adapter.r=2.5 is not a whole number", recipe(adapter__r=2.5)),
    own("true for number", "true where a number belongs", "adapter.r=True is not a whole number", recipe(adapter__r=True)),
    own("list for number", "a list where a number belongs", "adapter.r=[2] is not a whole number", recipe(adapter__r=[2])),
    own("mapping for number", "keys and values where a number belongs", "adapter.r={'a': 1} is not a whole number", recipe(adapter__r={"a": 1})),
    own("nothing for number", "no value at all", "adapter.r=None is not a whole number", recipe(adapter__r=None)),
    own("date for number", "a date, as YAML reads it, for a number", "training.seed=datetime.date(2026, 1, 1) is not a whole number", recipe().replace("seed: 0", "seed: 2026-01-01")),
    own("number for text", "a number where a text belongs", "data.prompt=3 is not one of plain, official, cloze", recipe(data__prompt=3)),
    own("nan", "a learning rate that is not a number", "training.learning_rate=nan is not a number", recipe(training__learning_rate=float("nan"))),
    own("infinity", "an infinite learning rate", "training.learning_rate=inf is not a number", recipe(training__learning_rate=float("inf"))),
    own("nan in the adapter", "a scale that is not a number", "adapter.lora_alpha=nan is not a number", recipe(adapter__lora_alpha=float("nan"))),
    own("negative rate", "a negative learning rate", "training.learning_rate=-0.001: must be at least 0", recipe(training__learning_rate=-1e-3)),
    own("negative decay", "a negative weight decay", "training.weight_decay=-0.1: must be at least 0", recipe(training__weight_decay=-0.1)),
    own("negative seed", "a seed below zero", "training.seed=-1: must be at least 0 and below 2**32", recipe(training__seed=-1)),
    own("seed too large", "a seed of 31 digits", "training.seed=1000000000000000000000000000000: must be at least 0 and below 2**32", recipe(training__seed=10**30)),
    own("huge rank", "a rank of 31 digits", "adapter: r=1000000000000000000000000000000: give a whole number of at least 1 and below 65536", recipe(adapter__r=10**30)),
    own("large rank", "a rank larger than any layer", "adapter: r=1000000000: give a whole number of at least 1 and below 65536", recipe(adapter__r=10**9)),
    own("rank zero", "no rank", "adapter: r=0: give a whole number of at least 1 and below 65536", recipe(adapter__r=0)),
    own("alpha zero", "a scale of zero, which trains nothing", "adapter: lora_alpha=0.0: the adapter would add nothing and learn nothing: give a number above 0", recipe(adapter__lora_alpha=0)),
    own("dropout one", "dropout of everything", "adapter: lora_dropout=1.0: give a number of at least 0 and below 1", recipe(adapter__lora_dropout=1.0)),
    own("no down experts", "M = 0", "adapter: num_down_experts=0: give a whole number of at least 1 and below 65536", recipe(adapter__num_down_experts=0)),
    own("pairs uneven", "one-to-one with M ≠ N", "adapter: pairing='one-to-one' does not fit num_down_experts=2, num_up_experts=3: it needs num_down_experts = num_up_experts", recipe(adapter__pairing="one-to-one", adapter__num_up_experts=3)),
    own("one to many from two", "one-to-many with M = 2", "adapter: pairing='one-to-many' does not fit num_down_experts=2, num_up_experts=2: it needs num_down_experts=1", recipe(adapter__pairing="one-to-many")),
    own("pairing unknown", "a pairing that is none", "adapter: pairing='many-to-one' is unknown (did you mean 'many-to-many'?)", recipe(adapter__pairing="many-to-one")),
    own("pairing a list", "a pairing that is a list", "adapter.pairing=['one-to-one'] is not a text", recipe(adapter__pairing=["one-to-one"])),
    own("method unknown", "a method that PEFT does not have", "adapter.peft_type='D2MORAA' is unknown (did you mean 'D2MORA'?)", recipe(adapter__peft_type="D2MORAA")),
    own("method a list", "a method that is a list", "adapter.peft_type=['LORA'] is unknown (did you mean 'LORA'?)", recipe(adapter__peft_type=["LORA"])),
    own("task type unknown", "a task type that PEFT does not have", "adapter.task_type='CAUSAL' is not one of … (did you mean 'CAUSAL_LM'?)", recipe(adapter__task_type="CAUSAL")),
    own("targets a number", "target layers given as a number", "adapter.target_modules=3 is not a list [text, …] or a text or nothing", recipe(adapter__target_modules=3)),
    own("targets empty", "an empty list of target layers", "adapter: target_modules=[]: give a list of names, or one pattern; leave it out for the usual ones", recipe(adapter__target_modules=[])),
    own("targets an empty text", "an empty pattern of target layers", "adapter: target_modules='': give a list of names, or one pattern; leave it out for the usual ones", recipe(adapter__target_modules="")),
    own("targets not there", "a target layer that the base lacks", "adapter: target_modules=['q_porj'] match no layer of LlamaForCausalLM (q_porj is near q_proj and v_proj)", recipe(adapter__target_modules=["q_porj"])),
    own("targets no linear layer", "a target that is an embedding", "adapter: layer 'model.embed_tokens': D2MoRA adapts linear layers only, not a sparse.Embedding: take it out of target_modules", recipe(adapter__target_modules=["embed_tokens"])),
    own("targets a broken pattern", "a regular expression that is none", "adapter: target_modules='(q_proj' is no regular expression (…): mend it, or list the names", recipe(adapter__target_modules="(q_proj")),
    own("excluded pattern broken", "an exclusion that is no regular expression", "adapter: exclude_modules='*proj' is no regular expression (…): mend it, or list the names", recipe(adapter__exclude_modules="*proj")),
    own("all excluded", "every target layer excluded again", "adapter: target_modules=['q_proj'] match no layer of LlamaForCausalLM (linear layers here: down_proj, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj; exclude_modules={'q_proj'} may leave none)", recipe(adapter__exclude_modules=["q_proj"])),
    own("layers not there", "blocks that the base lacks", "adapter: target_modules=['q_proj'] match no layer of LlamaForCausalLM (linear layers here: down_proj, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj; layers_to_transform=[99] may leave none)", recipe(adapter__layers_to_transform=[99])),
    own("layers negative", "a block counted from the end", "adapter: layers_to_transform=-1: give a whole number of at least 0", recipe(adapter__layers_to_transform=[-1])),
    own("layers with a pattern", "blocks by number and layers by pattern at once", "adapter: layers_to_transform=[0] does not narrow the pattern target_modules='.*q_proj': list names, or put the blocks into the pattern", recipe(adapter__target_modules=".*q_proj", adapter__layers_to_transform=[0])),
    own("pattern without layers", "layers_pattern without the numbers of blocks", "adapter: layers_pattern='layers' needs layers_to_transform, the indices of the layers", recipe(adapter__layers_pattern="layers")),
    own("saved modules not there", "a module to save that the base lacks", "adapter: modules_to_save: LlamaForCausalLM has no module 'lm_haed' (did you mean 'lm_head'?)", recipe(adapter__modules_to_save=["lm_haed"])),
    own("lora rank zero", "PEFT's own LoRA with rank 0", "adapter: `r` should be a positive integer value but the value passed is 0", recipe(adapter={"peft_type": "LORA", "r": 0, "target_modules": ["q_proj"]})),
    own("no base", "no base", "recipe 'own.yaml' has no base: add base=NAME (a hub name, a folder, or toy)", recipe().replace("base: toy\n", "")),
    own("base empty", "a base without a name", "recipe 'own.yaml' has no base: add base=NAME (a hub name, a folder, or toy)", recipe(base="")),
    own("base a number", "a base that is a number", "base=7 is not a text: name one base (a hub name, a folder, or toy)", recipe(base=7)),
    own("base a list", "a base that is a list", "base=['toy'] is not a text: name one base (a hub name, a folder, or toy)", recipe(base=["toy"])),
    own("base not there", "a base folder that is not there", "base './base' cannot be loaded: there is no such folder", recipe(base="./base")),
    own("base a file", "a base that is a file", "base './own.yaml' cannot be loaded: there is no such folder", recipe(base="./own.yaml")),
    own("base outside", "a base that is some other folder", "base './data' cannot be loaded: …; give a hub name or a folder with config.json, weights and tokenizer.json", recipe(base="./data"), **{"data/x": ""}),
    own("empty file", "nothing in the file", "own.yaml: not a recipe: it needs base, adapter, data and training", ""),
    own("only comments", "only a comment in the file", "own.yaml: not a recipe: it needs base, adapter, data and training", "# base: toy\n"),
    own("a list", "a list instead of parts", "own.yaml: not a recipe: it needs base, adapter, data and training", "- base: toy\n- data: {path: toy}\n"),
    own("a text", "a sentence instead of parts", "own.yaml: not a recipe: it needs base, adapter, data and training", "train toy please\n"),
    own("part a list", "a part that is a list", "own.yaml: 'data' must hold keys and values, not ['toy']", recipe(data=["toy"])),
    own("part a text", "a part that is a text", "own.yaml: 'training' must hold keys and values, not 'fast'", recipe(training="fast")),
    own("part a number zero", "a part that is 0", "own.yaml: 'data' must hold keys and values, not 0", recipe(data=0)),
    own("duplicate key", "the same key twice", "own.yaml: not YAML: the key 'r' stands there twice: keep one", recipe().replace("  r: 2\n", "  r: 2\n  r: 4\n")),
    own("duplicate part", "the same part twice", "own.yaml: not YAML: the key 'data' stands there twice: keep one", recipe() + "data:\n  path: toy-hard\n"),
    own("tabs", "indented by tabs", "own.yaml: not YAML: …", recipe().replace("  ", "\t")),
    own("broken indentation", "a line that is indented wrongly", "own.yaml: not YAML: …", recipe().replace("  seed", " seed")),
    own("open bracket", "a bracket that is never closed", "own.yaml: not YAML: …", recipe() + "x: [1, 2\n"),
    own("two documents", "two recipes in one file", "own.yaml: not YAML: …", recipe() + "---\n" + recipe()),
    own("UTF-16", "saved as UTF-16", "own.yaml: not YAML: …: save it as UTF-8", recipe().encode("utf-16")),
    own("Latin-1", "saved as Latin-1", "own.yaml: not YAML: …: save it as UTF-8", recipe(base="modèle").replace('"mod\\xE8le"', "modèle").encode("latin-1")),
    own("NUL", "a NUL in the file", "own.yaml: not YAML: …", recipe().replace("toy", "t\0oy", 1)),
    own("binary", "weights instead of a recipe", "own.yaml: not YAML: …: save it as UTF-8", bytes(range(256)) * 40),
    own("nested", "brackets five thousand deep", "own.yaml: not YAML: more than 50 levels deep", "base: " + "[" * 5000 + "]" * 5000),
    own("nested mapping", "keys five thousand deep", "own.yaml: not YAML: more than 50 levels deep", "data: " + "{a: " * 5000 + "1" + "}" * 5000),
    own("anchor bomb", "references that unfold to 9⁹ values", "own.yaml: not YAML: the alias *a is not taken: write the value out", BOMB),
    own("reference to itself", "a value that holds itself", "own.yaml: not YAML: the alias *a is not taken: write the value out", "base: toy\ndata: &a {path: *a}\n"),
    own("code", "a YAML tag that would run a command", "own.yaml: not YAML: …", "base: !!python/object/apply:os.system ['touch out']\n"),
    own("own tag", "a tag that nobody knows", "own.yaml: not YAML: …", "base: !include other.yaml\n"),
    own("task unknown", "a task that is none of the eight", "data.tasks: unknown task 'bolq' (did you mean 'boolq'?)", recipe(data__tasks=["bolq"])),
    own("task twice", "a task named twice", "data.tasks names boolq twice: name it once", recipe(data__tasks=["boolq", "boolq"])),
    own("tasks empty", "no task", "data.tasks is empty: name at least one task", recipe(data__tasks=[])),
    own("tasks a text", "one task as a text", "data.tasks='boolq' is not a list [text, …]", recipe(data__tasks="boolq")),
    own("task a number", "a task that is a number", "data.tasks=[3] is not a list [text, …]", recipe(data__tasks=[3])),
    own("cutoff zero", "rows cut to nothing", "data.cutoff=0: must be at least 1 token", recipe(data__cutoff=0)),
    own("cutoff beyond the base", "longer rows than the base can read", "data.cutoff=4096 is more than the 256 tokens that base 'toy' can read", recipe(data__cutoff=4096)),
    own("cutoff skips all", "a cutoff that leaves no row", "data.cutoff=8 skips every row: raise it, or set data.truncation=prompt", recipe(data__cutoff=8, data__truncation="skip")),
    own("validation takes all", "as many rows set aside as there are", "data.validation_rows=800 leaves nothing to train on: there are 800 rows", recipe(data__validation_rows=800)),
    own("validation negative", "fewer than no rows set aside", "data.validation_rows=-1: must be 0 or more", recipe(data__validation_rows=-1)),
    own("evaluation without rows", "a validation strategy, but no rows set aside", "training.eval_strategy=steps needs data.validation_rows of 1 or more", recipe(training__eval_strategy="steps")),
    own("best without evaluation", "the best checkpoint wanted, but none graded", "training: --load_best_model_at_end requires …", recipe(training__load_best_model_at_end=True, data__validation_rows=8)),
    own("two precisions", "bf16 and fp16 at once", "training.fp16=true needs a GPU: train in fp32 or, with training.bf16=true, in bf16", recipe(training__bf16=True, training__fp16=True)),
    own("fp16 on the CPU", "fp16 without a GPU", "training.fp16=true needs a GPU: train in fp32 or, with training.bf16=true, in bf16", recipe(training__fp16=True)),
    own("no steps", "training for no step", "training.max_steps=0: must be 1 or more (leave it out to train by epochs)", recipe(training__max_steps=0)),
    own("no epochs", "training for no epoch", "training.num_train_epochs=0.0: must be more than 0", recipe(training={"num_train_epochs": 0})),
    own("epochs not a number", "training for nan epochs", "training.num_train_epochs=nan is not a number", recipe(training={"num_train_epochs": float("nan")})),
    own("no accumulation", "gradients gathered over no batch", "training.gradient_accumulation_steps=0: must be at least 1", recipe(training__gradient_accumulation_steps=0)),
    own("batch size negative", "a negative batch", "training.per_device_train_batch_size=-4: must be at least 1", recipe(training__per_device_train_batch_size=-4)),
    own("optimizer unknown", "an optimizer that is none", "training.optim='adamm' is not one of its words (did you mean 'adalomo'?)", recipe(training__optim="adamm")),
    own("schedule unknown", "a schedule that is none", "training.lr_scheduler_type='cosin' is not one of … (did you mean 'cosine'?)", recipe(training__lr_scheduler_type="cosin")),
    own("strategy unknown", "a saving strategy that is none", "training.save_strategy='sometimes' is not one of no, steps, epoch, best (did you mean 'steps'?)", recipe(training__save_strategy="sometimes")),
    own("reporter unknown", "a reporter that is none", "training: wandbb is not supported, …", recipe(training__report_to="wandbb")),
    own("beta out of range", "Adam's beta of 2", "training.adam_beta1=2.0: must be at least 0 and below 1", recipe(training__adam_beta1=2.0)),
    own("epsilon negative", "Adam's epsilon below zero", "training.adam_epsilon=-1.0: must be at least 0", recipe(training__adam_epsilon=-1.0)),
    own("workers negative", "fewer than no worker processes", "training.dataloader_num_workers=-1: must be at least 0", recipe(training__dataloader_num_workers=-1)),
    own("schedule arguments wrong", "an argument that the schedule does not have", "training: …cycles…", recipe(training__lr_scheduler_type="cosine_with_restarts", training__lr_scheduler_kwargs={"cycles": 3})),
    own("deepspeed not there", "a DeepSpeed file that is not there", "training: …deepspeed…", recipe(training__deepspeed="no.json")),
    own("output in the recipe", "the output folder set in the recipe", "training.output_dir cannot be set in a recipe: the run folder is given by --output alone", recipe(training__output_dir="elsewhere")),
    own("resume in the recipe", "a checkpoint to resume from in the recipe", "training.resume_from_checkpoint cannot be set in a recipe: use --resume", recipe(training__resume_from_checkpoint="x")),
    own("push in the recipe", "uploading asked for in the recipe", "training.push_to_hub cannot be set in a recipe: push the finished adapter instead", recipe(training__push_to_hub=True)),
    own("no data", "no data path", "no data are named: give data.path (--data of evaluate and export) a folder with <task>/train.json, or toy, or set D2MORA_DATA", recipe(data={"tasks": ["boolq"]})),
    own("data not there", "a data folder that is not there", "data.path=rows: no such file or folder, and not one of toy, toy-hard", recipe(data__path="rows")),
    own("data path a list", "two data folders", "data.path=['toy', 'toy-hard'] is not a text or nothing", recipe(data__path=["toy", "toy-hard"])),
    own("data path empty", "an empty data path", "no data are named: give data.path (--data of evaluate and export) a folder with <task>/train.json, or toy, or set D2MORA_DATA", recipe(data__path="")),
    own("data is the recipe", "a data path that is the recipe itself", "./own.yaml: not JSON: …; mend the file or leave its task out of data.tasks", recipe(data__path="own.yaml")),
    own("a folder", "a folder instead of a recipe", "recipe 'out.d' is neither a file nor built in (there are: …)", recipe(), given="d2mora train out.d --output out", **{"out.d/x": ""}),
    Case("recipe: unknown", "a recipe that is neither there nor built in", "d2mora train comonsense-mini --output out", "recipe 'comonsense-mini' is neither a file nor built in (did you mean 'commonsense-mini'?)"),
    Case("recipe: empty name", "a recipe without a name", "d2mora train '' --output out", "recipe '' is neither a file nor built in (there are: …)"),
    Case("recipe: accepted: BOM", "a byte-order mark at its beginning", "load_recipe('own.yaml')", "accepted", {"own.yaml": codecs.BOM_UTF8 + recipe().encode(), "plain.yaml": recipe()}, "load_recipe('plain.yaml')"),
    Case("recipe: accepted: CRLF", "lines ended as on Windows", "load_recipe('own.yaml')", "accepted", {"own.yaml": recipe().replace("\n", "\r\n").encode(), "plain.yaml": recipe()}, "load_recipe('plain.yaml')"),
    Case("recipe: accepted: order", "parts in another order", "load_recipe('own.yaml')", "accepted", {"own.yaml": yaml.safe_dump(RECIPE, sort_keys=True), "plain.yaml": recipe()}, "load_recipe('plain.yaml')"),
    Case("recipe: accepted: JSON", "written as JSON", "load_recipe('own.yaml')", "accepted", {"own.yaml": json.dumps(RECIPE), "plain.yaml": recipe()}, "load_recipe('plain.yaml')"),
    Case("recipe: accepted: exponent", "1e-3, which YAML reads as a text", "load_recipe('own.yaml')", "accepted", {"own.yaml": recipe() + "  learning_rate: 1e-3\n", "plain.yaml": recipe(training__learning_rate=0.001)}, "load_recipe('plain.yaml')"),
    Case("recipe: accepted: no", "a bare no, which YAML reads as false", "load_recipe('own.yaml')", "accepted", {"own.yaml": recipe() + "  save_strategy: no\n", "plain.yaml": recipe(training__save_strategy="no")}, "load_recipe('plain.yaml')"),
]


# ---- command lines ----
def line(id, wrong, says, given, **files): return Case(f"command: {id}", wrong, f"d2mora {given}", says, files)


FILE, FULL = {"out": "precious"}, {"out/adapter/weights": "precious"}
COMMANDS = [
    line("unknown", "a command that is none", "No such command 'trian'.…", "trian demo --output out"),
    line("unknown option", "an option that is none", "No such option …--outptu…", "train demo --outptu out"),
    line("option without value", "an option without its value", "Option '--output' requires an argument.", "train demo --output"),
    line("option twice wrong", "a number where a switch stands alone", "Option '--resume' does not take a value.", "train demo --output out --resume=3"),
    line("group option", "an option of another command", "No such option …--resume…", "evaluate --base toy --resume"),
    line("train: no recipe", "no recipe", "Missing argument 'RECIPE'.", "train"),
    line("train: no output", "no output folder", "--output is missing: name the run folder to make, or add --dry-run", "train demo"),
    line("train: empty output", "an empty output folder", "Invalid value for '--output': it is empty: name a folder", "train demo --output ''"),
    line("train: output a file", "an output that is a file", "output 'out' is a file: name a folder", "train demo --output out", **FILE),
    line("train: output in a file", "an output inside a file", "out/run/.lock cannot be written (… MiB free on its disk): …; what was written before is untouched: make room, or make it writable, and give the command again (train and demo: with --resume)", "train demo --output out/run", **FILE),
    line("train: output exists", "an output that holds a run", "output 'out' already holds a run (adapter): name another folder, or go on with --resume", "train demo --output out", **FULL),
    line("train: output not writable", "an output where nothing can be made", "/proc/run/.lock cannot be written (… MiB free on its disk): …; what was written before is untouched: make room, or make it writable, and give the command again (train and demo: with --resume)", "train demo --output /proc/run"),
    line("train: output too long", "an output name of 300 letters", "Invalid value for '--output': 'xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx' is no name for a folder: …", f"train demo --output {'x' * 300}"),
    line("train: nothing to resume", "resuming where nothing was begun", "output 'out' holds no run to resume: leave --resume out", "train demo --output out --resume"),
    line("train: resume another", "resuming with another recipe", "output 'out' was begun with another recipe: training.seed (0 there, 7 now); give the same, or name another folder", "train demo training.seed=7 --output out --resume", out=run(lambda f: shutil.rmtree(f / "adapter"))),
    line("train: resume a damaged recipe", "resuming a run whose recipe is damaged", "out/recipe.yaml: not YAML: …", "train demo --output out --resume", out=run(write("recipe.yaml", "base: [toy"))),
    line("train: override without value", "an override without a value", "'training.seed' is not understood: write base=NAME or section.key=value", "train demo training.seed --output out"),
    line("train: override without part", "an override without its part", "unknown key 'seed' (there are: training.seed)", "train demo seed=1 --output out"),
    line("train: override of a part", "an override of a whole part", "unknown key 'data' (did you mean 'data.path'?)", "train demo data=toy --output out"),
    line("train: override too deep", "an override three levels deep", "unknown key training.lr_scheduler_kwargs.num_cycles (did you mean 'training.lr_scheduler_kwargs'?)", "train demo training.lr_scheduler_kwargs.num_cycles=3 --output out"),
    line("train: override empty", "an empty override", "'' is not understood: write base=NAME or section.key=value", "train demo '' --output out"),
    line("train: override not YAML", "an override whose value is not YAML", "'data.tasks=[boolq': not YAML: …", "train demo 'data.tasks=[boolq' --output out"),
    line("train: override nested", "an override with brackets five thousand deep", "'data.tasks=[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[…': not YAML: more than 50 levels deep", f"train demo 'data.tasks={'[' * 5000}' --output out"),
    line("train: override with a reference", "an override with a YAML reference", "'data.tasks=[&a [*a]]': not YAML: the alias *a is not taken: write the value out", "train demo 'data.tasks=[&a [*a]]' --output out"),
    line("train: GPU without dry run", "--gpu without --dry-run", "--tokenizer and --gpu belong to --dry-run: add it, or leave them out", "train demo --gpu H100 --output out"),
    line("train: dry run with output", "--dry-run and --output", "--dry-run writes nothing: leave --output and --resume out", "train demo --dry-run --output out"),
    line("train: GPU unknown", "a GPU that nobody knows", "gpu 'H10' (did you mean 'H100'?); or give JSON: {\"name\": \"mine\", \"memory\": 24, \"tflops\": 100}", "train demo --dry-run --gpu H10"),
    line("train: GPU figures wrong", "a GPU described by other figures", "gpu '{\"name\": \"mine\"}' (…); or give JSON: {\"name\": \"mine\", \"memory\": 24, \"tflops\": 100}", "train demo --dry-run --gpu '{\"name\": \"mine\"}'"),
    line("train: GPU figures a list", "a GPU described by a list", "gpu '[1, 2]' (…); or give JSON: {\"name\": \"mine\", \"memory\": 24, \"tflops\": 100}", "train demo --dry-run --gpu '[1, 2]'"),
    line("train: GPU figures no numbers", "a GPU whose memory is a word", "gpu '{\"name\": \"mine\", \"memory\": \"much\", \"tflops\": 3}' (memory='much': give a number of at least 1e-06); or give JSON: {\"name\": \"mine\", \"memory\": 24, \"tflops\": 100}", "train demo --dry-run --gpu '{\"name\": \"mine\", \"memory\": \"much\", \"tflops\": 3}'"),
    line("train: GPU without speed", "a GPU of zero TFLOP/s", "gpu '{\"name\": \"mine\", \"memory\": 24, \"tflops\": 0}' (tflops=0: give a number of at least 1e-06); or give JSON: {\"name\": \"mine\", \"memory\": 24, \"tflops\": 100}", "train demo --dry-run --gpu '{\"name\": \"mine\", \"memory\": 24, \"tflops\": 0}'"),
    line("train: GPU file missing", "a GPU file that is not there", "gpu 'gpu.json': No such file or directory: give a JSON file in UTF-8, or one of A100-40, A100-80, H100, H200, L40S, RTX-4090", "train demo --dry-run --gpu gpu.json"),
    line("train: GPU file no UTF-8", "a GPU file saved as UTF-16", "gpu 'gpu.json': …: give a JSON file in UTF-8, or one of A100-40, A100-80, H100, H200, L40S, RTX-4090", "train demo --dry-run --gpu gpu.json", **{"gpu.json": '{"name": "mine", "memory": 24, "tflops": 3}'.encode("utf-16")}),
    line("train: tokenizer not there", "a tokenizer folder that is not there", "tokenizer of './words' cannot be loaded: …; give another in its place by --tokenizer FOLDER", "train demo --dry-run --tokenizer ./words"),
    line("train: tokenizer a file", "a tokenizer that is a file", "tokenizer of './words' cannot be loaded: …; give another in its place by --tokenizer FOLDER", "train demo --dry-run --tokenizer ./words", words="x"),
    line("evaluate: nothing", "nothing to grade", "nothing to grade: name a run or an adapter's folder, or a base by --base", "evaluate"),
    line("evaluate: not there", "a folder that is not there", "'no-run' holds no adapter: there is no such folder", "evaluate no-run"),
    line("evaluate: a file", "a file instead of a run", "'out' holds no adapter: there is no such folder", "evaluate out", **FILE),
    line("evaluate: empty name", "a target without a name", "'' holds no adapter: there is no adapter_config.json and no recipe.yaml", "evaluate ''"),
    line("evaluate: empty folder", "an empty folder", "'run' holds no adapter: there is no adapter_config.json and no recipe.yaml", "evaluate run", **{"run/notes.txt": ""}),
    line("evaluate: protocol unknown", "a protocol that is none", "unknown protocol 'choise' (did you mean 'choice'?)", "evaluate --base toy --data toy --protocol choise"),
    line("evaluate: limit a word", "a word for a number", "Invalid value for '--limit': 'many' is not a valid integer…", "evaluate --base toy --data toy --limit many"),
    line("evaluate: limit zero", "no rows to grade", "limit=0: grade at least one row per task", "evaluate --base toy --data toy --limit 0"),
    line("evaluate: batch negative", "a negative batch", "batch_size=-4: must be at least 1", "evaluate --base toy --data toy --batch-size -4"),
    line("evaluate: batch a fraction", "half a row at once", "Invalid value for '--batch-size': '0.5' is not a valid integer…", "evaluate --base toy --data toy --batch-size 0.5"),
    line("evaluate: task unknown", "a task that is none of the eight", "unknown task 'bolq' (did you mean 'boolq'?)", "evaluate --base toy --data toy --tasks bolq"),
    line("evaluate: tasks empty", "a list of tasks without a task", "Invalid value for '--tasks': it names nothing: leave it out, or put commas between names", "evaluate --base toy --data toy --limit 1 --tasks ,"),
    line("evaluate: prompt unknown", "a prompt style that is none", "unknown prompt style 'oficial' (did you mean 'official'?)", "evaluate --base toy --data toy --prompt oficial"),
    line("evaluate: prompt of a protocol", "a prompt beside a protocol that has its own", "protocol official has its own prompt (official): leave --prompt plain out", "evaluate --base toy --data toy --protocol official --prompt plain"),
    line("evaluate: data not there", "a data folder that is not there", "data.path=rows: no such file or folder, and not one of toy, toy-hard", "evaluate --base toy --data rows"),
    line("evaluate: no data", "no data for a bare base", "no data are named: give data.path (--data of evaluate and export) a folder with <task>/train.json, or toy, or set D2MORA_DATA", "evaluate --base toy"),
    line("evaluate: no test rows", "data without test rows", "data/boolq: no test.json or test.json.gz; put it there or leave boolq out (with test files here: none)", "evaluate --base toy --data data", **data(rows())),
    line("evaluate: mixed file", "one mixed file, which has no test rows", "data.path=mixed.json is one file, without test rows of its own: give a folder with one folder a task", "evaluate --base toy --data mixed.json", **{"mixed.json": rows()}),
    line("evaluate: base not there", "a base folder that is not there", "base './base' cannot be loaded: there is no such folder", "evaluate --base ./base --data toy"),
    line("evaluate: one output for two", "one output for two targets", "--output is for one DIR: several would overwrite each other", "evaluate one two --output out"),
    line("evaluate: output a file", "an output that is a file", "out/.lock cannot be written (… MiB free on its disk): …; what was written before is untouched: make room, or make it writable, and give the command again (train and demo: with --resume)", "evaluate --base toy --data toy --tasks boolq --limit 1 --output out", **FILE),
    line("evaluate: output not writable", "an output where nothing can be made", "/proc/run/.lock cannot be written (… MiB free on its disk): …; what was written before is untouched: make room, or make it writable, and give the command again (train and demo: with --resume)", "evaluate --base toy --data toy --tasks boolq --limit 1 --output /proc/run"),
    line("evaluate: ask an empty question", "an empty question", "--ask has no question: put it in quotes behind --ask", "evaluate --base toy --ask ''"),
    line("demo: unknown key", "a key that no recipe has", "unknown key data.cutof (did you mean 'data.cutoff'?)", "demo data.cutof=3 --output out"),
    line("demo: output exists", "an output that holds a run", "output 'out' already holds a run (adapter): name another folder, or go on with --resume", "demo --output out", **FULL),
    line("demo: output a file", "an output that is a file", "output 'out' is a file: name a folder", "demo --output out", **FILE),
    line("compare: no output", "no output folder", "Missing option '--output'.", "compare demo"),
    line("compare: output a file", "an output that is a file", "out/.lock cannot be written (… MiB free on its disk): …; what was written before is untouched: make room, or make it writable, and give the command again (train and demo: with --resume)", "compare demo --methods d2mora --seeds 0 --learning-rates 1e-3 --output out", **FILE),
    line("compare: method unknown", "a method that is none", "unknown method 'lorra' (did you mean 'lora'?)", "compare demo --methods lorra --output out"),
    line("compare: method twice", "a method named twice", "methods lora, lora: each may stand there once", "compare demo --methods lora,lora --seeds 0 --output out"),
    line("compare: no methods", "no method", "nothing to compare: name at least one method", "compare demo --methods , --output out"),
    line("compare: seed a word", "a seed that is a word", "'one' is not a list of whole numbers with commas between", "compare demo --seeds one --output out"),
    line("compare: seed negative", "a negative seed", "seed=-1: give a whole number of at least 0 and below 4294967296", "compare demo --seeds -1 --output out"),
    line("compare: seed twice", "a seed named twice", "seeds 0, 0: each may stand there once", "compare demo --seeds 0,0 --output out"),
    line("compare: seed reserved", "the seed that chooses learning rates", "seed 1000 is the one that learning rates are chosen with: take another", "compare demo --seeds 0,1000 --output out"),
    line("compare: rate a word", "a learning rate that is a word", "'fast' is not a list of numbers with commas between", "compare demo --learning-rates fast --output out"),
    line("compare: rate negative", "a negative learning rate", "learning rate=-0.001: give a number of at least 1e-12", "compare demo --learning-rates -1e-3 --output out"),
    line("compare: rate nan", "a learning rate that is not a number", "learning rate=nan: give a number of at least 1e-12", "compare demo --learning-rates nan --output out"),
    line("compare: budget unknown", "a budget that is none", "unknown budget 'same' (there are: equal, paper)", "compare demo --budget same --output out"),
    line("compare: protocol unknown", "a protocol that is none", "unknown protocol 'choise' (did you mean 'choice'?)", "compare demo --protocols choise --output out"),
    line("compare: no protocols", "no protocol", "nothing to compare: name at least one protocol", "compare demo --protocols , --seeds 0 --methods d2mora --output out"),
    line("compare: limit zero", "no rows to grade", "limit=0: give a whole number of at least 1", "compare demo --limit 0 --output out"),
    line("compare: LoRA recipe", "a recipe of another method", "adapter.peft_type=LORA: methods are sized after a D2MORA adapter; name such a recipe", "compare lora-r64 base=toy data.path=toy --output out"),
    line("compare: no test rows", "data without test rows", "./data/boolq: no test.json or test.json.gz; put it there or leave boolq out (with test files here: none)", "compare demo data.path=data data.tasks=[boolq] --methods d2mora --seeds 0 --learning-rates 1e-3 --output out", **data(rows())),
    line("compare: single tasks by epochs", "single tasks where the steps are not known", "single tasks need training.max_steps: each task gets its share of them", "compare own.yaml --single-task --output out", **{"own.yaml": recipe(training={"num_train_epochs": 1, "use_cpu": True})}),
    line("export: no folder", "no folder to make", "Missing argument 'DIR'.", "export run"),
    line("export: not there", "a run that is not there", "'no-run' holds no adapter to export: name a finished run, or a folder with adapter_config.json", "export no-run out"),
    line("export: exists", "a folder that is there already", "'out' exists: name a folder that is not there yet", "export run out", run=run(), **FULL),
    line("export: into a file", "a folder inside a file", "out/.lora.tmp/.lock cannot be written (… MiB free on its disk): …; what was written before is untouched: make room, or make it writable, and give the command again (train and demo: with --resume)", "export run out/lora --tasks boolq --rows 1 --limit 1", run=run(), **FILE),
    line("export: not writable", "a folder where nothing can be made", "/proc/.lora.tmp/.lock cannot be written (… MiB free on its disk): …; what was written before is untouched: make room, or make it writable, and give the command again (train and demo: with --resume)", "export run /proc/lora --tasks boolq --rows 1 --limit 1", run=run()),
    line("export: rank zero", "no rank", "rank=0: give a whole number of at least 1", "export run out --rank 0", run=run()),
    line("export: rank too large", "a rank that the adapter does not have", "rank 99 is more than this adapter has: min(M, N) · r = 9; give 1 to 9", "export run out --rank 99", run=run()),
    line("export: form unknown", "a form that is none", "form 'avrage' is unknown (there are: mean, fitted)", "export run out --form avrage", run=run()),
    line("export: form not made", "the distilled form without distilling", "form 'distilled' needs steps: add --distill 100", "export run out --form distilled", run=run()),
    line("export: steps negative", "fewer than no steps", "distill=-5: give a whole number of at least 0", "export run out --distill -5", run=run()),
    line("export: rate negative", "a negative learning rate", "learning_rate=-1.0: give a number of at least 1e-12", "export run out --distill 5 --learning-rate -1", run=run()),
    line("export: rate nan", "a learning rate that is not a number", "learning_rate=nan: give a number of at least 1e-12", "export run out --distill 5 --learning-rate nan", run=run()),
    line("export: rows zero", "no rows to calibrate on", "rows=0: give a whole number of at least 1", "export run out --rows 0", run=run()),
    line("export: task unknown", "a task that is none of the eight", "unknown task 'bolq' (did you mean 'boolq'?)", "export run out --tasks bolq", run=run()),
    line("export: tasks empty", "a list of tasks without a task", "Invalid value for '--tasks': it names nothing: leave it out, or put commas between names", "export run out --tasks , --rows 1 --limit 1", run=run()),
    line("export: data not there", "a data folder that is not there", "data.path=rows: no such file or folder, and not one of toy, toy-hard", "export run out --data rows", run=run()),
    line("export: a LoRA", "a LoRA, which is one already", "lora/adapter_config.json: LORA has no expert_dropout, num_down_experts, num_up_experts, orthogonality_weight, pairing in PEFT …: install the version that saved it (…), or a newer one", "export lora out", lora=adapter({"peft_type": "LORA"})),
    line("export: unfinished run", "a run without an adapter yet", "'run' holds no adapter to export: name a finished run, or a folder with adapter_config.json", "export run out", run=run(lambda f: shutil.rmtree(f / "adapter"))),
]


# ---- data ----
DATA = "d2mora train demo data.path=data data.tasks=[boolq] training.max_steps=1 --output out"
TEST = "d2mora evaluate --base toy --data data --tasks boolq --limit 2"


def bad(id, wrong, says, content, name="train.json", given=DATA, **more): return Case(f"data: {id}", wrong, given, says, data(content, name, **more))


GOOD_ROWS = "read_task('good', 'boolq', 'train').to_list()"


def odd(id, wrong, content, name="train.json"): return Case(f"data: accepted: {id}", wrong, "read_task('data', 'boolq', 'train').to_list()", "accepted", {**data(content, name), "good/boolq/train.json": rows()}, GOOD_ROWS)


FILES = [
    bad("empty file", "a file of no bytes", "./data/boolq/train.json: not JSON: …; mend the file or leave its task out of data.tasks", ""),
    bad("only spaces", "a file of spaces", "./data/boolq/train.json: not JSON: …; mend the file or leave its task out of data.tasks", " \n \n"),
    bad("no rows", "a list without rows", "./data/boolq/train.json: is not an array with rows; mend the file or leave its task out of data.tasks", "[]"),
    bad("a mapping", "one mapping instead of a list", "./data/boolq/train.json: is not an array with rows; mend the file or leave its task out of data.tasks", '{"a": 3}'),
    bad("a mapping of rows", "rows under a key", "./data/boolq/train.json: is not an array with rows; mend the file or leave its task out of data.tasks", json.dumps({"data": ROWS})),
    bad("a number", "a number instead of a list", "./data/boolq/train.json: is not an array with rows; mend the file or leave its task out of data.tasks", "7"),
    bad("a text", "a text instead of a list", "./data/boolq/train.json: is not an array with rows; mend the file or leave its task out of data.tasks", '"rows"'),
    bad("rows are texts", "texts instead of rows", "./data/boolq/train.json: row 0 is not an object with fields; mend the file or leave its task out of data.tasks", '["a", "b"]'),
    bad("rows are lists", "lists instead of rows", "./data/boolq/train.json: row 0 is not an object with fields; mend the file or leave its task out of data.tasks", "[[1, 2], [3, 4]]"),
    bad("a row is nothing", "null among the rows", "./data/boolq/train.json: row 4 is not an object with fields; mend the file or leave its task out of data.tasks", rows()[:-1] + ", null]"),
    bad("cut off", "the end is missing", "./data/boolq/train.json: not JSON: …; mend the file or leave its task out of data.tasks", rows()[:-40]),
    bad("text behind", "a word behind the last bracket", "./data/boolq/train.json: not JSON: …; mend the file or leave its task out of data.tasks", rows() + " done"),
    bad("comma behind", "a comma behind the last row", "./data/boolq/train.json: not JSON: …; mend the file or leave its task out of data.tasks", rows()[:-1] + ",]"),
    bad("single quotes", "Python's quotes instead of JSON's", "./data/boolq/train.json: not JSON: …; mend the file or leave its task out of data.tasks", str(ROWS)),
    bad("comment", "a comment in JSON", "./data/boolq/train.json: not JSON: …; mend the file or leave its task out of data.tasks", "// rows\n" + rows()),
    bad("UTF-16", "saved as UTF-16", "./data/boolq/train.json: cannot be read: …; mend the file or leave its task out of data.tasks", rows().encode("utf-16")),
    bad("Latin-1", "saved as Latin-1", "./data/boolq/train.json: cannot be read: …; mend the file or leave its task out of data.tasks", rows({"instruction": "é " + ROWS[0]["instruction"]}).replace("\\u00e9", "é").encode("latin-1")),
    bad("NUL", "a NUL between rows", "./data/boolq/train.json: not JSON: …; mend the file or leave its task out of data.tasks", rows().replace("}, {", "},\0 {")),
    bad("binary", "weights instead of rows", "./data/boolq/train.json: cannot be read: …; mend the file or leave its task out of data.tasks", bytes(range(256)) * 64),
    bad("nested", "brackets a hundred thousand deep", "./data/boolq/train.json: is nested too deeply to be an array of rows; mend the file or leave its task out of data.tasks", "[" * 100_000 + "]" * 100_000),
    bad("nested field", "a field that is a tree", "./data/boolq/train.json: row 0: field 'instruction' is not a text: {'a': {'b': 'c'}}; mend the file or leave its task out of data.tasks", rows({"instruction": {"a": {"b": "c"}}})),
    bad("NaN", "NaN for a text", "./data/boolq/train.json: row 0: field 'output' is not a text: nan; mend the file or leave its task out of data.tasks", rows({"output": float("nan")})),
    bad("field missing", "a row without its answer", "./data/boolq/train.json: row 1: field 'answer' is missing", rows({}, {"answer": None})),
    bad("no instruction", "rows without instruction", "./data/boolq/train.json: row 0: the field instruction is missing; mend the file or leave its task out of data.tasks", json.dumps([{"question": "is it so?", "answer": "true"}])),
    bad("field null", "an answer that is null", "./data/boolq/train.json: row 0: field 'answer' is not a text: None; mend the file or leave its task out of data.tasks", rows().replace('"answer": "', '"answer": null, "was": "', 1)),
    bad("field empty", "an empty question", "./data/boolq/train.json: row 0: field 'instruction' is not a text: ''", rows({"instruction": ""})),
    bad("field a number", "an output that is a number", "./data/boolq/train.json: row 1: field 'output' is not a text: 3; mend the file or leave its task out of data.tasks", rows({}, {"output": 3})),
    bad("all numbers", "outputs that are all numbers", "./data/boolq/train.json: row 0: field 'output' is not a text: 3; mend the file or leave its task out of data.tasks", rows(*[{"output": 3}] * 4)),
    bad("field a list", "a question that is a list", "./data/boolq/train.json: row 0: field 'instruction' is not a text: ['is it so?']; mend the file or leave its task out of data.tasks", rows({"instruction": ["is it so?"]})),
    bad("input a number", "an input that is a number", "./data/boolq/train.json: row 0: field 'input' is not a text: 3; mend the file or leave its task out of data.tasks", rows(*[{"input": 3}] * 4)),
    bad("answer true", "true instead of the word true", "./data/boolq/train.json: row 0: field 'answer' is not a text: True; mend the file or leave its task out of data.tasks", rows({"answer": True})),
    bad("answer unknown", "an answer that is not offered", "./data/boolq/train.json: row 2: field 'answer' is 'yes', not one of true/false", rows({}, {}, {"answer": "yes"})),
    bad("answer in capitals", "an answer in other letters", "./data/boolq/train.json: row 0: field 'answer' is 'TRUE', not one of true/false", rows({"answer": "TRUE"})),
    bad("answer of another task", "an answer of another task", "./data/boolq/train.json: row 0: field 'answer' is 'option1', not one of true/false", rows({"answer": "option1", "output": "the correct answer is option1"})),
    bad("output contradicts", "an output with another answer", "./data/boolq/train.json: row 0: field 'output' does not contain the answer 'false' first: 'the correct answer is true'", rows({"output": "the correct answer is " + {"true": "false", "false": "true"}[ROWS[0]["answer"]]})),
    bad("output without answer", "an output without any answer", "./data/boolq/train.json: row 0: field 'output' does not contain the answer 'false' first: 'who knows'", rows({"output": "who knows"})),
    bad("huge line", "an output of sixty thousand words, no room left for the question", "a limit of 127 tokens leaves no room for a prompt before the answer 'word word word word word word word word ': raise data.cutoff", rows({"output": "word " * 60_000 + ROWS[0]["output"]})),
    bad("columns differ", "numbers and texts in one field", "./data/boolq/train.json: row 0: field 'instruction' is not a text: 3; mend the file or leave its task out of data.tasks", rows({"instruction": 3})),
    bad("gz cut off", "a gzip file that ends too early", "./data/boolq/train.json.gz: cannot be read: …; mend the file or leave its task out of data.tasks", gz(rows())[:-30], "train.json.gz"),
    bad("gz damaged", "a gzip file with a wrong byte", "./data/boolq/train.json.gz: cannot be read: …; mend the file or leave its task out of data.tasks", bytes(b ^ 255 if i == 60 else b for i, b in enumerate(gz(rows()))), "train.json.gz"),
    bad("gz that is none", "JSON named .gz", "./data/boolq/train.json.gz: cannot be read: …; mend the file or leave its task out of data.tasks", rows(), "train.json.gz"),
    bad("gz of nothing", "a gzip file of nothing", "./data/boolq/train.json.gz: not JSON: …; mend the file or leave its task out of data.tasks", gz(""), "train.json.gz"),
    bad("gz empty", "a gzip file of no bytes", "./data/boolq/train.json.gz: not JSON: …; mend the file or leave its task out of data.tasks", b"", "train.json.gz"),
    bad("JSON that is gz", "gzip named .json", "./data/boolq/train.json: cannot be read: …; mend the file or leave its task out of data.tasks", gz(rows())),
    bad("JSON lines", "one row a line instead of one list", "./data/boolq/train.json: not JSON: …; mend the file or leave its task out of data.tasks", "".join(json.dumps(row) + "\n" for row in ROWS)),
    bad("another archive", "a zip file", "./data/boolq/train.json.gz: cannot be read: …; mend the file or leave its task out of data.tasks", b"PK\x03\x04" + bytes(60), "train.json.gz"),
    bad("no such task", "a folder without the task", "./data/boolq: no train.json or train.json.gz; put it there or leave boolq out (with train files here: none)", rows(), "test.json"),
    bad("wrong folder", "a file where the task's folder belongs", "./data/piqa: no train.json or train.json.gz; put it there or leave piqa out (with train files here: boolq)", rows(), given="d2mora train demo data.path=data data.tasks=[piqa] --output out", **{"data/piqa": "x"}),
    bad("a folder for the file", "a folder named train.json", "./data/boolq: no train.json or train.json.gz; put it there or leave boolq out (with train files here: none)", "x", "train.json/x"),
    Case("data: mixed: unknown rows", "a row of none of the eight tasks in a mixed file", "d2mora train demo data.path=mixed.json data.tasks=[boolq] --output out", "./mixed.json: row 0: field 'instruction' belongs to none of the eight tasks", {"mixed.json": rows({"instruction": "Say something."})}),
    Case("data: mixed: inseparable", "tasks that a mixed file cannot tell apart", "d2mora train demo data.path=mixed.json data.tasks=[ARC-Easy] --output out", "./mixed.json: in one file the rows of ARC-Easy, ARC-Challenge, openbookqa cannot be told apart: name all three in data.tasks or none, or use a folder with one folder a task", {"mixed.json": rows()}),
    Case("data: mixed: none wanted", "a mixed file without the task", "d2mora train demo data.path=mixed.json data.tasks=[piqa] --output out", "./mixed.json: no rows of piqa: leave them out of data.tasks (there are: boolq)", {"mixed.json": rows()}),
    Case("data: mixed: empty", "a mixed file without rows", "d2mora train demo data.path=mixed.json data.tasks=[boolq] --output out", "./mixed.json: is not an array with rows; mend the file or leave its task out of data.tasks", {"mixed.json": "[]"}),
    bad("test cut off", "test rows whose end is missing", "data/boolq/test.json: not JSON: …; mend the file or leave its task out of data.tasks", rows()[:-40], "test.json", TEST),
    bad("test answer unknown", "test rows with an answer that is not offered", "data/boolq/test.json: row 0: field 'answer' is 'yes', not one of true/false", rows({"answer": "yes"}), "test.json", TEST),
    bad("test no rows", "no test rows", "data/boolq/test.json: is not an array with rows; mend the file or leave its task out of data.tasks", "[]", "test.json", TEST),
    odd("BOM", "a byte-order mark at its beginning", codecs.BOM_UTF8 + rows().encode()),
    odd("CRLF", "lines ended as on Windows", json.dumps(json.loads(rows()), indent=1).replace("\n", "\r\n").encode()),
    odd("gzipped", "gzipped", gz(rows()), "train.json.gz"),
    odd("key order", "fields in another order", json.dumps([dict(reversed(row.items())) for row in ROWS])),
    odd("more fields", "a field that nobody needs", rows(*[{"source": "x"}] * 4)),
    odd("escapes", "letters written as \\u escapes", rows().replace("question", "\\u0071uestion")),
    odd("duplicate keys", "the same key twice in a row: the last one counts", rows().replace('"input": ""', '"input": "", "answer": "maybe"', 1)),
]


# ---- adapters ----
GRADE = "d2mora evaluate adapter --data toy --tasks boolq --limit 2"


def folder(id, wrong, says, made, given=GRADE, **more): return Case(f"adapter: {id}", wrong, given, says, {"adapter": made, **more})


LAYER = "layers.0.self_attn.q_proj"
ADAPTERS = [
    folder("empty", "an empty folder", "'adapter' holds no adapter: there is no adapter_config.json and no recipe.yaml", lambda f: f.mkdir()),
    folder("no configuration", "weights without configuration", "'adapter' holds no adapter: there is no adapter_config.json and no recipe.yaml", adapter(drop=("adapter_config.json",))),
    folder("no weights", "configuration without weights", "'adapter' holds adapter_config.json, but no adapter_model.safetensors: copy the whole folder", adapter(drop=("adapter_model.safetensors",))),
    folder("configuration empty", "a configuration of no bytes", "adapter/adapter_config.json is no JSON: …: copy the adapter's folder again", adapter("")),
    folder("configuration cut off", "a configuration whose end is missing", "adapter/adapter_config.json is no JSON: …: copy the adapter's folder again", adapter('{"peft_type": "D2MORA", "r": 3')),
    folder("configuration a list", "a configuration that is a list", "adapter/adapter_config.json: it holds no keys and values: copy the adapter's folder again", adapter("[1, 2]")),
    folder("configuration a number", "a configuration that is a number", "adapter/adapter_config.json: it holds no keys and values: copy the adapter's folder again", adapter("7")),
    folder("configuration UTF-16", "a configuration saved as UTF-16", "adapter/adapter_config.json is no JSON: …: copy the adapter's folder again", adapter('{"peft_type": "D2MORA"}'.encode("utf-16"))),
    folder("configuration with BOM", "a byte-order mark before the configuration, which PEFT cannot read", "adapter/adapter_config.json is no JSON: …: copy the adapter's folder again", adapter(codecs.BOM_UTF8 + (ADAPTER / "adapter_config.json").read_bytes())),
    folder("configuration nested", "a configuration of brackets a hundred thousand deep", "adapter/adapter_config.json is no JSON: …: copy the adapter's folder again", adapter("[" * 100_000 + "]" * 100_000)),
    folder("no method", "a configuration without its method", "adapter/adapter_config.json: peft_type=None is no method of PEFT … (there are: …)", adapter({"peft_type": "drop"})),
    folder("method unknown", "a method that PEFT does not have", "adapter/adapter_config.json: peft_type='D3MORA' is no method of PEFT … (did you mean 'D2MORA'?)", adapter({"peft_type": "D3MORA"})),
    folder("method a list", "a method that is a list", "adapter/adapter_config.json: peft_type=['D2MORA'] is no method of PEFT … (did you mean 'D2MORA'?)", adapter({"peft_type": ["D2MORA"]})),
    folder("another method", "the configuration of another method", "adapter/adapter_config.json: IA3 has no expert_dropout, lora_alpha, num_down_experts, num_up_experts, orthogonality_weight, pairing, r in PEFT …: install the version that saved it (…), or a newer one", adapter({"peft_type": "IA3", "feedforward_modules": []})),
    folder("a LoRA's configuration", "a LoRA's configuration beside our weights", "adapter 'adapter' does not fit base 'toy': it lacks 6 tensors of 6, the first is base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight: copy the whole file, or take the configuration that it was saved with", adapter(json.dumps({"peft_type": "LORA", "r": 3, "target_modules": ["q_proj"], "base_model_name_or_path": "toy", "task_type": "CAUSAL_LM"}))),
    folder("future field", "a field that a later version may have", "adapter/adapter_config.json: D2MORA has no top_k in PEFT …: install the version that saved it (…), or a newer one", adapter({"top_k": 2})),
    folder("rank a text", "a rank that is a text", "adapter/adapter_config.json: r='3': give a whole number of at least 1 and below 65536", adapter({"r": "3"})),
    folder("rank zero", "no rank", "adapter/adapter_config.json: r=0: give a whole number of at least 1 and below 65536", adapter({"r": 0})),
    folder("another rank", "another rank than the weights have", "adapter/adapter_model.safetensors: base_model.model.model.layers.0.mlp.down_proj.d2mora_A.weight has shape [9, 320], but adapter_config.json says num_down_experts=3, r=4: one of them is not this adapter's", adapter({"r": 4})),
    folder("more experts", "more experts than the weights have", "adapter/adapter_model.safetensors: base_model.model.model.layers.0.mlp.down_proj.d2mora_B.weight has shape [24, 128], but adapter_config.json says num_up_experts=9, r=3: one of them is not this adapter's", adapter({"num_up_experts": 9})),
    folder("another pairing", "a pairing without routers", "adapter/adapter_config.json: pairing='one-to-many' does not fit num_down_experts=3, num_up_experts=8: it needs num_down_experts=1", adapter({"pairing": "one-to-many"})),
    folder("pairing unknown", "a pairing that is none", "adapter/adapter_config.json: pairing='many' is unknown (did you mean 'one-to-many'?)", adapter({"pairing": "many"})),
    folder("targets fewer", "fewer target layers than the weights have", "adapter 'adapter' does not fit base 'toy': 72 of its 84 tensors have no place here, the first is base_model.model.model.layers.0.mlp.down_proj.d2mora_A.weight: take the base and the configuration that it was trained with", adapter({"target_modules": ["q_proj"]})),
    folder("targets more", "more target layers than the weights have", "adapter 'adapter' does not fit base 'toy': it lacks 4 tensors of 88, the first is base_model.model.lm_head.d2mora_A.weight: copy the whole file, or take the configuration that it was saved with", adapter({"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]})),
    folder("targets not there", "target layers that the base lacks", "adapter 'adapter' does not fit base 'toy': target_modules=['c_attn'] match no layer of LlamaForCausalLM (linear layers here: down_proj, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj)", adapter({"target_modules": ["c_attn"]})),
    folder("no base", "no base named", "'adapter' does not name its base: give it by --base", adapter({"base_model_name_or_path": None})),
    folder("base a number", "a base that is a number", "adapter/adapter_config.json: base_model_name_or_path=7 is not a text", adapter({"base_model_name_or_path": 7})),
    folder("base not there", "a base folder that is not there", "base './base' cannot be loaded: there is no such folder", adapter({"base_model_name_or_path": "./base"})),
    folder("another base", "a base of other sizes", "adapter 'adapter' does not fit base './base': size mismatch for …", adapter(), GRADE + " --base ./base", base=another_base),
    folder("weights empty", "weights of no bytes", "adapter/adapter_model.safetensors cannot be read: …: copy the adapter's folder again", adapter(cut=-10**9)),
    folder("weights cut off", "weights whose end is missing", "adapter/adapter_model.safetensors cannot be read: …: copy the adapter's folder again", adapter(cut=300_000)),
    folder("weights cut in the header", "weights that end in their header", "adapter/adapter_model.safetensors cannot be read: …: copy the adapter's folder again", adapter(cut=100)),
    folder("weights no safetensors", "a text named .safetensors", "adapter/adapter_model.safetensors cannot be read: …: copy the adapter's folder again", lambda f: (adapter()(f), (f / "adapter_model.safetensors").write_text("weights"))),
    folder("header too long", "a header that claims more bytes than there are", "adapter/adapter_model.safetensors cannot be read: …: copy the adapter's folder again", lambda f: (adapter()(f), (f / "adapter_model.safetensors").write_bytes((2**40).to_bytes(8, "little") + b"{}"))),
    folder("a pickle", "a pickle named .safetensors", "adapter/adapter_model.safetensors cannot be read: …: copy the adapter's folder again", lambda f: (adapter()(f), torch.save({"a": torch.ones(2)}, f / "adapter_model.safetensors"))),
    folder("tensor missing", "one layer's A missing", "adapter 'adapter' does not fit base 'toy': it lacks 1 tensors of 84, the first is base_model.model.model.layers.0.self_attn.q_proj.d2mora_A.weight: copy the whole file, or take the configuration that it was saved with", adapter(change=tensors(f"{LAYER}.d2mora_A", lambda t: None))),
    folder("router missing", "one layer's router missing", "adapter 'adapter' does not fit base 'toy': it lacks 1 tensors of 84, the first is base_model.model.model.layers.0.self_attn.q_proj.d2mora_router_up.weight: copy the whole file, or take the configuration that it was saved with", adapter(change=tensors(f"{LAYER}.d2mora_router_up", lambda t: None))),
    folder("layer missing", "a whole layer missing", "adapter 'adapter' does not fit base 'toy': it lacks 4 tensors of 84, the first is base_model.model.model.layers.0.self_attn.q_proj.d2mora_A.weight: copy the whole file, or take the configuration that it was saved with", adapter(change=tensors(LAYER, lambda t: None))),
    folder("all missing", "no tensors at all", "adapter 'adapter' does not fit base 'toy': it lacks 84 tensors of 84, the first is base_model.model.model.layers.0.mlp.down_proj.d2mora_A.weight: copy the whole file, or take the configuration that it was saved with", adapter(change=lambda held: {})),
    folder("tensor extra", "a tensor that belongs nowhere", "adapter 'adapter' does not fit base 'toy': 1 of its 85 tensors have no place here, the first is base_model.model.model.layers.9.self_attn.q_proj.d2mora_A.weight: take the base and the configuration that it was trained with", adapter(change=lambda held: held | {"base_model.model.model.layers.9.self_attn.q_proj.d2mora_A.weight": torch.ones(9, 64)})),
    folder("names of another", "names of another library", "adapter 'adapter' does not fit base 'toy': it lacks 84 tensors of 84, the first is base_model.model.model.layers.0.mlp.down_proj.d2mora_A.weight: copy the whole file, or take the configuration that it was saved with", adapter(change=lambda held: {k.replace("base_model.model.", "transformer."): v for k, v in held.items()})),
    folder("shape wrong", "one tensor turned on its side", "adapter/adapter_model.safetensors: base_model.model.model.layers.0.mlp.down_proj.d2mora_A.weight has shape [320, 9], but adapter_config.json says num_down_experts=3, r=3: one of them is not this adapter's", adapter(change=first(lambda t: t.T))),
    folder("shape flat", "one tensor flattened", "adapter/adapter_model.safetensors: base_model.model.model.layers.0.mlp.down_proj.d2mora_A.weight has shape [2880], but adapter_config.json says num_down_experts=3, r=3: one of them is not this adapter's", adapter(change=first(lambda t: t.flatten()))),
    folder("whole numbers", "weights rounded to whole numbers", "adapter/adapter_model.safetensors: base_model.model.model.layers.0.mlp.down_proj.d2mora_B.weight holds torch.int32, not numbers with a fraction: take an earlier checkpoint, or train again", adapter(change=tensors("d2mora_B", lambda t: t.to(torch.int32)))),
    folder("booleans", "weights that are true and false", "adapter/adapter_model.safetensors: base_model.model.model.layers.0.mlp.down_proj.d2mora_A.weight holds torch.bool, not numbers with a fraction: take an earlier checkpoint, or train again", adapter(change=first(lambda t: t > 0))),
    folder("complex", "complex weights", "adapter/adapter_model.safetensors: base_model.model.model.layers.0.mlp.down_proj.d2mora_A.weight holds torch.complex64, not numbers with a fraction: take an earlier checkpoint, or train again", adapter(change=first(lambda t: t.to(torch.complex64)))),
    folder("NaN", "one weight that is not a number", "adapter/adapter_model.safetensors: base_model.model.model.layers.0.mlp.down_proj.d2mora_A.weight holds NaN or infinity: take an earlier checkpoint, or train again", adapter(change=first(poisoned(float("nan"))))),
    folder("infinity", "one infinite weight", "adapter/adapter_model.safetensors: base_model.model.model.layers.0.mlp.down_proj.d2mora_A.weight holds NaN or infinity: take an earlier checkpoint, or train again", adapter(change=first(poisoned(float("inf"))))),
    folder("NaN to export", "one weight that is not a number, to export", "adapter/adapter_model.safetensors: base_model.model.model.layers.0.mlp.down_proj.d2mora_A.weight holds NaN or infinity: take an earlier checkpoint, or train again", adapter(change=first(poisoned(float("nan")))), "d2mora export adapter out --data toy --tasks boolq --rows 2 --limit 2"),
    folder("tensor missing to export", "one layer's B missing, to export", "adapter 'adapter' does not fit base 'toy': it lacks 1 tensors of 84, the first is base_model.model.model.layers.0.self_attn.q_proj.d2mora_B.weight: copy the whole file, or take the configuration that it was saved with", adapter(change=tensors(f"{LAYER}.d2mora_B", lambda t: None)), "d2mora export adapter out --data toy --tasks boolq --rows 2 --limit 2"),
    folder("configuration cut off to export", "a configuration whose end is missing, to export", "adapter/adapter_config.json is no JSON: …: copy the adapter's folder again", adapter('{"peft_type": "D2MORA", "r": 3'), "d2mora export adapter out --data toy"),
    folder("asked with NaN", "one weight that is not a number, asked a question", "adapter/adapter_model.safetensors: base_model.model.model.layers.0.mlp.down_proj.d2mora_A.weight holds NaN or infinity: take an earlier checkpoint, or train again", adapter(change=first(poisoned(float("nan")))), "d2mora evaluate adapter --ask hello"),
    Case("adapter: run without recipe", "a run whose recipe is empty", "d2mora evaluate run --tasks boolq --limit 2", "run/recipe.yaml: not a recipe: it needs base, adapter, data and training", {"run": run(write("recipe.yaml", ""))}),
    Case("adapter: run unfinished", "a run without an adapter yet", "d2mora evaluate run --tasks boolq --limit 2", "'run' holds no adapter: its run is unfinished", {"run": run(lambda f: shutil.rmtree(f / "adapter"))}),
    Case("adapter: base without weights", "a base without weights", "d2mora evaluate --base ./base --data toy --tasks boolq --limit 2", "base './base' cannot be loaded: …; give a hub name or a folder with config.json, weights and tokenizer.json", {"base": base(lambda f: (f / "model.safetensors").unlink())}),
    Case("adapter: base cut off", "a base whose weights end too early", "d2mora evaluate --base ./base --data toy --tasks boolq --limit 2", "base './base' cannot be loaded: …; give a hub name or a folder with config.json, weights and tokenizer.json", {"base": base(lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:5000]))}),
    Case("adapter: base configuration damaged", "a base whose configuration is damaged", "d2mora evaluate --base ./base --data toy --tasks boolq --limit 2", "base './base' cannot be loaded: …; give a hub name or a folder with config.json, weights and tokenizer.json", {"base": base(write("config.json", "{"))}),
    Case("adapter: base without tokenizer", "a base without tokenizer", "d2mora evaluate --base ./base --data toy --tasks boolq --limit 2", "base './base' cannot be loaded: …; give a hub name or a folder with config.json, weights and tokenizer.json", {"base": base(lambda f: [p.unlink() for p in f.glob("*token*")])}),
    Case("adapter: accepted: half precision", "saved in bfloat16", "graded('adapter')", "accepted", {"adapter": adapter(change=tensors("", lambda t: t.bfloat16())), "plain": adapter(change=tensors("", lambda t: t.bfloat16().float()))}, "graded('plain')"),
    Case("adapter: accepted: tensors in another order", "tensors in another order", "graded('adapter')", "accepted", {"adapter": adapter(change=lambda held: dict(reversed(held.items()))), "plain": adapter()}, "graded('plain')"),
]


def graded(folder: str) -> list:
    "What an adapter answers, with its scores."
    from d2mora.evaluate import load_target
    from d2mora.scoring import grade_rows
    model, tokenizer, _ = load_target(folder)
    return grade_rows(model, tokenizer, "boolq", toy_rows("toy", "boolq", "test")[:4])


# ---- results of earlier calls ----
AGAIN = "d2mora evaluate adapter --data toy --tasks boolq --limit 2"
LINES = "".join(json.dumps({"task": "boolq", "row": i, "hash": f"{i:016x}", "answer": "true", "predicted": "true", "right": True, "settings": "0" * 12}) + "\n" for i in range(3))
TWO = "d2mora evaluate one two --limit 2 --tasks boolq"


def earlier(id, wrong, says, given=AGAIN, **files): return Case(f"results: {id}", wrong, given, says, files)


RESULTS = [
    earlier("not JSON", "earlier rows that are not JSON", "adapter/evaluation-choice.jsonl: line 1 holds no hash: move the file away, or make it again (evaluate: --again)", adapter=lambda f: (adapter()(f), write("evaluation-choice.jsonl", "{}\nrows\n{}\n")(f))),
    earlier("not rows", "earlier rows that are numbers", "adapter/evaluation-choice.jsonl: line 1 holds no hash: move the file away, or make it again (evaluate: --again)", adapter=lambda f: (adapter()(f), write("evaluation-choice.jsonl", "1\n2\n")(f))),
    earlier("without hash", "earlier rows without their hash", "adapter/evaluation-choice.jsonl: line 1 holds no hash: move the file away, or make it again (evaluate: --again)", adapter=lambda f: (adapter()(f), write("evaluation-choice.jsonl", "{}\n")(f))),
    earlier("other settings", "earlier rows of another model", "adapter/evaluation-choice.jsonl: holds results of another run or other settings: grade with --again (these are kept in a folder earlier-N), or into another --output", adapter=lambda f: (adapter()(f), write("evaluation-choice.jsonl", LINES)(f))),
    earlier("UTF-16", "earlier rows saved as UTF-16", "adapter/evaluation-choice.jsonl: line 1 is no JSON: move the file away, or make it again (evaluate: --again)", adapter=lambda f: (adapter()(f), write("evaluation-choice.jsonl", LINES.encode("utf-16"))(f))),
    earlier("metrics damaged", "a run whose log is damaged", "run/metrics.jsonl: line 1 is no JSON: move the file away, or make it again (evaluate: --again)", "d2mora evaluate run --tasks boolq --limit 2", run=run(write("metrics.jsonl", '{"step": 1'))),
    earlier("another protocol's table damaged", "another protocol's table damaged", "run/evaluation-content.json is no JSON: …: move it away, or make it again", "d2mora evaluate run --tasks boolq --limit 2", run=run(write("evaluation-content.json", "{"))),
    earlier("comparison with a damaged run", "a comparison that finds a damaged run", "out/equal/d2mora/seed-0/recipe.yaml: not YAML: …", "d2mora compare demo --methods d2mora --seeds 0 --learning-rates 1e-3 --output out", **{"out/equal/d2mora/seed-0/recipe.yaml": "base: ["}),
    earlier("comparison with a file", "a comparison that finds a file for a run", "out/equal/d2mora/seed-0/.lock cannot be written (… MiB free on its disk): …; what was written before is untouched: make room, or make it writable, and give the command again (train and demo: with --resume)", "d2mora compare demo --methods d2mora --seeds 0 --learning-rates 1e-3 --output out", **{"out/equal": "x"}),
]


# ---- published checkpoints ----
def convert(id, wrong, says, given, same=""): return Case(f"published: {id}", wrong, given, says, same=same)


CALL = "convert_official_checkpoint"
ONE = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
PUBLISHED = [
    convert("empty", "no parameters", "no published D2MoRA parameters (…lora_A.0.weight, …lora_route1.weight) among the keys", f"{CALL}({{}}, 32)"),
    convert("a path", "a file's name instead of its parameters", "state_dict is a str, not tensors by name: read the file first, by torch.load(path, weights_only=True) or safetensors", f"{CALL}('best_model.pth', 32)"),
    convert("a list", "a list instead of names and tensors", "state_dict is a list, not tensors by name: read the file first, by torch.load(path, weights_only=True) or safetensors", f"{CALL}([1, 2], 32)"),
    convert("a plain LoRA", "a LoRA's parameters", "layers.0.q_proj: the checkpoint lacks lora_route1.0, lora_route2.0: is the file complete?", f"{CALL}({{'layers.0.q_proj.lora_A.weight': torch.ones(2, 8), 'layers.0.q_proj.lora_B.weight': torch.ones(8, 2)}}, 32)"),
    convert("unknown keys only", "a base's parameters", "no published D2MoRA parameters (…lora_A.0.weight, …lora_route1.weight) among the keys", f"{CALL}({{'model.layers.0.self_attn.q_proj.weight': torch.ones(8, 8)}}, 32)"),
    convert("unknown part", "a part of a layer that is none", "base_model.model.model.layers.0.self_attn.q_proj.lora_C.0.weight is no published name: …lora_A.0.weight, …lora_B.0.weight, …lora_route1.weight and …lora_route2.weight are", f"{CALL}(published() | {{'{ONE}C.0.weight': torch.ones(2, 8)}}, 32)"),
    convert("index no number", "an expert with a name for a number", "base_model.model.model.layers.0.self_attn.q_proj.lora_A.x.weight is no published name: …lora_A.0.weight, …lora_B.0.weight, …lora_route1.weight and …lora_route2.weight are", f"{CALL}(published() | {{'{ONE}A.x.weight': torch.ones(2, 8)}}, 32)"),
    convert("key no text", "a key that is a number", "state_dict[7] is a Tensor: give tensors by name", f"{CALL}(published() | {{7: torch.ones(2, 8)}}, 32)"),
    convert("value no tensor", "a list where a tensor belongs", "state_dict['base_model.model.model.layers.0.self_attn.q_proj.lora_A.0.weight'] is a list: give tensors by name", f"{CALL}(published() | {{'{ONE}A.0.weight': [[1.0]]}}, 32)"),
    convert("expert missing", "one A missing", "base_model.model.model.layers.0.self_attn.q_proj: the checkpoint lacks lora_A.1: is the file complete?", f"{CALL}({{k: v for k, v in published().items() if k != '{ONE}A.1.weight'}}, 32)"),
    convert("last expert missing", "the last B of one layer missing", "base_model.model.model.layers.0.self_attn.q_proj.lora_route2.weight has shape (4, 2), and the others of its layer ask for (3, 2): is it of another checkpoint?", f"{CALL}({{k: v for k, v in published().items() if k != '{ONE}B.3.weight'}}, 32)"),
    convert("all B missing", "every B missing", "base_model.model.model.layers.0.self_attn.q_proj: the checkpoint lacks its experts: is the file complete?", f"{CALL}({{k: v for k, v in published().items() if '.lora_B.' not in k}}, 32)"),
    convert("router missing", "one router missing", "base_model.model.model.layers.0.self_attn.q_proj: the checkpoint lacks lora_route1.0: is the file complete?", f"{CALL}({{k: v for k, v in published().items() if k != '{ONE}route1.weight'}}, 32)"),
    convert("router twice", "a router with a number", "base_model.model.model.layers.0.self_attn.q_proj.lora_route1.1.weight is no published name: …lora_A.0.weight, …lora_B.0.weight, …lora_route1.weight and …lora_route2.weight are", f"{CALL}(published() | {{'{ONE}route1.1.weight': torch.ones(3, 8)}}, 32)"),
    convert("ranks differ in a layer", "one A of another rank", "base_model.model.model.layers.0.self_attn.q_proj.lora_A.1.weight has shape (2, 8), and the others of its layer ask for (3, 8): is it of another checkpoint?", f"{CALL}(published() | {{'{ONE}A.0.weight': torch.ones(3, 8)}}, 32)"),
    convert("A and B differ", "B of another rank than A", "base_model.model.model.layers.0.self_attn.q_proj.lora_B.0.weight has shape (8, 3), and the others of its layer ask for (8, 2): is it of another checkpoint?", f"{CALL}(published() | {{f'{ONE}B.{{j}}.weight': torch.ones(8, 3) for j in range(4)}}, 32)"),
    convert("router of another size", "a router for more experts than there are", "base_model.model.model.layers.0.self_attn.q_proj.lora_route1.weight has shape (5, 8), and the others of its layer ask for (3, 8): is it of another checkpoint?", f"{CALL}(published() | {{'{ONE}route1.weight': torch.ones(5, 8)}}, 32)"),
    convert("router of another width", "a router that reads another width", "base_model.model.model.layers.0.self_attn.q_proj.lora_route2.weight has shape (4, 7), and the others of its layer ask for (4, 2): is it of another checkpoint?", f"{CALL}(published() | {{'{ONE}route2.weight': torch.ones(4, 7)}}, 32)"),
    convert("flat", "an A without its second dimension", "base_model.model.model.layers.0.self_attn.q_proj.lora_A.0.weight holds torch.float32 of shape (16,), not a matrix of finite fractions: take an earlier or another checkpoint", f"{CALL}(published() | {{'{ONE}A.0.weight': torch.ones(16)}}, 32)"),
    convert("layers differ", "layers of different M", "the layers differ in (M, r, N): (2, 2, 4), (3, 2, 4); one configuration cannot hold them", f"{CALL}(published(layers=1) | {{k.replace('layers.0', 'layers.1'): v for k, v in published(M=2, layers=1).items()}}, 32)"),
    convert("NaN", "a weight that is not a number", "base_model.model.model.layers.0.self_attn.q_proj.lora_A.0.weight holds NaN or infinity, not a matrix of finite fractions: take an earlier or another checkpoint", f"{CALL}(published() | {{'{ONE}A.0.weight': torch.full((2, 8), float('nan'))}}, 32)"),
    convert("whole numbers", "weights that are whole numbers", "base_model.model.model.layers.0.self_attn.q_proj.lora_A.0.weight holds torch.int32 of shape (2, 8), not a matrix of finite fractions: take an earlier or another checkpoint", f"{CALL}({{k: v.int() for k, v in published().items()}}, 32)"),
    convert("no alpha", "a scale that is nothing", "lora_alpha=None: give a number of at least 0", f"{CALL}(published(), None)"),
    convert("alpha nan", "a scale that is not a number", "lora_alpha=nan: give a number of at least 0", f"{CALL}(published(), float('nan'))"),
    
    convert("accepted: shuffled", "keys in another order", "accepted", f"listed({CALL}(published(order=-1), 32))", f"listed({CALL}(published(), 32))"),
    convert("accepted: more keys", "the base's own keys beside them", "accepted", f"listed({CALL}(published() | {{'model.norm.weight': torch.ones(8)}}, 32))", f"listed({CALL}(published(), 32))"),
]


def listed(made: tuple) -> tuple:
    "A configuration and weights, to be compared."
    config, weights = made
    return config.to_dict(), sorted((k, v.tolist()) for k, v in weights.items())


# ---- configurations in Python ----
def setting(id, wrong, says, fields): return Case(f"configuration: {id}", wrong, f"peft.get_peft_model(net(), D2MoraConfig({fields}))", says)


SETTINGS = [
    setting("no targets", "no target layers, and a model that PEFT does not know", "Please specify `target_modules` in `peft_config`", ""),
    setting("rank a text", "a rank that is a text", "r='8': give a whole number of at least 1 and below 65536", "r='8', target_modules=['0']"),
    setting("rank infinite", "an infinite rank", "r=inf: give a whole number of at least 1 and below 65536", "r=float('inf'), target_modules=['0']"),
    setting("rank true", "true for a rank", "r=True: give a whole number of at least 1 and below 65536", "r=True, target_modules=['0']"),
    setting("experts a fraction", "half an expert", "num_up_experts=0.5: give a whole number of at least 1 and below 65536", "num_up_experts=0.5, target_modules=['0']"),
    setting("experts too many", "a million experts", "num_up_experts=1000000: give a whole number of at least 1 and below 65536", "num_up_experts=10**6, target_modules=['0']"),
    setting("dropout negative", "dropout below zero", "lora_dropout=-0.1: give a number of at least 0 and below 1", "lora_dropout=-0.1, target_modules=['0']"),
    setting("dropout a text", "dropout that is a text", "lora_dropout='0.1': give a number of at least 0 and below 1", "lora_dropout='0.1', target_modules=['0']"),
    setting("weight infinite", "an infinite orthogonality weight", "orthogonality_weight=inf: give a number of at least 0", "orthogonality_weight=float('inf'), target_modules=['0']"),
    setting("expert dropout unknown", "an expert dropout that is none", "expert_dropout='both' is unknown (there are: shared, independent)", "expert_dropout='both', target_modules=['0']"),
    setting("targets numbers", "target layers given by number", "target_modules=[0]: give a list of names, or one pattern; leave it out for the usual ones", "target_modules=[0]"),
    setting("targets a mapping", "target layers as keys and values", "target_modules={'0': 8}: give a list of names, or one pattern; leave it out for the usual ones", "target_modules={'0': 8}"),
    setting("target no linear layer", "a normalisation as target", "layer '1': D2MoRA adapts linear layers only, not a normalization.LayerNorm: take it out of target_modules", "target_modules=['1']"),
    setting("pattern broken", "a pattern that is none", "target_modules='[0' is no regular expression (…): mend it, or list the names", "target_modules='[0'"),
    setting("excluded a number", "an exclusion that is a number", "exclude_modules=3: give a list of names, or one pattern; leave it out for the usual ones", "target_modules=['0'], exclude_modules=3"),
    setting("layers a text", "blocks named by a text", "layers_to_transform='first': give a whole number of at least 0", "target_modules=['0'], layers_to_transform='first'"),
    setting("saved a number", "modules to save given as a number", "modules_to_save=3: give a list of names; leave it out for the usual ones", "target_modules=['0'], modules_to_save=3"),
    Case("configuration: merge", "merging what cannot be merged", "peft.get_peft_model(net(), D2MoraConfig(target_modules=['0'])).merge_and_unload()", "D2MoRA cannot be merged: its routers weigh the experts anew for each token, so no single matrix equals them. Use unload() to take the adapter off, or `d2mora export` to make a plain LoRA of it, which merges"),
    Case("configuration: optimizer without experts", "an optimizer that holds no expert", "d2mora.attach_orthogonality(peft.get_peft_model(net(), D2MoraConfig(target_modules=['0'])), torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1))", "the optimizer holds none of the model's experts: make it from the adapted model's parameters"),
    Case("configuration: loss without experts", "the orthogonality loss of a model without experts", "d2mora.orthogonality_loss(net())", "no experts in Sequential: adapt it with a D2MoraConfig, and activate that adapter"),
    Case("configuration: adapter twice", "a second adapter of the same name", "peft.get_peft_model(net(), D2MoraConfig(target_modules=['0'])).add_adapter('default', D2MoraConfig(target_modules=['0']))", "Adapter with name 'default' already exists."),
]
CASES = [*RECIPES, *COMMANDS, *FILES, *ADAPTERS, *RESULTS, *PUBLISHED, *SETTINGS]
