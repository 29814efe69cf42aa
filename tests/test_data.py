"""Rows to graded tokens: what one notebook run cannot see (real tokenizers, all real rows, order, caches)."""

import gzip
import json

import pytest
import torch
from transformers import AutoTokenizer

from d2mora.data import Collator, DataConfig, answer_start, collator_for, encode, prepare, read_rows, read_task, shorten_prompt, tokenize
from d2mora.tasks import TASKS, toy_base, toy_rows, training_prompt


def columns(rows):
    return {key: [row[key] for row in rows] for key in ("instruction", "input", "output", "answer")}


def graded_text(tokenizer, coded, i):
    return tokenizer.decode(coded["input_ids"][i][coded["graded_from"][i]:], skip_special_tokens=True).strip()


def real_tokenizer(shared, name):
    return AutoTokenizer.from_pretrained({"toy": toy_base(), "stories": shared / "models/stories260K", "mistral": shared / "tokenizers/mistral-v1"}[name])


@pytest.mark.parametrize("style", ["plain", "official"])
@pytest.mark.parametrize("name", ["stories", "mistral"])
def test_the_graded_tokens_are_the_answer_and_eos(shared, name, style):
    tokenizer = real_tokenizer(shared, name)
    for task in TASKS:
        rows = read_task(str(shared / "data"), task, "test").to_list()[:5]
        coded = encode(columns(rows), tokenizer, DataConfig(prompt=style, cutoff=2048))
        for i, row in enumerate(rows):
            assert graded_text(tokenizer, coded, i) == row["output"]
            assert coded["input_ids"][i][-1] == tokenizer.eos_token_id and coded["fate"][i] == "whole"


@pytest.mark.parametrize("style", ["plain", "official"])
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
