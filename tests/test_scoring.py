"""Each protocol on real rows gives in a batch what it gives for one row alone, whatever is padded, shared, cut or left in training mode."""

import pytest
import torch
from helpers import adapted_stories, tiny_llama

from d2mora import scoring
from d2mora.data import read_task
from d2mora.scoring import PROTOCOLS, grade_batch, grade_batches, grade_rows, grading_order, make_item
from d2mora.scoring import option_scores, write_tokens
from d2mora.tasks import ANSWER_PREFIX, TASKS, evaluation_prompt, parse_answer, row_answers


choice_pairs, prompt_pairs = PROTOCOLS["choice"].pairs, PROTOCOLS["generate"].pairs


@pytest.fixture(scope="module")
def stories(shared):
    return adapted_stories(shared, lora_dropout=0.5)


def rows_of(stories, task, n=12, start=0):
    return read_task(stories[2], task, "test").to_list()[start : start + n]


@torch.no_grad()
def alone(model, tokenizer, context, option):
    "The log-likelihood of an option by one forward pass of its own."
    coded = tokenizer(context + option, return_offsets_mapping=True)
    ids, n = coded.input_ids, sum(end > len(context) for _, end in coded.offset_mapping)
    log_probs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return sum(float(log_probs[i - 1, ids[i]]) for i in range(len(ids) - n, len(ids)))


def published(model, tokenizer, prompt, beams):
    "One prompt without a mask, as the published scripts continue it."
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    with torch.no_grad():
        out = model.generate(input_ids=ids, num_beams=beams, max_new_tokens=32, do_sample=False, pad_token_id=0)
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def set_modes(model):
    "Training mode with dropout 0.5, but for some modules; the modes."
    model.train()
    for module in [*model.modules()][5::7]:
        module.training = False
    return [module.training for module in model.modules()]


@pytest.mark.parametrize(
    "protocol, task", [("choice", "boolq"), ("choice", "ARC-Easy"), ("content", "winogrande"), ("content", "hellaswag")]
)
def test_scores_equal_one_forward_per_option(stories, protocol, task):
    model, tokenizer, _ = stories
    rows, modes = rows_of(stories, task, 5), set_modes(model)
    graded = grade_rows(model, tokenizer, task, rows, protocol, batch_size=4)
    assert [module.training for module in model.modules()] == modes
    model.eval()
    for row, g in zip(rows, graded):
        for word, pair in zip(row_answers(row, task), PROTOCOLS[protocol].pairs(row, task, "plain"), strict=True):
            assert g["scores"][word] == pytest.approx(alone(model, tokenizer, *pair), abs=2e-3)
        assert g["predicted"] == max(g["scores"], key=g["scores"].get)


@pytest.mark.parametrize(
    "protocol, style, task", [("generate", "plain", "boolq"), ("official", "official", "openbookqa")]
)
def test_texts_equal_the_published_way(stories, protocol, style, task, monkeypatch):
    model, tokenizer, _ = stories
    rows, beams, modes = rows_of(stories, task, 5), PROTOCOLS[protocol].beams, set_modes(model)
    batch, single = (grade_rows(model, tokenizer, task, rows, protocol, style, batch_size=size) for size in (5, 1))
    assert batch == single and [module.training for module in model.modules()] == modes
    texts = [published(model.eval(), tokenizer, evaluation_prompt(row, style), beams) for row in rows]
    assert [g["predicted"] for g in batch] == [parse_answer(text, task) for text in texts]
    for g, text in zip(batch, texts):
        assert text.startswith(g["text"]) and (g["text"] == text or protocol == "generate" and g["predicted"])
    if protocol == "official":  # a cache that does not reorder its beams is noticed
        monkeypatch.setattr(scoring._BeamLayer, "reorder_cache", lambda self, beam_idx: None)
        assert grade_rows(model, tokenizer, task, rows, protocol, style) != batch


def test_what_rows_share_is_read_once_and_cut_where_they_differ(stories, monkeypatch):
    "Rows of another task begin alike for a while, or not at all."
    model, tokenizer, _ = stories
    read, forward = [], scoring._forward
    monkeypatch.setattr(
        scoring, "_forward", lambda m, ids, *more, **how: read.append(ids) or forward(m, ids, *more, **how)
    )
    boolq = [make_item(tokenizer, choice_pairs(row, "boolq", "official"), 512) for row in rows_of(stories, "boolq", 4)]
    prefix = scoring._read_prefix(model, [item.head for item in boolq])
    for task, style in (("piqa", "official"), ("piqa", "plain"), ("boolq", "official")):
        rows = rows_of(stories, task, 4)
        own, fresh = (grade_batch(model, tokenizer, task, rows, "choice", style, kept) for kept in (prefix, None))
        for a, b in zip(own, fresh):
            assert a["predicted"] == b["predicted"] and a["scores"] == pytest.approx(b["scores"], abs=2e-4)
    ids, past = prefix
    assert sum(len(own) == 1 for own in read) == 1 and past.get_seq_length() == len(ids) > 100
    with torch.no_grad():  # keys and values of other tokens are noticed
        past = model(torch.tensor([ids[:20] + [i + 1 for i in ids[20:]]]), use_cache=True).past_key_values
    wrong = grade_batch(model, tokenizer, "boolq", rows, "choice", "official", (ids, past))
    assert max(abs(a["scores"][w] - b["scores"][w]) for a, b in zip(own, wrong) for w in a["scores"]) > 1e-2


@pytest.mark.parametrize("protocol", ["choice", "official"])
def test_a_batch_is_graded_alike_to_the_last_bit_whatever_came_before(stories, protocol):
    "A run that was killed goes on with any batch, and has not read the prefix yet."
    model, tokenizer, _ = stories
    more = "Think of it slowly, and carefully, and once more, and then say what is right. "
    kinds = (("", 60), (more, 30), (more + "So, ", 20), ("", 10))  # the second batch shares more than the first
    text = "Please choose: {}{} is it, {}?\n\nSolution1: left\n\nSolution2: right\n\nAnswer format: solution1/solution2"
    texts = [text.format(shares, who, "so " * n) for shares, n in kinds for who in ("Mine", "What", "Hers")]
    rows = [{"instruction": text, "input": "", "output": "", "answer": "solution1"} for text in texts]

    def graded(numbers):
        return list(grade_batches(model, tokenizer, "piqa", rows, protocol, "official", 3, numbers))

    order = grading_order(rows, 3)
    whole = graded(order)
    for k in (3, 2, 1, 0):
        assert graded(order[3 * k : 3 * k + 3]) == [whole[k]]


def small(kind):
    "Other architectures, with random weights and the vocabulary of stories260K."
    import transformers as t

    sizes = dict(vocab_size=512, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    gpt2 = dict(vocab_size=512, n_embd=32, n_layer=2, n_head=4, n_positions=512)
    bloom = dict(vocab_size=512, hidden_size=32, n_layer=2, n_head=4)
    grouped = dict(intermediate_size=64, num_key_value_heads=2)
    makes = {
        "gpt2": lambda: t.GPT2LMHeadModel(t.GPT2Config(**gpt2)),
        "bloom": lambda: t.BloomForCausalLM(t.BloomConfig(**bloom)),
        "sliding": lambda: t.MistralForCausalLM(t.MistralConfig(**sizes, **grouped, sliding_window=24)),
    }
    torch.manual_seed(1)
    model = makes[kind]()
    for p in model.parameters():
        p.data.mul_(3)  # so that tokens matter
    return model.eval()


@pytest.mark.parametrize("kind", ["gpt2", "bloom", "sliding"])
def test_any_causal_model(stories, kind):
    model, tokenizer, _ = small(kind), *stories[1:]
    rows = rows_of(stories, "boolq", 3) + rows_of(stories, "boolq", 2, start=40)
    texts = [choice_pairs(row, "boolq", "plain") for row in rows]
    for pairs, own in zip(texts, option_scores(model, [make_item(tokenizer, pairs, None) for pairs in texts])):
        assert own.tolist() == pytest.approx([alone(model, tokenizer, *pair) for pair in pairs], abs=2e-3)
    heads = [make_item(tokenizer, prompt_pairs(row, "boolq", "plain"), None).head for row in rows]
    settings = dict(max_new_tokens=scoring.NEW_TOKENS, do_sample=False, pad_token_id=0, eos_token_id=2)
    for beams in (1, 4):
        for head, ids in zip(heads, write_tokens(model, tokenizer, heads, beams)):
            with torch.no_grad():
                single = model.generate(input_ids=torch.tensor([head]), num_beams=beams, **settings)[0, len(head) :]
            assert ids[: len(single)] == single.tolist()


def test_prompt_and_option_are_tokenized_as_one_text(shared):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shared / "tokenizers/mistral-v1")
    model, prompt = tiny_llama(vocab_size=32_000), evaluation_prompt({"instruction": "is it?", "input": ""}, "official")
    pairs = [(prompt, f"{ANSWER_PREFIX} {word}") for word in ("true", "false")]
    for pair, own in zip(pairs, option_scores(model, [make_item(tokenizer, pairs, None)])[0].tolist()):
        assert own == pytest.approx(alone(model, tokenizer, *pair), abs=1e-3)
        glued = tokenizer(pair[0]).input_ids + tokenizer(pair[1], add_special_tokens=False).input_ids
        assert glued != tokenizer("".join(pair)).input_ids  # the published prompt's last spaces are other tokens there


def test_long_prompts_are_cut_at_their_beginning_and_counted(stories):
    model, tokenizer, _ = stories
    rows = rows_of(stories, "hellaswag", 12, start=9000)
    graded = grade_rows(model, tokenizer, "hellaswag", rows, batch_size=4)
    texts = [evaluation_prompt(row) + ANSWER_PREFIX for row in rows]
    assert [g["shortened"] for g in graded] == [len(tokenizer(text + " ending1").input_ids) > 512 for text in texts]
    assert any(g["shortened"] for g in graded)
    for row, text in zip(rows, texts):
        item = make_item(tokenizer, choice_pairs(row, "hellaswag", "plain"), 512)
        read = tokenizer.decode(item.head, skip_special_tokens=True)
        assert len(item.head) + max(map(len, item.tails)) <= 512 and text.startswith(read) == (not item.shortened)
        assert "Answer format: ending1/ending2/ending3/ending4" in read
    assert len(grade_rows(model, tokenizer, "hellaswag", rows[:4], "generate")) == 4  # room to write is left


@pytest.mark.parametrize("protocol", ["choice", "content"])
def test_lm_eval_gives_the_same_accuracy(stories, protocol, monkeypatch):
    "lm-eval is given the adapted model as an object, and the task files of the package."
    lm_eval = pytest.importorskip("lm_eval", reason="pip install d2mora[eval]")
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (model, tokenizer, data), compared = stories, 0
    metadata = {"data": data, "limit": 8}
    manager = TaskManager(include_path=scoring.lm_eval_tasks(), include_defaults=False, metadata=metadata)
    names = {task: f"d2mora_{protocol}_{task.lower().replace('-', '_')}" for task in TASKS}
    lm = HFLM(pretrained=model.eval(), tokenizer=tokenizer, batch_size=8, max_length=512)
    found = lm_eval.simple_evaluate(lm, tasks=list(names.values()), task_manager=manager, bootstrap_iters=0)["samples"]
    for task, name in names.items():
        graded = grade_rows(model, tokenizer, task, rows_of(stories, task, 8), protocol)
        for s, g in zip(sorted(found[name], key=lambda s: s["doc_id"]), graded, strict=True):
            if not g["shortened"]:
                compared += 1
                assert s["acc"] == g["right"], task
                assert [float(r[0]) for r in s["filtered_resps"]] == pytest.approx([*g["scores"].values()], abs=2e-3)
                assert s.get("acc_norm") in (None, g["predicted_by_length"] == g["answer"])
    assert compared > 32
