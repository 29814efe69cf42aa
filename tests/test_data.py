"""From files to target tokens: real rows and tokenizers, packing, order, counts and the cache."""

import functools
import gzip
import json

import datasets
import pytest
import torch
import transformers
from transformers import AutoTokenizer

import d2mora.data
from d2mora.data import (
    PUBLISHED,
    ByLength,
    Collator,
    DataConfig,
    check_packing,
    collator_for,
    computed_tokens,
    counts_table,
    encode,
    epoch_batches,
    logits_where_graded,
    pack,
    prepare,
    read_rows,
    read_task,
    sampling_arguments,
    shorten_prompt,
    survey,
)
from d2mora.tasks import TASKS, training_prompt
from d2mora.toy import toy_base, toy_rows

STYLES = ("plain", "official", "cloze")
SEVEN = [task for task in TASKS if task != "hellaswag"]  # whose training rows are in the shared data


def useful_tokens(batch):
    "The tokens of a batch that are not padding."
    return int(batch["attention_mask"].sum()) if "attention_mask" in batch else batch["input_ids"].numel()


def columns(rows):
    return {k: [row[k] for row in rows] for k in ("instruction", "input", "output", "answer", "task") if k in rows[0]}


def folder_of(path, rows, split="train", task="boolq"):
    (path / task).mkdir(parents=True, exist_ok=True)
    (path / task / f"{split}.json").write_text(json.dumps(rows))
    return str(path)


# --- target tokens


@functools.cache
def trained_tokenizer(bos):
    "A small byte-level tokenizer like LLaMA-3's, or like GPT-2's if it has no BOS; neither has a padding token."
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    rows = [row for task in TASKS for row in toy_rows("toy", task, "train")[:20]]
    raw, eos = Tokenizer(models.BPE()), "<|end|>"
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    words = dict(special_tokens=[w for w in (bos, eos) if w], initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    raw.train_from_iterator(
        ["".join(training_prompt(row)) for row in rows], trainers.BpeTrainer(vocab_size=500, **words)
    )
    if bos:
        raw.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, raw.token_to_id(bos))]
        )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token=eos, **({"bos_token": bos} if bos else {})
    )


def tokenizer_of(name, shared):
    places = {"stories": shared / "models/stories260K", "mistral": shared / "tokenizers/mistral-v1"}
    if name in places:
        return AutoTokenizer.from_pretrained(places[name])
    return trained_tokenizer("<|begin|>" if name == "llama3" else None)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("name", ["stories", "mistral", "llama3", "gpt2"])
def test_target_tokens_are_those_of_the_obvious_loop(shared, name, style):
    "The whole text's tokens and EOS; a token is a target if it holds a character of the answer, or is EOS."
    tokenizer, path = tokenizer_of(name, shared), str(shared / "data") if name in ("stories", "mistral") else "toy"
    rows = [row for task in TASKS for row in read_task(path, task, "test").to_list()[:4]]
    coded = encode(columns(rows), tokenizer, DataConfig(prompt=style, cutoff=4096))
    for i, row in enumerate(rows):
        prompt, answer = training_prompt(row, style)
        own = tokenizer(prompt + answer, return_offsets_mapping=True)
        ids, start = coded["input_ids"][i], coded["graded_from"][i]
        assert ids == own["input_ids"] + [tokenizer.eos_token_id] and coded["status"][i] == "whole"
        targets = [any(place >= len(prompt) for place in range(*span)) for span in own["offset_mapping"]]
        assert [*targets, True] == [i >= start for i in range(len(ids))]
        text = tokenizer.decode(ids[start:], skip_special_tokens=True)
        assert text.strip().endswith(answer.strip()) and (text.strip() == answer.strip() or style == "cloze")
    items = [{key: coded[key][i] for key in ("input_ids", "graded_from")} for i in range(len(rows))]
    collate = collator_for(tokenizer)
    batch = collate(items)
    real = batch["attention_mask"] == 1
    assert (batch["input_ids"][~real] == collate.pad_id).all() and (batch["labels"][~real] == -100).all()
    assert (~real)[:, 0 if tokenizer.padding_side == "left" else -1].any()
    assert [ids[mask].tolist() for ids, mask in zip(batch["input_ids"], real)] == coded["input_ids"]
    assert ((batch["labels"] == tokenizer.eos_token_id).sum(1) == 1).all()  # learned once a row, also if it is padding
    assert useful_tokens(batch) == sum(coded["length"])


def test_shortening_keeps_the_answer_and_the_prompts_end(shared):
    tokenizer = tokenizer_of("stories", shared)
    long = [row for row in read_task(str(shared / "data"), "hellaswag", "test").to_list()[8000:8100]]
    long = [row for row in long if len(row["instruction"]) > 1000][:20]
    coded = encode(columns(long), tokenizer, DataConfig(cutoff=256))
    assert set(coded["status"]) == {"shortened"} and max(coded["length"]) <= 256
    for row, ids, start in zip(long, coded["input_ids"], coded["graded_from"]):
        assert tokenizer.decode(ids[start:], skip_special_tokens=True).strip() == row["output"]
        text = tokenizer.decode(ids, skip_special_tokens=True)
        assert text.strip().endswith("Answer format: ending1/ending2/ending3/ending4\n\n" + row["output"])
    for prompt in ("🦙" * 50, "x" * 500, "\n" * 300, " " * 300):
        for limit in (30, 31, 40):
            short = shorten_prompt(tokenizer, prompt, "the correct answer is true", limit)
            assert prompt.endswith(short) and len(tokenizer(short + "the correct answer is true").input_ids) <= limit


class OwnEos:
    "A tokenizer that adds BOS and EOS itself: one token a character."

    is_fast, name_or_path, padding_side, eos_token_id, pad_token_id = True, "own", "left", 2, None

    def __call__(self, texts, return_offsets_mapping=False):
        spans = [[(0, 0), *((i, i + 1) for i in range(len(text))), (0, 0)] for text in texts]
        return {"input_ids": [[1, *(3 + ord(c) for c in text), 2] for text in texts], "offset_mapping": spans}


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("truncation", ["prompt", "skip", "published"])
def test_status_and_tokens_at_every_cutoff(truncation, own):
    row = toy_rows("toy", "boolq", "train")[0]
    tokenizer = OwnEos() if own else AutoTokenizer.from_pretrained(toy_base())

    def encoded(cutoff):
        coded = encode(columns([row]), tokenizer, DataConfig(cutoff=cutoff, truncation=truncation))
        return {key: values[0] for key, values in coded.items()}

    whole = encoded(10_000)
    n, answer = whole["length"], whole["input_ids"][whole["graded_from"] :]
    assert whole["status"] == "whole" and whole["input_ids"].count(2) == 1 and whole["input_ids"][-1] == 2
    for cutoff in range(n - 12, n + 2):
        coded = encoded(cutoff)
        ids, cut = coded["input_ids"], {"prompt": "shortened", "skip": "skipped", "published": "lost"}[truncation]
        assert coded["status"] == (cut if cutoff < n - (truncation == "published") else "whole")
        assert len(ids) <= cutoff or coded["status"] == "skipped"
        if coded["status"] in ("whole", "shortened") and cutoff >= n - (truncation != "published"):
            assert ids[coded["graded_from"] :] == answer
    assert encode(columns([row]), tokenizer, DataConfig(train_on_inputs=True))["graded_from"] == [0]


def test_the_published_cutoff_loses_most_answers_of_hellaswag(shared):
    tokenizer = tokenizer_of("mistral", shared)
    rows = read_task(str(shared / "data"), "hellaswag", "test").shuffle(seed=0).select(range(300)).to_list()
    published = DataConfig(prompt="official", cutoff=256, truncation="published")
    assert 180 < encode(columns(rows), tokenizer, published)["status"].count("lost") < 225  # 67.5 % of all rows
    assert set(encode(columns(rows), tokenizer, DataConfig(prompt="official"))["status"]) == {"whole"}


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_loss_with_learned_positions(side):
    sizes = dict(vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=2)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).eval()
    rows = [{"input_ids": list(range(3, 3 + n)), "graded_from": n - 4} for n in (6, 11, 20)]

    def loss(rows):
        batch = Collator(0, side)(rows)
        labels = batch.pop("labels")[:, 1:].flatten()
        return torch.nn.functional.cross_entropy(
            model(**batch).logits[:, :-1].flatten(0, 1), labels, reduction="sum"
        ).item()

    assert loss(rows) == pytest.approx(sum(loss([row]) for row in rows), rel=1e-5)


# --- files and counts


def test_all_real_rows_pass_the_check_and_are_counted(shared):
    path = str(shared / "data")
    assert sum(len(read_task(path, task, "test")) for task in TASKS) == 22_419
    rows = read_rows(path, SEVEN)
    assert len(rows) == 107_675
    counts = survey(rows, path)
    assert {t: c["rows"] for t, c in counts.items() if t != "winogrande"} == {
        t: n for t, n in PUBLISHED.items() if t not in ("winogrande", "hellaswag")
    }
    assert counts["winogrande"] == {"rows": 40398, "published": 63238, "repeated": 2, "in_test": 0}
    assert sum(PUBLISHED.values()) == 170_420


def test_plain_and_gzipped_files_and_the_mixed_file_give_the_same_rows(tmp_path):
    rows = {task: toy_rows("toy", task, "train")[:5] for task in ("boolq", "hellaswag")}
    for task in rows:
        folder_of(tmp_path / "plain", rows[task], task=task)
        (tmp_path / "zipped" / task).mkdir(parents=True)
        (tmp_path / "zipped" / task / "train.json.gz").write_bytes(gzip.compress(json.dumps(rows[task]).encode()))
    mixed = tmp_path / "commonsense_170k.json"
    mixed.write_text(json.dumps(rows["hellaswag"] + rows["boolq"]))
    read = [read_rows(str(tmp_path / name), list(rows)).to_list() for name in ("plain", "zipped", mixed.name)]
    key = lambda row: (row["task"], row["instruction"], row["answer"])
    assert read[0] == read[1] and sorted(map(key, read[0])) == sorted(map(key, read[2]))
    assert [row["row"] for row in read[2]] == list(range(10)) and set(read_rows(str(mixed), ["boolq"])["task"]) == {
        "boolq"
    }
    mixed.write_text(json.dumps([toy_rows("toy", task, "train")[0] for task in TASKS]))
    count = survey(read_rows(str(mixed), list(TASKS)), str(mixed))["openbookqa"]
    assert count == {"rows": 3, "published": 8327, "repeated": 0, "in_test": 0}


GOOD = toy_rows("toy", "boolq", "train")[0]
OTHER = "true" if GOOD["answer"] == "false" else "false"


@pytest.mark.parametrize(
    "content, parts",
    [
        (json.dumps([GOOD] * 2)[:-20], ["train.json", "not JSON", "mend the file"]),
        ([], ["not an array with rows"]),
        ({"rows": 3}, ["not an array with rows"]),
        ([GOOD, "text"], ["row 1 is not an object"]),
        ([GOOD, GOOD | {"answer": 3}], ["row 1", "'answer' is not a text: 3"]),
        ([GOOD, GOOD | {"instruction": " "}], ["row 1", "'instruction' is not a text"]),
        ([GOOD, {k: v for k, v in GOOD.items() if k != "output"}], ["row 1", "'output' is missing"]),
        ([GOOD, GOOD | {"answer": "maybe"}], ["row 1", "'answer' is 'maybe', not one of true/false"]),
        ([GOOD | {"output": f"{OTHER}, not {GOOD['answer']}"}], ["row 0", "does not contain the answer"]),
    ],
)
def test_a_bad_row_is_named(content, parts, tmp_path):
    (tmp_path / "boolq").mkdir()
    (tmp_path / "boolq/train.json").write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ValueError) as error:
        read_rows(str(tmp_path), ["boolq"])
    assert all(part in str(error.value) for part in parts) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: DataConfig(tasks=["bolq"]), "'boolq'"),
        (lambda: DataConfig(tasks=[]), "empty"),
        (lambda: DataConfig(tasks=["boolq", "boolq"]), "twice"),
        (lambda: DataConfig(cutoff=0), "cutoff=0"),
        (lambda: DataConfig(validation_rows=-1), "validation_rows=-1"),
        (lambda: read_rows("toy-hrad", ["piqa"]), "toy-hard"),
        (lambda: read_rows("toy", ["bolq"]), "'boolq'"),
        (lambda: prepared(validation_rows=10**6), "validation_rows=1000000 leaves nothing"),
        (lambda: prepared(cutoff=3), "2 tokens.*data.cutoff"),
        (lambda: prepared(cutoff=3, truncation="skip"), "skips every row"),
        (lambda: prepared(cutoff=3, truncation="published"), "takes the whole answer from all training rows"),
    ],
)
def test_settings_that_cannot_work_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def prepared(rows=None, path="toy", tasks=("boolq",), **settings):
    config = DataConfig(path=path, tasks=list(tasks), **settings)
    rows = read_rows(path, config.tasks) if rows is None else rows
    return prepare(rows, config, AutoTokenizer.from_pretrained(toy_base()))


def test_repeated_rows_and_questions_of_the_test_set_are_reported(tmp_path):
    rows, tested = toy_rows("toy", "boolq", "train")[:20], toy_rows("toy", "boolq", "test")[:5]
    copied = rows[5] | {"instruction": rows[5]["instruction"].replace(" ", "  ").upper()}
    folder_of(tmp_path, [copied, *tested], "test")
    counts = prepared(path=folder_of(tmp_path, rows + rows[:3])).counts
    cut = {"shortened": 0, "skipped": 0, "lost": 0}
    assert counts["boolq"] == {"rows": 23, "published": 9427, "repeated": 3, "in_test": 1} | cut
    table = counts_table(counts, DataConfig())
    assert "in test set" in table and "9427" in table and "skipped" not in table


def test_the_truncation_status_is_reported():
    settings = dict(tasks=("boolq", "piqa"), cutoff=34, truncation="published")
    counts = prepared(**settings).counts
    assert counts["boolq"]["lost"] > 0 == counts["piqa"]["lost"]
    table = counts_table(counts, DataConfig(cutoff=34, truncation="published"))
    assert "cutoff 34" in table and f"{counts['boolq']['lost']}" in table and "as published" in table
    assert prepared(**settings | {"truncation": "prompt"}).counts["boolq"]["shortened"] > 0


def test_validation_rows_are_never_trained_on_and_always_the_same():
    ready = [prepared(tasks=TASKS, validation_rows=100) for _ in range(2)]
    held = [{(r["task"], r["row"]) for rows in one.validation.values() for r in rows} for one in ready]
    trained = {(r["task"], r["row"]) for r in ready[0].train}
    assert held[0] == held[1] and len(held[0]) == 100 and not held[0] & trained and len(trained) == 6400 - 100


def test_tokens_are_stored_by_content_and_settings(tmp_path, monkeypatch):
    calls, real = [], d2mora.data._encode_row
    monkeypatch.setattr(d2mora.data, "_encode_row", lambda *args: calls.append(1) or real(*args))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = toy_rows("toy", "boolq", "train")[:30]

    def encoded(rows, **settings):
        calls.clear()
        return prepared(path=folder_of(tmp_path / "one", rows), **settings).train["input_ids"][:], len(calls)

    first, count = encoded(rows)
    assert count == 30 and encoded(rows, sampling="packed", validation_rows=3)[1] == 0
    for settings in ({"cutoff": 500}, {"prompt": "official"}, {"truncation": "skip"}, {"train_on_inputs": True}):
        assert encoded(rows, **settings)[1] == 30
    assert encoded(rows) == (first, 0)
    changed, count = encoded(rows[::-1])
    assert count > 0 and changed == first[::-1]


def test_tokenizers_that_cannot_be_used_are_refused():
    tokenizer = AutoTokenizer.from_pretrained(toy_base())
    d2mora.data.check_tokenizer(tokenizer, len(tokenizer))
    with pytest.raises(ValueError, match="resize_token_embeddings"):
        d2mora.data.check_tokenizer(tokenizer, len(tokenizer) - 1)
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no EOS"):
        collator_for(tokenizer)


def test_an_error_in_one_of_several_processes_is_still_a_users_mistake(shared):
    rows = read_rows(str(shared / "data"), ["winogrande"]).select(range(20_000))
    with pytest.raises(ValueError, match="data.cutoff"):
        prepare(rows, DataConfig(tasks=["winogrande"], cutoff=9), tokenizer_of("mistral", shared))


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


MODELS = [f"{family}-{attention}" for family in ("llama", "qwen2", "gpt2") for attention in ("sdpa", "eager")]
LENGTHS = (7, 19, 3, 12)
NARROWS = hasattr(transformers.modeling_utils, "slice_logits_to_keep")  # before 5.22 all logits are computed


def some_rows(targets=4, **more):
    ids = torch.randint(3, 90, (sum(LENGTHS),), generator=torch.Generator().manual_seed(1)).split(LENGTHS)
    return [{"input_ids": i.tolist(), "graded_from": max(0, len(i) - targets), **more} for i in ids]


@pytest.mark.parametrize("name", MODELS)
def test_packed_logits_are_those_of_each_row_alone(name):
    batch = pack(some_rows())
    with torch.no_grad():
        packed = model(name)(batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits[0]
        alone = torch.cat([model(name)(torch.tensor([row["input_ids"]])).logits[0] for row in some_rows()])
        leaking = model(name)(batch["input_ids"], use_cache=False).logits[0]
    assert (packed - alone).abs().max() < 1e-5 < 1e-2 < (leaking - alone).abs().max()
    check_packing(model(name))


@pytest.mark.parametrize("targets", [4, 99])
@pytest.mark.parametrize("name", MODELS)
def test_packed_padded_and_narrow_batches_have_the_same_loss_and_gradient(name, targets):
    "99 targets train on the prompt too: the first token of a row must not be predicted from the row before it."
    results = {}
    for kind in ("right", "left", "packed"):
        for narrow in (False, True):
            handle = logits_where_graded(model(name)) if narrow else None
            model(name).zero_grad()
            batch = Collator(0, "left" if kind == "left" else "right")(some_rows(targets, packed=kind == "packed"))
            out = model(name)(**batch, use_cache=False)
            out.loss.backward()
            gradient = torch.cat([p.grad.flatten() for p in model(name).parameters()])
            results[kind, narrow] = out.loss.item(), gradient, out.logits.numel()
            if handle:
                handle.remove()
    loss, gradient, _ = results["right", False]
    for other, (l2, g2, size) in results.items():
        assert l2 == pytest.approx(loss, rel=1e-5) and (g2 - gradient).norm() < 1e-4 * gradient.norm(), other
        assert size == sum(min(targets, n - 1) for n in LENGTHS) * 90 or not (other[1] and NARROWS)


def test_narrow_logits_leave_other_calls_alone():
    llama, ids = model("llama-sdpa"), torch.tensor([[5, 6, 7]])
    handle = logits_where_graded(llama)
    own = dict(logits_to_keep=1, shift_labels=ids[:, -1:])
    assert llama(ids).logits.shape == (1, 3, 90) and llama(input_ids=ids, labels=ids, **own).logits.shape == (1, 1, 90)
    assert llama(input_ids=ids, labels=ids).logits.shape == ((2, 90) if NARROWS else (1, 3, 90))
    handle.remove()
    assert llama(input_ids=ids, labels=ids).logits.shape == (1, 3, 90)


def test_only_training_rows_are_packed():
    ready = prepared(tasks=("boolq", "piqa"), validation_rows=20, sampling="packed")
    rows, held = [ready.train[i] for i in range(4)], ready.validation["boolq"].to_list()[:4]
    batch = Collator(0)(rows)
    assert batch["input_ids"].shape == (1, useful_tokens(batch)) and "attention_mask" not in batch
    assert useful_tokens(batch) == sum(row["length"] for row in rows) and (batch["position_ids"] == 0).sum() == 4
    assert Collator(0)(held)["input_ids"].shape[0] == 4


# --- order


def test_by_length_is_another_order_each_epoch_and_the_same_for_a_resumed_run():
    lengths, orders = torch.randint(5, 60, (200,)).tolist(), []
    sampler = ByLength(lengths, 8, seed=3)
    for epoch in range(3):
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
    assert all(sorted(order) == list(range(200)) for order in orders) and orders[0] != orders[1] != orders[2]
    resumed = ByLength(lengths, 8, seed=3)
    resumed.set_epoch(2)
    assert list(resumed) == orders[2] and list(ByLength(lengths, 8, seed=4)) != orders[0]
    assert sampling_arguments(DataConfig(sampling="by-length")) == {"train_sampling_strategy": "group_by_length"}
    assert sampling_arguments(DataConfig(sampling="packed")) == sampling_arguments(DataConfig()) == {}


def test_packed_batches_compute_the_fewest_tokens():
    lengths, costs = [10, 50] * 100, {}
    for sampling in ("random", "packed", "by-length"):
        batches = epoch_batches(lengths, sampling, 4, seed=1)
        assert sorted(i for batch in batches for i in batch) == list(range(200))
        costs[sampling] = computed_tokens(lengths, batches, sampling)
    assert costs["packed"] == sum(lengths) < costs["by-length"] * 1.01 < costs["random"]


@pytest.fixture(scope="module")
def padded_run(tmp_path_factory):
    return short_run("random", tmp_path_factory.mktemp("padded"))


def short_run(sampling, folder):
    "Losses and weights of four steps."
    from safetensors.torch import load_file

    from d2mora.recipe import load_recipe
    from d2mora.train import train

    keys = {"gradient_accumulation_steps": 2, "logging_steps": 1, "warmup_steps": 0, "max_steps": 4}
    keys = {f"training.{key}": n for key, n in keys.items()} | {"training.per_device_train_batch_size": 4}
    run = train(
        load_recipe("demo", keys | {"data.sampling": sampling, "data.tasks": ["boolq", "piqa"]}), folder / "run"
    )
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    weights = load_file(run / "adapter/adapter_model.safetensors")
    flat = torch.cat([weights[key].flatten() for key in sorted(weights)])
    return [line["loss"] for line in lines if "loss" in line], flat


@pytest.mark.parametrize("sampling", ["packed", "by-length"])
def test_a_run_learns_from_each_sampling_and_packed_as_from_padded(sampling, tmp_path, padded_run):
    (losses, weights), (expected, others) = short_run(sampling, tmp_path), padded_run
    same = losses == pytest.approx(expected, abs=1e-4) and (weights - others).norm() < 1e-3 * others.norm()
    assert len(losses) == 4 and same == (sampling == "packed")
