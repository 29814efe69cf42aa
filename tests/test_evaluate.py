"""Grading on real rows and real processes: what is batched, padded, cut or left in training mode must not change it."""

import json

import peft
import pytest
import torch

from d2mora.cli import main
from d2mora.data import read_task
from d2mora import scoring
from d2mora.evaluate import ask, evaluate, on_device
from d2mora.scoring import NEW_TOKENS, RoomLayer, write, write_tokens
from d2mora.scoring import beginning, option_scores, ready
from d2mora.scoring import PROTOCOLS, batch_differences, choice_pairs, grade_batch, grade_rows, grader, items_of, plan, prompt_pairs
from d2mora.evaluate import mean_chance, summary, wilson_interval
from d2mora.tasks import ANSWER_PREFIX, TASKS, content_pairs, evaluation_prompt, parse_answer, question_and_texts, row_answers
from d2mora.recipe import load_recipe
from d2mora.train import train
from helpers import adapted_stories


@pytest.fixture(scope="module")
def stories(shared):
    return adapted_stories(shared, lora_dropout=0.5)


def rows_of(stories, task, n=12, start=0):
    return read_task(stories[2], task, "test").to_list()[start:start + n]


@pytest.mark.parametrize("task", ["boolq", "winogrande", "ARC-Easy"])
def test_choice_equals_one_forward_per_option(stories, task):
    model, tokenizer, _ = stories
    rows = rows_of(stories, task, 6)
    model.train()  # dropout 0.5: off while grading, on again afterwards
    graded = grade_rows(model, tokenizer, task, rows, batch_size=4)
    assert model.training and all(m.training for m in model.modules())
    model.eval()
    for row, g in zip(rows, graded):
        prompt = evaluation_prompt(row) + ANSWER_PREFIX
        for word in row_answers(row, task):
            ids = tokenizer(f"{prompt} {word}").input_ids
            tail = len(ids) - len(tokenizer(prompt).input_ids)
            with torch.no_grad():
                logp = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            alone = sum(float(logp[i - 1, ids[i]]) for i in range(len(ids) - tail, len(ids)))
            assert g["scores"][word] == pytest.approx(alone, abs=2e-3)
        assert g["predicted"] == max(g["scores"], key=g["scores"].get)


@pytest.mark.parametrize("style", ["plain", "official"])
def test_generate_in_a_batch_equals_batch_one(stories, style):
    model, tokenizer, _ = stories
    for task in ("boolq", "social_i_qa"):
        rows = rows_of(stories, task, 5)
        batched = grade_rows(model, tokenizer, task, rows, "generate", style, batch_size=5)
        alone = grade_rows(model, tokenizer, task, rows, "generate", style, batch_size=1)
        assert [g["text"] for g in batched] == [g["text"] for g in alone]


def published(model, tokenizer, prompt):
    "The published way: batch 1, no mask, 4 beams, 32 tokens."
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    with torch.no_grad():
        out = model.generate(input_ids=ids, num_beams=4, max_new_tokens=32, do_sample=False, pad_token_id=0)
    return tokenizer.decode(out[0, ids.shape[1]:], skip_special_tokens=True)


def test_official_is_the_published_way_and_a_batch_changes_nothing(stories):
    model, tokenizer, _ = stories
    for task in ("boolq", "openbookqa"):
        rows = rows_of(stories, task, 5)
        graded = grade_rows(model, tokenizer, task, rows, "official", "official", batch_size=5)
        texts = [published(model.eval(), tokenizer, evaluation_prompt(row, "official")) for row in rows]
        alone = grade_rows(model, tokenizer, task, rows, "official", "official", batch_size=1)
        assert [g["text"] for g in alone] == texts
        assert [g["predicted"] for g in alone] == [parse_answer(text, task) for text in texts]
        differing = batch_differences(model, tokenizer, task, rows, batch_size=5)
        assert {d["row"] for d in differing} == {i for i, (g, text) in enumerate(zip(graded, texts)) if g["text"] != text}
        assert all(d["margin"] < 1e-4 for d in differing), differing


def test_a_cache_that_forgets_to_reorder_its_beams_is_noticed(stories, monkeypatch):
    model, tokenizer, _ = stories
    rows = rows_of(stories, "openbookqa", 6)
    right = [g["text"] for g in grade_rows(model, tokenizer, "openbookqa", rows, "official", "official")]
    monkeypatch.setattr(RoomLayer, "reorder_cache", lambda self, beam_idx: None)
    assert [g["text"] for g in grade_rows(model, tokenizer, "openbookqa", rows, "official", "official")] != right


@pytest.fixture
def reads(monkeypatch):
    "The shapes of what is read, forward pass by forward pass."
    seen, forward = [], scoring.forward
    monkeypatch.setattr(scoring, "forward", lambda model, ids, *args, **kwargs: seen.append(tuple(ids.shape)) or forward(model, ids, *args, **kwargs))
    return seen


@pytest.mark.parametrize("protocol", ["choice", "content", "generate", "official"])
def test_what_rows_share_is_read_once_with_the_same_result(stories, monkeypatch, reads, protocol):
    model, tokenizer, _ = stories
    rows = rows_of(stories, "social_i_qa", 8)
    shared = grade_rows(model, tokenizer, "social_i_qa", rows, protocol, "official", batch_size=3)
    beginnings = [(n, length) for n, length in reads if n == 1]
    assert protocol == "content" or len(beginnings) == 1 and beginnings[0][1] > 100  # the template, once for all batches
    monkeypatch.setattr(scoring, "SHARED", 10**9)
    apart = grade_rows(model, tokenizer, "social_i_qa", rows, protocol, "official", batch_size=3)
    for a, b in zip(shared, apart):
        assert a.get("text") == b.get("text") and a["predicted"] == b["predicted"]
        assert a.get("scores", {}) == pytest.approx(b.get("scores", {}), abs=2e-4)


def test_a_kept_beginning_is_cut_where_rows_part_and_never_replaced(stories, reads):
    "Rows of another task begin alike for a while, or not at all, or share more among themselves."
    model, tokenizer, _ = stories
    kept = beginning(items_of(model, tokenizer, "boolq", rows_of(stories, "boolq", 4), "choice", "official"))
    ids = list(kept.ids)
    for task, style in (("boolq", "official"), ("piqa", "official"), ("piqa", "plain"), ("hellaswag", "official"), ("boolq", "official")):
        rows = rows_of(stories, task, 4)
        own, fresh = (grade_batch(model, tokenizer, task, rows, "choice", style, k) for k in (kept, None))
        for a, b in zip(own, fresh):
            assert a["predicted"] == b["predicted"] and a["scores"] == pytest.approx(b["scores"], abs=2e-4)
    assert kept.ids == ids and len(ids) > 100 and len(kept.past) == 1
    assert 5 < len([shape for shape in reads if shape[0] == 1]) < 10  # five without anything kept, and fewer than five with


@pytest.mark.parametrize("protocol", ["choice", "content", "generate", "official"])
def test_a_batch_is_graded_alike_to_the_last_bit_whatever_came_before(stories, protocol):
    "A run that was killed goes on with any batch; only its first reads what the rows begin with."
    model, tokenizer, _ = stories
    more = "Think of it slowly, and carefully, and once more, and then say what is right. "
    kinds = (("", 60), (more, 30), (more + "So, ", 20), ("", 10))  # longest first: the second batch shares much more than the first, the third a little more than that
    ask = "Please choose: {}{} is it, {}?\n\nSolution1: left\n\nSolution2: right\n\nAnswer format: solution1/solution2".format
    rows = [{"instruction": ask(shares, who, "so " * n), "input": "", "output": "", "answer": "solution1"} for shares, n in kinds for who in ("Mine", "What", "Hers")]
    batches = [plan(rows, 3)[start:start + 3] for start in range(0, 12, 3)]
    whole = grader(model, tokenizer, "piqa", rows, protocol, "official", 3)
    inorder = [whole(batch) for batch in batches]
    for batch, expected in list(zip(batches, inorder))[::-1]:
        assert grader(model, tokenizer, "piqa", rows, protocol, "official", 3)(batch) == expected


def test_a_beginning_of_other_tokens_is_noticed(stories):
    "The check above can fail: keys and values of other tokens give other scores."
    model, tokenizer, _ = stories
    rows = rows_of(stories, "piqa", 4)
    right, kept = grade_batch(model, tokenizer, "piqa", rows, "choice", "official"), beginning(items_of(model, tokenizer, "piqa", rows, "choice", "official"))
    with torch.no_grad():
        kept.past = [model(torch.tensor([kept.ids[:20] + [i + 1 for i in kept.ids[20:-1]] + kept.ids[-1:]]), use_cache=True).past_key_values]
    wrong = grade_batch(model, tokenizer, "piqa", rows, "choice", "official", kept)
    assert max(abs(a["scores"][w] - b["scores"][w]) for a, b in zip(right, wrong) for w in a["scores"]) > 1e-2


def test_a_quantized_model_stays_where_it_was_loaded(monkeypatch):
    class Refuses(torch.nn.Linear):
        def to(self, *args): raise ValueError("`.to` is not supported for `8-bit` bitsandbytes models")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "1")
    for mark in ({"is_quantized": True}, {"hf_device_map": {"": "cuda:0"}}):
        model = Refuses(1, 1)
        vars(model).update(mark)
        assert on_device(model) is model
    with pytest.raises(ValueError, match="8-bit"):
        on_device(Refuses(1, 1))
    monkeypatch.setattr(torch.nn.Linear, "to", lambda self, device: device)
    assert on_device(torch.nn.Linear(1, 1)) == "cuda:1"


@pytest.mark.parametrize("task", list(TASKS))
def test_content_equals_one_forward_per_option(stories, task):
    model, tokenizer, _ = stories
    rows = rows_of(stories, task, 3)
    for row, g in zip(rows, grade_rows(model, tokenizer, task, rows, "content")):
        for word, (context, option) in zip(row_answers(row, task), content_pairs(row, task)):
            ids, n = tokenizer(context + option).input_ids, len(tokenizer(context).input_ids)
            with torch.no_grad():
                logp = model.eval()(torch.tensor([ids])).logits[0].log_softmax(-1)
            assert g["scores"][word] == pytest.approx(sum(float(logp[i - 1, ids[i]]) for i in range(n, len(ids))), abs=2e-3)


def test_every_real_row_can_be_taken_apart(stories):
    for task in TASKS:
        for row in rows_of(stories, task, 11_000):
            question, texts = question_and_texts(row, task)
            assert question in row["instruction"] and all(text in row["instruction"] for text in texts if task != "boolq")
            assert len(texts) == len(row_answers(row, task)) and all(option.strip() for _, option in content_pairs(row, task))


def small(kind):
    "Other people's architectures, with random weights and the vocabulary of stories260K."
    import transformers as t

    sizes = dict(vocab_size=512, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    makes = {"gpt2": lambda: t.GPT2LMHeadModel(t.GPT2Config(vocab_size=512, n_embd=32, n_layer=2, n_head=4, n_positions=512)),
             "opt": lambda: t.OPTForCausalLM(t.OPTConfig(**sizes, ffn_dim=64, max_position_embeddings=512, word_embed_proj_dim=32)),
             "bloom": lambda: t.BloomForCausalLM(t.BloomConfig(vocab_size=512, hidden_size=32, n_layer=2, n_head=4)),
             "neox": lambda: t.GPTNeoXForCausalLM(t.GPTNeoXConfig(**sizes, intermediate_size=64)),
             "sliding": lambda: t.MistralForCausalLM(t.MistralConfig(**sizes, intermediate_size=64, num_key_value_heads=2, sliding_window=24)),
             "qwen": lambda: t.Qwen2ForCausalLM(t.Qwen2Config(**sizes, intermediate_size=64, num_key_value_heads=2))}
    torch.manual_seed(1)
    model = makes[kind]()
    for p in model.parameters():
        p.data.mul_(3)  # so that tokens matter
    return model.eval()


@pytest.mark.parametrize("kind", ["gpt2", "opt", "bloom", "neox", "sliding", "qwen"])
def test_any_causal_model(stories, kind):
    model, tokenizer, _ = small(kind), *stories[1:]
    rows = rows_of(stories, "boolq", 5) + rows_of(stories, "boolq", 3, start=40)
    items = [ready(tokenizer, choice_pairs(row, "boolq", "plain"), None) for row in rows]
    for row, own in zip(rows, option_scores(model, items)):
        for word, score in zip(("true", "false"), own.tolist()):
            ids, n = tokenizer(evaluation_prompt(row) + ANSWER_PREFIX + f" {word}").input_ids, len(tokenizer(evaluation_prompt(row) + ANSWER_PREFIX).input_ids)
            with torch.no_grad():
                logp = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            assert score == pytest.approx(sum(float(logp[i - 1, ids[i]]) for i in range(n, len(ids))), abs=2e-3)
    heads = [ready(tokenizer, prompt_pairs(row, "boolq", "plain"), None).head for row in rows]
    for beams in (1, 4):
        batch = write_tokens(model, tokenizer, heads, beams)
        for head, ids in zip(heads, batch):
            with torch.no_grad():
                out = model.generate(input_ids=torch.tensor([head]), num_beams=beams, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0, eos_token_id=2)
            alone = out[0, len(head):].tolist()
            assert ids[:len(alone)] == alone


def test_stopping_when_decided_changes_no_prediction(stories):
    model, tokenizer, _ = stories
    model = model.base_model.model  # any model will do; this one has heard of "true"
    prompts = [f"{word} and " for word in ("Once upon a time", "It was true", "The cat said", "one two")]
    whole = [parse_answer(text, "boolq") for text in write(model, tokenizer, prompts)]
    assert [parse_answer(text, "boolq") for text in write(model, tokenizer, prompts, "boolq")] == whole


def test_the_seam_is_tokenized_as_one_text(shared):
    from helpers import tiny_llama
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shared / "tokenizers/mistral-v1")
    model, prompt = tiny_llama(vocab_size=32_000), evaluation_prompt({"instruction": "is it?", "input": ""}, "official")
    pairs = [(prompt, f"{ANSWER_PREFIX} {word}") for word in ("true", "false")]
    score = option_scores(model, [ready(tokenizer, pairs, None)])[0].tolist()
    for (context, option), own in zip(pairs, score):
        coded = tokenizer(context + option, return_offsets_mapping=True)
        ids, n = coded.input_ids, sum(end > len(context) for _, end in coded.offset_mapping)
        with torch.no_grad():
            logp = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        assert own == pytest.approx(sum(float(logp[i - 1, ids[i]]) for i in range(len(ids) - n, len(ids))), abs=1e-3)
        glued = tokenizer(context).input_ids + tokenizer(option, add_special_tokens=False).input_ids
        assert glued != ids  # the trap: the published prompt's last spaces are another token there


def test_long_prompts_are_cut_at_their_beginning_and_counted(stories):
    model, tokenizer, _ = stories
    rows = rows_of(stories, "hellaswag", 12, start=9000)
    graded = grade_rows(model, tokenizer, "hellaswag", rows, batch_size=4)
    assert sum(g["shortened"] for g in graded) == sum(len(tokenizer(evaluation_prompt(r) + ANSWER_PREFIX + " ending1").input_ids) > 512 for r in rows) > 0
    for row in rows:
        item = ready(tokenizer, choice_pairs(row, "hellaswag", "plain"), 512)
        text = tokenizer.decode(item.head, skip_special_tokens=True)
        assert len(item.head) + max(map(len, item.tails)) <= 512 and (evaluation_prompt(row) + ANSWER_PREFIX).startswith(text) == (not item.shortened)
        assert "Answer format: ending1/ending2/ending3/ending4" in text
    assert summary(graded, rows, "hellaswag")["shortened"] == sum(g["shortened"] for g in graded)
    written = grade_rows(model, tokenizer, "hellaswag", rows[:4], "generate")
    assert len(written) == 4  # room for what is written is left


def test_unread_answers_are_counted_and_wrong(stories):
    model, tokenizer, _ = stories
    rows = rows_of(stories, "winogrande", 6)
    graded = grade_rows(model, tokenizer, "winogrande", rows, "generate")
    unread = [g for g in graded if g["predicted"] is None]
    assert summary(graded, rows, "winogrande")["unparsed"] == len(unread) / 6 and not any(g["right"] for g in unread)


def test_chance_is_the_rows_own(stories):
    rows = rows_of(stories, "ARC-Easy", 2000)
    chance = mean_chance(rows, "ARC-Easy")
    assert {len(row_answers(r, "ARC-Easy")) for r in rows} >= {3, 4, 5} and 0.24 < chance < 0.26 and chance != 0.25


def test_modules_keep_their_own_state(stories):
    model, tokenizer, _ = stories
    model.train()
    kept = [m for m in model.modules()][5::7]
    for m in kept:
        m.training = False
    before = [m.training for m in model.modules()]
    for protocol in PROTOCOLS:
        grade_rows(model, tokenizer, "boolq", rows_of(stories, "boolq", 2), protocol, "official")
        assert [m.training for m in model.modules()] == before
    model.eval()


def test_wilson_interval_covers_the_truth_as_often_as_it_says():
    hits, generator = 0, torch.Generator().manual_seed(0)
    for right in torch.binomial(torch.full((4000,), 50.0), torch.full((4000,), 0.9), generator=generator).int().tolist():
        low, high = wilson_interval(right, 50)
        hits += low <= 0.9 <= high
    assert 0.93 < hits / 4000 < 0.98


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return train(load_recipe("demo", {"training.max_steps": 4, "data.tasks": ["boolq"], "training.logging_steps": 1, "training.disable_tqdm": True}), tmp_path_factory.mktemp("runs") / "run")


def test_results_files(run):
    result = evaluate(run, tasks=["boolq", "hellaswag"], limit=10)
    stored = json.loads((run / "evaluation-choice.json").read_text())
    assert json.loads(json.dumps(result)) == stored and stored["protocol"] == "choice"
    assert stored["average"] == pytest.approx(sum(t["accuracy"] for t in stored["tasks"].values()) / 2)
    for task in ("boolq", "hellaswag"):
        assert stored["tasks"][task]["n"] == 10 and 0 <= stored["tasks"][task]["accuracy"] <= 1
    lines = [json.loads(line) for line in (run / "evaluation-choice.jsonl").read_text().splitlines()]
    assert sum(line["right"] for line in lines if line["task"] == "boolq") == round(10 * stored["tasks"]["boolq"]["accuracy"])
    evaluate(run, tasks=["boolq"], limit=4, protocol="generate")
    text = (run / "report.md").read_text()
    assert "Protocol choice" in text and "Protocol generate" in text and "LLaMA-7B" not in text  # one toy task is no match for the paper's rows


def test_run_adapter_folder_and_base_agree(run):
    whole, alone = (evaluate(target, data="toy", tasks=["boolq"], limit=20)["tasks"] for target in (run, run / "adapter"))
    rounded = lambda found: json.loads(json.dumps(found), parse_float=lambda text: round(float(text), 5))  # torch 2.15 adds in another order where memory lies otherwise
    assert rounded(whole) == rounded(alone)
    fresh = train(load_recipe("demo", {"training.max_steps": 1, "training.learning_rate": 0, "data.tasks": ["boolq"], "training.logging_steps": 1, "training.disable_tqdm": True}), run.parent / "fresh")
    fresh, base = (evaluate(target, base, data="toy", tasks=["boolq"], limit=20)["tasks"]["boolq"] for target, base in ((fresh, None), (None, "toy")))
    assert fresh["accuracy"] == base["accuracy"] and fresh["answer_loss"] == pytest.approx(base["answer_loss"], rel=1e-6)


def test_bad_targets(run, tmp_path, stories):
    with pytest.raises(ValueError, match="no adapter"):
        evaluate(tmp_path)
    with pytest.raises(ValueError, match="does not fit base"):
        evaluate(run, base=str(stories[2]).replace("data", "models/stories260K"))
    (tmp_path / "recipe.yaml").write_text((run / "recipe.yaml").read_text())
    with pytest.raises(ValueError, match="unfinished"):
        evaluate(tmp_path)
    (tmp_path / "data" / "boolq").mkdir(parents=True)
    (tmp_path / "data" / "boolq" / "test.json").write_text("[]")
    with pytest.raises(ValueError, match="test.json"):
        evaluate(run, data=str(tmp_path / "data"))
    with pytest.raises(ValueError, match="piqa"):
        evaluate(run, data=str(tmp_path / "data"), tasks=["piqa"])
    assert not list(tmp_path.glob("evaluation*"))


def test_ask(run, capsys):
    answers = ask("Please answer the following question with true or false, question: is it so?\n\nAnswer format: true/false", run)
    assert answers.keys() == {"base", "adapter"}
    assert main(["evaluate", str(run), "--ask", "is it so?"]) == 0
    out = capsys.readouterr().out
    assert "base:" in out and "adapter:" in out


def test_the_table_on_the_command_line(run, capsys):
    assert main(["evaluate", str(run), "--tasks", "boolq,piqa", "--limit", "5"]) == 0
    out = capsys.readouterr().out
    assert "boolq" in out and "average" in out and "95 % interval" in out
    assert set(TASKS) >= {"boolq", "piqa"}


def test_a_run_is_graded_on_the_tasks_that_it_was_trained_on(run, capsys):
    assert list(evaluate(run, limit=2)["tasks"]) == ["boolq"]
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "trained on" in line]
    assert "not on piqa, " in line and f"--tasks {','.join(TASKS)}" in line
    assert list(evaluate(run, tasks=["boolq", "piqa"], limit=2)["tasks"]) == ["boolq", "piqa"] and "trained on" not in capsys.readouterr().err
    assert list(evaluate(run / "adapter", data="toy", limit=2, output=run / "other")["tasks"]) == list(TASKS) and "trained on" not in capsys.readouterr().err


def test_the_papers_rows_are_printed_where_asked_for(run, capsys):
    assert main(["evaluate", str(run), "--limit", "2"]) == 0 and "LLaMA-7B" not in capsys.readouterr().out
    assert main(["evaluate", str(run), "--limit", "2", "--paper"]) == 0 and "LLaMA-7B D2MoRA 3,4,16" in capsys.readouterr().out
