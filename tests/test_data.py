"""Rows to graded tokens: what one notebook run cannot see (real tokenizers, all real rows, order, caches)."""

import gzip
import json

import pytest
import torch
import transformers
from transformers import AutoTokenizer

from d2mora.data import ByLength, Collator, answer_start, check_packing, collator_for, computed_tokens, counts_table, effective_tasks, encode, epoch_batches, logits_where_graded, pack, prepare, sampling_arguments, shorten_prompt, tokenize, useful_tokens  # fmt: skip
from d2mora.data import PUBLISHED, DataConfig, read_rows, read_task, survey
from d2mora.tasks import TASKS, training_prompt
from d2mora.toy import toy_base, toy_rows


def columns(rows):
    return {key: [row[key] for row in rows] for key in ("instruction", "input", "output", "answer", "task") if key in rows[0]}


def graded_text(tokenizer, coded, i):
    return tokenizer.decode(coded["input_ids"][i][coded["graded_from"][i]:], skip_special_tokens=True).strip()


def real_tokenizer(shared, name):
    return AutoTokenizer.from_pretrained({"toy": toy_base(), "stories": shared / "models/stories260K", "mistral": shared / "tokenizers/mistral-v1"}[name])


@pytest.mark.parametrize("style", ["plain", "official", "cloze"])
@pytest.mark.parametrize("name", ["stories", "mistral"])
def test_the_graded_tokens_are_the_answer_and_eos(shared, name, style):
    tokenizer = real_tokenizer(shared, name)
    for task in TASKS:
        rows = read_task(str(shared / "data"), task, "test").to_list()[:5]
        coded = encode(columns(rows), tokenizer, DataConfig(prompt=style, cutoff=2048))
        for i, row in enumerate(rows):
            assert graded_text(tokenizer, coded, i) == training_prompt(row, style)[1].strip()
            assert coded["input_ids"][i][-1] == tokenizer.eos_token_id and coded["fate"][i] == "whole"


@pytest.mark.parametrize("style", ["plain", "official", "cloze"])
def test_a_row_is_the_tokens_of_its_whole_text(shared, style):
    tokenizer = real_tokenizer(shared, "mistral")
    row = read_task(str(shared / "data"), "boolq", "test")[0]
    coded = encode(columns([row]), tokenizer, DataConfig(prompt=style))
    assert coded["input_ids"][0][:-1] == tokenizer("".join(training_prompt(row, style))).input_ids


def test_shortening_keeps_the_answer_and_the_prompts_end(shared):
    tokenizer = real_tokenizer(shared, "stories")
    long = [row for row in read_task(str(shared / "data"), "hellaswag", "test").to_list()[8000:8100] if len(row["instruction"]) > 1000][:20]
    coded = encode(columns(long), tokenizer, DataConfig(cutoff=256))
    assert len(long) == 20 and set(coded["fate"]) == {"shortened"}
    for i, row in enumerate(long):
        text = tokenizer.decode(coded["input_ids"][i], skip_special_tokens=True)
        assert len(coded["input_ids"][i]) <= 256 and graded_text(tokenizer, coded, i) == row["output"]
        assert text.strip().endswith("Answer format: ending1/ending2/ending3/ending4\n\n" + row["output"])


def test_shortening_ends_on_texts_of_bytes_and_of_one_character(shared):
    tokenizer = real_tokenizer(shared, "stories")
    for prompt in ("🦙" * 50, "x" * 500, "\n" * 300, " " * 300):
        for limit in (30, 31, 40):
            short = shorten_prompt(tokenizer, prompt, "the correct answer is true", limit)
            assert prompt.endswith(short) and len(tokenizer(short + "the correct answer is true").input_ids) <= limit


def test_all_real_rows_pass_the_check(shared):
    counts = {task: len(read_task(str(shared / "data"), task, "test")) for task in TASKS}
    assert sum(counts.values()) == 22_419
    rows = read_rows(str(shared / "data"), [task for task in TASKS if task != "hellaswag"])
    assert len(rows) == 107_675


def test_published_truncation_counts_the_rows_that_it_ruins(shared):
    tokenizer = real_tokenizer(shared, "mistral")
    rows = read_task(str(shared / "data"), "hellaswag", "test").shuffle(seed=0).select(range(300))
    lost = encode(columns(rows), tokenizer, DataConfig(prompt="official", cutoff=256, truncation="published"))["fate"].count("lost")
    assert 0.6 < lost / 300 < 0.75  # measured with LLaMA-2's tokenizer on all rows: 67.5 %
    kept = encode(columns(rows), tokenizer, DataConfig(prompt="official", cutoff=512))["fate"]
    assert set(kept) == {"whole"}


class Tokenizer:
    "A tokenizer with learned-looking specials: BOS, EOS that it adds itself, one token a character."

    is_fast, name_or_path, padding_side = True, "own", "left"
    eos_token_id, pad_token_id = 2, None

    def __call__(self, texts, return_offsets_mapping=False, **_):
        single = isinstance(texts, str)
        ids = [[1, *(3 + ord(c) for c in text), 2] for text in ([texts] if single else texts)]
        spans = [[(0, 0), *((i, i + 1) for i in range(len(text))), (0, 0)] for text in ([texts] if single else texts)]
        coded = type("Coded", (dict,), {"__getattr__": dict.__getitem__})
        return coded(input_ids=ids[0] if single else ids, offset_mapping=spans[0] if single else spans)


def test_a_tokenizer_that_adds_eos_itself_gets_no_second_one():
    row = toy_rows("toy", "boolq", "train")[0]
    whole = "".join(training_prompt(row))
    coded = encode(columns([row]), Tokenizer(), DataConfig(cutoff=10_000))
    assert coded["input_ids"][0].count(2) == 1 and coded["input_ids"][0][-1] == 2 and len(coded["input_ids"][0]) == len(whole) + 2
    for cutoff in (60, len(whole), len(whole) + 1, len(whole) + 2):
        ids, start = (encode(columns([row]), Tokenizer(), DataConfig(cutoff=cutoff))[key][0] for key in ("input_ids", "graded_from"))
        assert len(ids) <= cutoff and ids[0] == 1 and ids[-1] == 2 and len(ids) - start == len(row["output"]) + 1


def test_eos_as_padding_is_still_learned():
    tokenizer = AutoTokenizer.from_pretrained(toy_base())
    rows = [{"input_ids": [5, 6, tokenizer.eos_token_id], "graded_from": 1}, {"input_ids": [5, 6, 7, 8, tokenizer.eos_token_id], "graded_from": 3}]
    batch = Collator(tokenizer.eos_token_id, "right")(rows)
    assert batch["labels"].tolist() == [[-100, 6, tokenizer.eos_token_id, -100, -100], [-100, -100, -100, 8, tokenizer.eos_token_id]]
    assert collator_for(tokenizer).pad_id == (tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_loss_with_learned_positions(side):
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)).eval()
    rows = [{"input_ids": list(range(3, 3 + n)), "graded_from": n - 4} for n in (6, 11, 20)]

    def loss(rows):
        batch = Collator(0, side)(rows)
        labels = batch.pop("labels")[:, 1:]
        return torch.nn.functional.cross_entropy(model(**batch).logits[:, :-1].flatten(0, 1), labels.flatten(), reduction="sum").item()

    assert loss(rows) == pytest.approx(sum(loss([row]) for row in rows), rel=1e-5)


def test_validation_rows_are_never_trained_on_and_the_same_for_every_seed():
    tokenizer, config = AutoTokenizer.from_pretrained(toy_base()), DataConfig(path="toy", validation_rows=100)
    ready = [prepare(read_rows("toy", config.tasks), config, tokenizer) for _ in range(2)]
    kept = [{tuple(ids) for rows in r.validation.values() for ids in rows["input_ids"]} for r in ready]
    assert kept[0] == kept[1] and sum(map(len, ready[0].validation.values())) == 100
    assert len(ready[0].train) == sum(count["rows"] for count in ready[0].counts.values()) - 100


def test_plain_and_gzipped_files_and_the_mixed_file_give_the_same_rows(tmp_path):
    rows = {task: list(toy_rows("toy", task, "train"))[:5] for task in ("boolq", "hellaswag")}
    for task in rows:
        (tmp_path / "plain" / task).mkdir(parents=True), (tmp_path / "zipped" / task).mkdir(parents=True)
        (tmp_path / "plain" / task / "train.json").write_text(json.dumps(rows[task]))
        (tmp_path / "zipped" / task / "train.json.gz").write_bytes(gzip.compress(json.dumps(rows[task]).encode()))
    (tmp_path / "commonsense_170k.json").write_text(json.dumps(rows["hellaswag"] + rows["boolq"]))
    read = [sorted(map(str, read_rows(str(tmp_path / name), list(rows)).to_list())) for name in ("plain", "zipped")]
    mixed = sorted(str(row) for row in read_rows(str(tmp_path / "commonsense_170k.json"), list(rows)).to_list())
    assert read[0] == read[1] and len(mixed) == 10 and {"boolq", "hellaswag"} == set(read_rows(str(tmp_path / "commonsense_170k.json"), list(rows))["task"])


def test_spans_find_the_answer_where_tokens_cross_its_border(shared):
    tokenizer = real_tokenizer(shared, "mistral")
    (ids, spans), = tokenize(tokenizer, [("question   ", "the correct answer is true")])
    start = answer_start(spans, "question   ")
    assert tokenizer.decode(ids[start:]).strip() == "the correct answer is true"


# --- tokenizers of three families, made here


def trained_tokenizer(kind):
    "A small tokenizer built like LLaMA's, LLaMA-3's or GPT-2's: where BOS comes from, how spaces are kept, what padding it has."
    from tokenizers import Tokenizer as Raw
    from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    texts = ["".join(training_prompt(row, style)) for task in TASKS for row in list(toy_rows("toy", task, "train"))[:20] for style in ("plain", "official")]
    bos, eos = {"llama": ("<s>", "</s>"), "llama3": ("<|begin_of_text|>", "<|end_of_text|>"), "gpt2": (None, "<|endoftext|>")}[kind]
    special = ["<unk>", "<s>", "</s>"] if kind == "llama" else [word for word in (bos, eos) if word]
    raw = Raw(models.BPE(unk_token="<unk>", byte_fallback=True) if kind == "llama" else models.BPE())
    if kind == "llama":
        raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        raw.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
        trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=special, max_token_length=12)
        texts = [text.replace(" ", "▁") for text in texts]
    else:
        raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    raw.train_from_iterator(texts, trainer)
    if bos:
        raw.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, raw.token_to_id(bos))])
    names = {"bos_token": bos, "eos_token": eos} | ({"unk_token": "<unk>", "pad_token": "<unk>", "padding_side": "left"} if kind == "llama" else {})
    return PreTrainedTokenizerFast(tokenizer_object=raw, **{key: name for key, name in names.items() if name})


@pytest.mark.parametrize("style", ["plain", "official", "cloze"])
@pytest.mark.parametrize("kind", ["llama", "llama3", "gpt2"])
def test_three_families_of_tokenizers(kind, style):
    tokenizer = trained_tokenizer(kind)
    rows = [toy_rows("toy", task, "train")[i] | {"task": task} for task in TASKS for i in (0, 1)]
    coded = encode(columns(rows), tokenizer, DataConfig(prompt=style, cutoff=2048))
    for i, row in enumerate(rows):
        ids = coded["input_ids"][i]
        assert ids[:-1] == tokenizer("".join(training_prompt(row, style))).input_ids and ids[-1] == tokenizer.eos_token_id
        assert (ids[0] == tokenizer.bos_token_id) == (kind != "gpt2")
        answer, graded = training_prompt(row, style)[1].strip(), graded_text(tokenizer, coded, i)
        assert graded == answer or style == "cloze" and graded.endswith(answer)  # this tokenizer joins words: a token may begin before the answer
    batch = collator_for(tokenizer)([{key: coded[key][i] for key in ("input_ids", "graded_from")} for i in range(len(rows))])
    pad, real = batch["attention_mask"] == 0, batch["attention_mask"] == 1
    assert pad.any() and (batch["input_ids"][pad] == collator_for(tokenizer).pad_id).all() and (batch["labels"][pad] == -100).all()
    assert pad[:, 0].any() == (kind == "llama") and pad[:, -1].any() == (kind != "llama")
    assert [ids[mask].tolist() for ids, mask in zip(batch["input_ids"], real)] == coded["input_ids"]
    assert ((batch["labels"] == tokenizer.eos_token_id).sum(1) == 1).all()  # EOS is learned, once a row, also where padding has its id
    assert useful_tokens(batch) == sum(map(len, coded["input_ids"]))


# --- packing


def models():
    from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Qwen2Config

    torch.manual_seed(0)
    sizes = dict(vocab_size=90, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    shapes = {"llama": LlamaConfig(**sizes), "qwen2": Qwen2Config(**sizes), "gpt2": GPT2Config(vocab_size=90, n_positions=64, n_embd=32, n_layer=2, n_head=2)}
    return {f"{name}-{way}": AutoModelForCausalLM.from_config(shape, attn_implementation=way).eval() for name, shape in shapes.items() for way in ("sdpa", "eager")}


MODELS = models()
LENGTHS = (7, 19, 3, 12)


def some_rows(lengths=LENGTHS, graded=4, **more):
    ids = torch.randint(3, 90, (sum(lengths),), generator=torch.Generator().manual_seed(1)).tolist()
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    return [{"input_ids": ids[s : s + n], "graded_from": max(0, n - graded), **more} for s, n in zip(starts, lengths)]


@pytest.mark.parametrize("name", MODELS)
def test_packed_logits_are_those_of_each_row_alone(name):
    model, rows = MODELS[name], some_rows()
    batch = pack(rows)
    with torch.no_grad():
        packed = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits[0]
        alone = torch.cat([model(torch.tensor([row["input_ids"]])).logits[0] for row in rows])
        leaking = model(input_ids=batch["input_ids"], use_cache=False).logits[0]
    assert (packed - alone).abs().max() < 1e-5 < 1e-2 < (leaking - alone).abs().max()
    check_packing(model)


NARROWS = hasattr(transformers.modeling_utils, "slice_logits_to_keep")  # from transformers 5.22 on; before it all logits are computed


@pytest.mark.parametrize("graded", [4, 99])
@pytest.mark.parametrize("name", MODELS)
def test_packed_padded_and_narrow_batches_have_the_same_loss_and_gradient(name, graded):
    "`graded` 99 grades the prompt too: the first token of a row must not be graded by the row before it."
    model, found = MODELS[name], {}
    for kind in ("right", "left", "packed"):
        for narrow in (False, True):
            handle = logits_where_graded(model) if narrow else None
            model.zero_grad()
            out = model(**Collator(0, "right" if kind == "packed" else kind)(some_rows(graded=graded, packed=kind == "packed")), use_cache=False)
            out.loss.backward()
            gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
            found[kind, narrow] = (out.loss.item(), gradient, out.logits.numel())
            if handle:
                handle.remove()
    loss, gradient, size = found["right", False]
    for other, (l, g, n) in found.items():
        assert l == pytest.approx(loss, rel=1e-5) and (g - gradient).norm() < 1e-4 * gradient.norm(), other
        assert n < size or other[0] != "packed" and not (other[1] and graded == 4 and NARROWS)
    assert found["packed", True][2] == sum(min(graded, n - 1) for n in LENGTHS) * 90 or not NARROWS


def test_narrow_logits_leave_other_calls_alone():
    model = MODELS["llama-sdpa"]
    handle = logits_where_graded(model)
    ids = torch.tensor([[5, 6, 7]])
    assert model(ids).logits.shape == (1, 3, 90) and model(input_ids=ids, labels=ids, logits_to_keep=1, shift_labels=ids[:, -1:]).logits.shape == (1, 1, 90)
    assert model(input_ids=ids, labels=ids).logits.shape == ((2, 90) if NARROWS else (1, 3, 90))
    handle.remove()
    assert model(input_ids=ids, labels=ids).logits.shape == (1, 3, 90)


def test_only_training_rows_are_packed():
    tokenizer, config = AutoTokenizer.from_pretrained(toy_base()), DataConfig(path="toy", tasks=["boolq", "piqa"], validation_rows=20, sampling="packed")
    ready, collate = prepare(read_rows("toy", config.tasks), config, tokenizer), collator_for(tokenizer)
    trained, held = collate([ready.train[i] for i in range(4)]), collate([ready.validation["boolq"][i] for i in range(4)])
    assert trained["input_ids"].shape == (1, sum(ready.train[i]["length"] for i in range(4))) and "attention_mask" not in trained
    assert held["input_ids"].shape[0] == 4 and useful_tokens(trained) == trained["input_ids"].numel()
    assert (trained["position_ids"] == 0).sum() == 4
    row = ready.train[0]
    source = read_rows("toy", config.tasks).filter(lambda r: r["task"] == row["task"] and r["row"] == row["row"])
    assert tokenizer.decode(row["input_ids"][row["graded_from"] :], skip_special_tokens=True).strip() == source[0]["output"]


# --- order


def test_by_length_is_another_order_each_epoch_and_the_same_for_a_resumed_run():
    lengths = torch.randint(5, 60, (200,)).tolist()
    sampler = ByLength(lengths, 8, seed=3)
    orders = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
    assert all(sorted(order) == list(range(200)) for order in orders) and orders[0] != orders[1] != orders[2]
    resumed = ByLength(lengths, 8, seed=3)
    resumed.set_epoch(2)
    assert list(resumed) == orders[2] and list(ByLength(lengths, 8, seed=4)) != orders[0]
    assert sampling_arguments(DataConfig(sampling="by-length")) == {"train_sampling_strategy": "group_by_length"}
    assert sampling_arguments(DataConfig(sampling="packed")) == sampling_arguments(DataConfig()) == {}


def test_what_each_sampling_costs():
    lengths, tasks = [10, 50] * 100, ["a", "b"] * 100
    costs, mixes = {}, {}
    for sampling in ("random", "packed", "by-length"):
        batches = epoch_batches(lengths, sampling, 4, seed=1)
        assert sorted(i for batch in batches for i in batch) == list(range(200))
        costs[sampling], mixes[sampling] = computed_tokens(lengths, batches, sampling), effective_tasks(tasks, batches)
    assert costs["packed"] == sum(lengths) < costs["by-length"] * 1.01 < costs["random"]
    assert 1 <= mixes["by-length"] < 1.3 < 1.5 < mixes["random"] == mixes["packed"] <= 2
    assert effective_tasks(["a", "b", "c", "d"], [[0, 1, 2, 3]]) == pytest.approx(4) and effective_tasks(["a", "b"], [[0], [1]]) == 1


# --- files, counts and the cache


def folder_of(tmp_path, rows, name="train", task="boolq"):
    (tmp_path / task).mkdir(parents=True, exist_ok=True)
    (tmp_path / task / f"{name}.json").write_text(rows if isinstance(rows, str) else json.dumps(rows))
    return str(tmp_path)


def test_tokens_are_kept_on_disk_by_content_and_settings(tmp_path, monkeypatch):
    import datasets

    import d2mora.data

    tokenizer, calls = AutoTokenizer.from_pretrained(toy_base()), []
    real = d2mora.data.encode_row
    monkeypatch.setattr(d2mora.data, "encode_row", lambda *args: calls.append(1) or real(*args))
    monkeypatch.setattr(d2mora.data, "cache_key", lambda rows, tokenizer, config, key=d2mora.data.cache_key: key(rows, tokenizer, config) + "t")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = list(toy_rows("toy", "boolq", "train"))[:30]

    def encoded(path, **keys):
        calls.clear()
        config = DataConfig(path=path, tasks=["boolq"], **keys)
        return len(calls) or prepare(read_rows(path, ["boolq"]), config, tokenizer), len(calls)

    path = folder_of(tmp_path / "one", rows)
    first, made = encoded(path)
    again, remade = encoded(path, sampling="packed", validation_rows=3)
    assert made == 30 and remade == 0 and len(again.train) == 27
    assert encoded(path, cutoff=500)[1] == 30 and encoded(path, prompt="official")[1] == 30 and encoded(path)[1] == 0
    other = [rows[0] | {"output": "the correct answer is " + rows[1]["answer"], "answer": rows[1]["answer"]}, *rows[1:]]
    changed, anew = encoded(folder_of(tmp_path / "one", other if rows[0]["answer"] != rows[1]["answer"] else rows[1:]))
    assert anew > 0 and changed.train["input_ids"][:] != first.train["input_ids"][:]


def test_repeated_rows_and_questions_of_the_test_set_are_counted(tmp_path):
    rows = list(toy_rows("toy", "boolq", "train"))[:20]
    folder_of(tmp_path, rows + rows[:3])
    path = folder_of(tmp_path, [rows[5] | {"instruction": rows[5]["instruction"].replace(" ", "  ").upper()}, *list(toy_rows("toy", "boolq", "test"))[:5]], "test")
    config = DataConfig(path=path, tasks=["boolq"])
    ready = prepare(read_rows(path, ["boolq"]), config, AutoTokenizer.from_pretrained(toy_base()))
    assert ready.counts["boolq"] == {"rows": 23, "published": 9427, "repeated": 3, "in_test": 1, "shortened": 0, "skipped": 0, "lost": 0}
    table = counts_table(ready.counts, config)
    assert "in test set" in table and "9427" in table and "skipped" not in table


def test_real_rows_are_surveyed_in_seconds(shared):
    import time

    rows = read_rows(str(shared / "data"), [task for task in TASKS if task != "hellaswag"])
    start = time.time()
    found = survey(rows, str(shared / "data"))
    assert time.time() - start < 30  # two seconds where nothing else runs; a loop over rows takes minutes
    assert {task: count["rows"] for task, count in found.items() if task != "winogrande"} == {t: n for t, n in PUBLISHED.items() if t not in ("winogrande", "hellaswag")}
    assert found["winogrande"] == {"rows": 40398, "published": 63238, "repeated": 2, "in_test": 0} and sum(PUBLISHED.values()) == 170_420


GOOD = toy_rows("toy", "boolq", "train")[0]
BAD = {
    "cut off in the middle": (json.dumps([GOOD] * 3)[:-40], [], ["boolq/train.json", "not JSON"]),
    "a row without a field": ([GOOD, {k: v for k, v in GOOD.items() if k != "output"}], [], ["boolq/train.json", "row 1", "'output'"]),
    "an answer outside its set": ([GOOD, GOOD, GOOD | {"answer": "perhaps"}], [], ["row 2", "'answer'", "perhaps", "true/false"]),
    "a cutoff too short": ([GOOD], ["data.cutoff=5"], ["data.cutoff"]),
    "a cutoff beyond the base": ([GOOD], ["data.cutoff=99999"], ["99999", "tokens"]),
    "too many validation rows": ([GOOD] * 3, ["data.validation_rows=3"], ["data.validation_rows=3"]),
    "no such sampling": ([GOOD], ["data.sampling=pakced"], ["data.sampling", "packed"]),
    "target modules not there": ([GOOD] * 3, ["adapter.target_modules=[query]"], ["target_modules"]),
}


@pytest.mark.parametrize("mistake", BAD)
def test_bad_input_is_one_line_and_status_2_in_training_and_in_a_dry_run(mistake, tmp_path, capsys):
    from d2mora.cli import main

    rows, keys, parts = BAD[mistake]
    path = folder_of(tmp_path / "data", rows)
    for way in (["--output", str(tmp_path / "run")], ["--dry-run"]):
        status = main(["train", "demo", f"data.path={path}", "data.tasks=[boolq]", *keys, *way])
        err = capsys.readouterr().err.strip().splitlines()
        assert status == 2 and len([line for line in err if line.startswith("d2mora:")]) == 1 and "Traceback" not in "".join(err)
        assert all(part in err[-1] for part in parts), err
        assert not (tmp_path / "run").exists()


def test_a_tokenizer_without_eos_is_refused_and_one_without_padding_is_not():
    tokenizer = trained_tokenizer("gpt2")
    assert tokenizer.pad_token_id is None and collator_for(tokenizer).pad_id == tokenizer.eos_token_id
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no EOS"):
        collator_for(tokenizer)


def test_an_error_of_one_of_several_processes_is_still_a_users_mistake(shared):
    rows = read_rows(str(shared / "data"), ["winogrande"]).select(range(20_000))
    config = DataConfig(path=str(shared / "data"), tasks=["winogrande"], cutoff=9)
    with pytest.raises(ValueError, match="data.cutoff"):
        prepare(rows, config, real_tokenizer(shared, "mistral"))


@pytest.mark.parametrize("sampling", ["packed", "by-length"])
def test_a_run_learns_from_each_sampling_and_packed_as_from_padded(sampling, tmp_path):
    from safetensors.torch import load_file

    from d2mora.recipe import load_recipe
    from d2mora.train import read_metrics
    from d2mora.train import train

    def run(name):
        keys = {"data.sampling": name, "data.tasks": ["boolq", "piqa"], "training.max_steps": 4, "training.per_device_train_batch_size": 4}
        keys |= {"training.gradient_accumulation_steps": 2, "training.logging_steps": 1, "training.warmup_steps": 0}
        folder = train(load_recipe("demo", keys), tmp_path / name)
        return [line["loss"] for line in read_metrics(folder) if "loss" in line], load_file(folder / "adapter/adapter_model.safetensors")

    (losses, weights), (padded, others) = run(sampling), run("random")
    flat = lambda tensors: torch.cat([tensors[key].flatten() for key in sorted(tensors)])
    apart = ((flat(weights) - flat(others)).norm() / flat(others).norm()).item()
    if sampling == "packed":
        assert losses == pytest.approx(padded, abs=1e-4) and apart < 1e-3, (losses, padded, apart)
    else:
        assert len(losses) == 4 and losses != pytest.approx(padded, abs=1e-3)
