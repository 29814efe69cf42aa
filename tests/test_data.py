"""From files to target tokens: real rows and tokenizers, own tasks, packing, order and counts."""

import functools
import gzip
import json
import pickle

import pytest
import torch
import transformers
from transformers import AutoTokenizer

from d2mora.data import (
    PUBLISHED,
    ByLength,
    Collator,
    DataConfig,
    batch_tokens,
    check_packing,
    check_tokenizer,
    collator_for,
    counts_table,
    encode,
    logits_at_targets,
    prepare,
    read_rows,
    read_task,
    sampling_arguments,
    shorten_prompt,
    survey,
)
from d2mora.evaluate import test_rows as rows_to_grade
from d2mora.tasks import TASKS, parse_answer, training_prompt
from d2mora.toy import toy_base, toy_rows

SEVEN = [task for task in TASKS if task != "hellaswag"]  # whose training rows are in the shared data


def columns(rows):
    return {k: [row[k] for row in rows] for k in ("instruction", "input", "output", "answer", "task") if k in rows[0]}


def folder_of(path, rows, split="train", task="boolq"):
    (path / task).mkdir(parents=True, exist_ok=True)
    (path / task / f"{split}.json").write_text(json.dumps(rows))
    return str(path)


def prepared(path="toy", tasks=("boolq",), **settings):
    config = DataConfig(path, list(tasks), **settings)
    return prepare(read_rows(config), config, AutoTokenizer.from_pretrained(toy_base()))


# --- target tokens


@functools.cache
def trained_tokenizer(bos):
    "A small byte-level tokenizer like LLaMA-3's, or like GPT-2's if it has no BOS; neither has a padding token."
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    raw, eos = Tokenizer(models.BPE()), "<|end|>"
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    words = dict(special_tokens=[w for w in (bos, eos) if w], initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    texts = ["".join(training_prompt(row)) for task in TASKS for row in toy_rows("toy", task, "train", 20)]
    raw.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=500, **words))
    if bos:
        special = [(bos, raw.token_to_id(bos))]
        raw.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=special)
    named = {"bos_token": bos} if bos else {}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=raw, eos_token=eos, **named)


def tokenizer_of(name, shared):
    places = {"stories": shared / "models/stories260K", "mistral": shared / "tokenizers/mistral-v1"}
    if name in places:
        return AutoTokenizer.from_pretrained(places[name])
    return trained_tokenizer("<|begin|>" if name == "llama3" else None)


@pytest.mark.parametrize("style", ["plain", "official", "cloze"])
@pytest.mark.parametrize("name", ["stories", "mistral", "llama3", "gpt2"])
def test_target_tokens_are_those_of_the_obvious_loop(shared, name, style):
    "The whole text's tokens and EOS; a token is a target if it holds a character of the answer, or is EOS."
    tokenizer, path = tokenizer_of(name, shared), str(shared / "data") if name in ("stories", "mistral") else "toy"
    rows = [row for task in SEVEN for row in read_task(path, task, "test").to_list()[:3]]
    coded = encode(columns(rows), tokenizer, DataConfig(prompt=style, cutoff=4096))
    for i, row in enumerate(rows):
        prompt, answer = training_prompt(row, style)
        own = tokenizer(prompt + answer, return_offsets_mapping=True)
        ids, start = coded["input_ids"][i], coded["target_start"][i]
        assert ids == own["input_ids"] + [tokenizer.eos_token_id] and coded["status"][i] == "whole"
        targets = [any(place >= len(prompt) for place in range(*span)) for span in own["offset_mapping"]]
        assert [*targets, True] == [i >= start for i in range(len(ids))]
    batch = collator_for(tokenizer)([{k: coded[k][i] for k in ("input_ids", "target_start")} for i in range(len(rows))])
    real = batch["attention_mask"] == 1
    assert [ids[mask].tolist() for ids, mask in zip(batch["input_ids"], real)] == coded["input_ids"]
    assert (batch["labels"][~real] == -100).all() and not real.all()
    assert ((batch["labels"] == tokenizer.eos_token_id).sum(1) == 1).all()  # learned once a row, also if it is padding


def test_shortening_keeps_the_answer_and_the_prompts_end(shared):
    tokenizer = tokenizer_of("stories", shared)
    rows = read_task(str(shared / "data"), "hellaswag", "test").to_list()[8000:8100]
    long = [row for row in rows if len(row["instruction"]) > 1000][:20]
    coded = encode(columns(long), tokenizer, DataConfig(cutoff=256))
    assert set(coded["status"]) == {"shortened"} and max(coded["length"]) <= 256
    for row, ids in zip(long, coded["input_ids"]):
        text = tokenizer.decode(ids, skip_special_tokens=True)
        assert text.strip().endswith("Answer format: ending1/ending2/ending3/ending4\n\n" + row["output"])
    for prompt in ("🦙" * 50, "\n" * 300, " " * 300):
        short = shorten_prompt(tokenizer, prompt, "the correct answer is true", 31)
        assert prompt.endswith(short) and len(tokenizer(short + "the correct answer is true").input_ids) <= 31


class OwnEos:
    "A tokenizer that adds BOS and EOS itself: one token a character."

    is_fast, name_or_path, padding_side, eos_token_id, pad_token_id = True, "own", "left", 2, None

    def __call__(self, texts, return_offsets_mapping=False):
        spans = [[(0, 0), *((i, i + 1) for i in range(len(text))), (0, 0)] for text in texts]
        return {"input_ids": [[1, *(3 + ord(c) for c in text), 2] for text in texts], "offset_mapping": spans}


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("truncation, cut", {"prompt": "shortened", "skip": "skipped", "published": "lost"}.items())
def test_status_and_tokens_at_every_cutoff(truncation, cut, own):
    row = toy_rows("toy", "boolq", "train", 1)[0]
    tokenizer = OwnEos() if own else AutoTokenizer.from_pretrained(toy_base())

    def encoded(**settings):
        coded = encode(columns([row]), tokenizer, DataConfig(truncation=truncation, **settings))
        return {key: values[0] for key, values in coded.items()}

    whole = encoded(cutoff=10_000)
    n, answer = whole["length"], whole["input_ids"][whole["target_start"] :]
    assert whole["status"] == "whole" and whole["input_ids"].count(2) == 1 and whole["input_ids"][-1] == 2
    for cutoff in range(n - 12, n + 2):
        coded = encoded(cutoff=cutoff)
        assert coded["status"] == (cut if cutoff < n - (truncation == "published") else "whole")
        assert coded["length"] <= cutoff or coded["status"] == "skipped"
        if coded["status"] == "shortened" or cutoff >= n:
            assert coded["input_ids"][coded["target_start"] :] == answer
    assert encoded(train_on_inputs=True)["target_start"] == 0


def test_tokenizers_that_cannot_be_used_are_refused():
    tokenizer = AutoTokenizer.from_pretrained(toy_base())
    check_tokenizer(tokenizer, len(tokenizer))
    with pytest.raises(ValueError, match="resize_token_embeddings"):
        check_tokenizer(tokenizer, len(tokenizer) - 1)
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no EOS"):
        collator_for(tokenizer)


# --- files and counts


def test_all_real_rows_pass_the_check_and_are_counted(shared):
    config = DataConfig(str(shared / "data"), SEVEN)
    rows = read_rows(config)
    counts = survey(rows, config)
    same = {t: n for t, n in PUBLISHED.items() if t not in ("winogrande", "hellaswag")}
    assert {t: c["rows"] for t, c in counts.items() if t != "winogrande"} == same and len(rows) == 107_675
    assert counts["winogrande"] == {"rows": 40398, "published": 63238, "repeated": 2, "in_test": 0}
    with pytest.raises(ValueError, match="data.cutoff"):  # also from one of several processes
        few = rows.filter(lambda task: task == "winogrande", input_columns="task").select(range(20_000))
        prepare(few, DataConfig(config.path, ["winogrande"], cutoff=9), tokenizer_of("mistral", shared))


def test_plain_and_gzipped_files_and_the_mixed_file_give_the_same_rows(tmp_path):
    rows = {task: toy_rows("toy", task, "train", 5) for task in ("boolq", "hellaswag")}
    for task in rows:
        folder_of(tmp_path / "plain", rows[task], task=task)
        (tmp_path / "zipped" / task).mkdir(parents=True)
        (tmp_path / "zipped" / task / "train.json.gz").write_bytes(gzip.compress(json.dumps(rows[task]).encode()))
    mixed = tmp_path / "commonsense_170k.json"
    mixed.write_text(json.dumps(rows["hellaswag"] + rows["boolq"]))
    configs = [DataConfig(str(tmp_path / name), list(rows)) for name in ("plain", "zipped", mixed)]
    plain, zipped, one = (read_rows(config).to_list() for config in configs)
    assert plain == zipped and [row["row"] for row in one] == list(range(10))
    assert sorted(map(repr, [r | {"row": 0} for r in plain])) == sorted(map(repr, [r | {"row": 0} for r in one]))
    assert set(read_rows(DataConfig(str(mixed), ["boolq"]))["task"]) == {"boolq"}
    mixed.write_text(json.dumps([toy_rows("toy", task, "train", 4)[0] for task in TASKS]))
    count = survey(read_rows(DataConfig(str(mixed))), DataConfig(str(mixed)))["openbookqa"]
    assert count == {"rows": 3, "published": 8327, "repeated": 0, "in_test": 0}


def test_two_recipes_may_name_their_own_tasks_alike(tmp_path):
    "Nothing is known of own tasks but what a configuration carries: the second one changes nothing for the first."
    told = {"first": ["happy", "sad"], "second": ["sad", "tired", "so so"]}
    configs = {}
    for name, words in told.items():
        for split in ("train", "test"):
            rows = [{"instruction": f"{split} {i}: how is it?", "answer": word} for i, word in enumerate(words)]
            folder = folder_of(tmp_path / name, rows, split, "mood")
        configs[name] = DataConfig(folder, own_tasks={"mood": {"answers": words}})
    for name, config in configs.items():
        assert read_rows(config)["answer"][:] == told[name] == read_rows(config, "test")["answer"][:]
        ((task, rows),) = rows_to_grade(config, None, None).items()
        assert task == "mood" and [parse_answer(row["output"], task) for row in rows] == told[name]
        assert pickle.loads(pickle.dumps(task)).answers == task.answers == tuple(told[name])
        ready = prepare(read_rows(config), config, trained_tokenizer(None))
        assert ready.counts["mood"]["rows"] == len(told[name])
    with pytest.raises(ValueError, match="unknown task 'mood'"):
        read_task(configs["first"].path, "mood", "train")


def test_repeated_rows_questions_of_the_test_set_and_truncation_are_reported(tmp_path):
    rows, tested = toy_rows("toy", "boolq", "train", 20), toy_rows("toy", "boolq", "test", 5)
    copied = rows[5] | {"instruction": rows[5]["instruction"].replace(" ", "  ").replace("question", "QUESTION")}
    folder_of(tmp_path, [copied, *tested], "test")
    counts = prepared(folder_of(tmp_path, rows + rows[:3])).counts
    cut = {"shortened": 0, "skipped": 0, "lost": 0}
    assert counts["boolq"] == {"rows": 23, "published": 9427, "repeated": 3, "in_test": 1} | cut
    table = counts_table(counts, DataConfig())
    assert "in test set" in table and "9427" in table and "skipped" not in table
    counts = prepared(tasks=("boolq", "piqa"), cutoff=34, truncation="published").counts
    assert counts["boolq"]["lost"] > 0 == counts["piqa"]["lost"]
    with pytest.raises(ValueError, match="takes the whole answer from all training rows"):
        prepared(cutoff=3, truncation="published")


def test_validation_rows_are_never_trained_on_and_always_the_same():
    ready = [prepared(tasks=("boolq", "piqa"), validation_rows=100, sampling="packed") for _ in range(2)]
    held = [{(r["task"], r["row"]) for rows in one.validation.values() for r in rows} for one in ready]
    trained = {(r["task"], r["row"]) for r in ready[0].train}
    assert held[0] == held[1] and len(held[0]) == 100 and not held[0] & trained and len(trained) == 1600 - 100
    rows = [ready[0].train[i] for i in range(4)]
    batch = Collator(0)(rows)  # only training rows are packed
    assert batch["input_ids"].shape == (1, sum(row["length"] for row in rows)) and "attention_mask" not in batch
    assert Collator(0)(ready[0].validation["boolq"].to_list()[:4])["input_ids"].shape[0] == 4


# --- packing


@functools.cache
def model(name):
    family, attention = name.split("-")
    sizes = dict(vocab_size=90, hidden_size=32, intermediate_size=48, num_hidden_layers=2)
    heads = dict(num_attention_heads=4, num_key_value_heads=2)
    config = {
        "llama": lambda: transformers.LlamaConfig(**sizes, **heads),
        "qwen2": lambda: transformers.Qwen2Config(**sizes, **heads),
        "gpt2": lambda: transformers.GPT2Config(vocab_size=90, n_positions=64, n_embd=32, n_layer=2, n_head=2),
    }[family]()
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()


MODELS = ("llama-sdpa", "llama-eager", "qwen2-sdpa", "gpt2-eager")  # GPT-2 has learned positions
LENGTHS = (7, 19, 3, 12)
NARROWS = hasattr(transformers.modeling_utils, "slice_logits_to_keep")  # before 5.22 all logits are computed


def some_rows(targets=4, **more):
    ids = torch.randint(3, 90, (sum(LENGTHS),), generator=torch.Generator().manual_seed(1)).split(LENGTHS)
    return [{"input_ids": i.tolist(), "target_start": max(0, len(i) - targets), **more} for i in ids]


@pytest.mark.parametrize("targets", [4, 99])
@pytest.mark.parametrize("name", MODELS)
def test_packed_padded_and_narrow_batches_have_the_loss_and_gradient_of_the_loop(name, targets):
    "99 targets train on the prompt too: the first token of a row must not be predicted from the row before it."
    results = {}
    for kind in ("right", "left", "packed"):
        for narrow in (False, True):
            handle = logits_at_targets(model(name)) if narrow else None
            model(name).zero_grad()
            batch = Collator(0, "left" if kind == "left" else "right")(some_rows(targets, packed=kind == "packed"))
            out = model(name)(**batch, use_cache=False)
            out.loss.backward()
            gradient = torch.cat([p.grad.flatten() for p in model(name).parameters()])
            results[kind, narrow] = out.loss.item(), gradient, out.logits.numel()
            if handle:
                handle.remove()
    counts = [min(targets, n - 1) for n in LENGTHS]
    alone = [model(name)(**Collator(0)([row])).loss.item() for row in some_rows(targets)]
    loss, gradient = sum(n * own for n, own in zip(counts, alone)) / sum(counts), results["right", False][1]
    for other, (l2, g2, size) in results.items():
        assert l2 == pytest.approx(loss, rel=1e-5) and (g2 - gradient).norm() < 1e-4 * gradient.norm(), other
        assert size == sum(counts) * 90 or not (other[1] and NARROWS)
    check_packing(model(name))


def test_narrow_logits_leave_other_calls_alone():
    llama, ids = model("llama-sdpa"), torch.tensor([[5, 6, 7]])
    handle = logits_at_targets(llama)
    own = dict(logits_to_keep=1, shift_labels=ids[:, -1:])
    assert llama(ids).logits.shape == (1, 3, 90) and llama(input_ids=ids, labels=ids, **own).logits.shape == (1, 1, 90)
    handle.remove()


# --- order


def test_by_length_is_another_order_each_epoch_and_the_same_for_a_resumed_run():
    lengths = torch.randint(5, 60, (200,)).tolist()

    def order(epoch, seed=3):
        sampler = ByLength(lengths, 8, seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert sorted(order(0)) == sorted(order(2)) == list(range(200)) and order(0) != order(2) == order(2) != order(2, 4)
    arguments = [sampling_arguments(DataConfig(sampling=way)) for way in ("by-length", "packed", "random")]
    assert arguments == [{"train_sampling_strategy": "group_by_length"}, {}, {}]
    costs = {way: sum(batch_tokens(lengths, way, 4)) for way in ("random", "packed", "by-length")}
    assert costs["packed"] == sum(lengths) < costs["by-length"] < costs["random"]


def test_a_run_learns_from_packed_rows_as_from_padded_ones(tmp_path):
    from d2mora.recipe import load_recipe
    from d2mora.train import train

    found = []
    for sampling in ("random", "packed"):
        keys = {"gradient_accumulation_steps": 2, "logging_steps": 1, "warmup_steps": 0, "max_steps": 3}
        keys = {f"training.{key}": n for key, n in keys.items()} | {"training.per_device_train_batch_size": 4}
        keys |= {"data.sampling": sampling, "data.tasks": ["boolq"], "adapter.target_modules": ["q_proj"]}
        run = train(load_recipe("demo", keys), tmp_path / sampling)
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        found.append([line["loss"] for line in lines if "loss" in line])
    assert len(found[0]) == 3 and found[1] == pytest.approx(found[0], abs=1e-4)
