"""The toy world: split by fact, format of the real tasks, tokenizer, hashes, gates, and the frozen base at chance."""

import json
import re
import shutil
import sys
from itertools import product
from pathlib import Path

import pytest
from program import program
from transformers import AutoModelForCausalLM, AutoTokenizer

import d2mora
from d2mora.tasks import ANSWER_PREFIX, TASKS, evaluation_prompt, parse_answer, row_answers, score_options, training_prompt
from d2mora.toy import RELATIONS, SIZES, TOY_TASKS, TOY_WORLDS, toy_base, toy_questions, toy_rows, toy_world

ROOT = Path(__file__).parents[1]
ASSETS = Path(d2mora.__file__).parent / "assets"


def asked(world, split):
    return set().union(*(q.facts for task in TASKS for q in toy_questions(world, task, split)))


def test_no_tested_fact_is_asked_in_training():
    "From the generator's record, over both worlds and all tasks; the record holds wrong options' facts too."
    trained = asked("toy", "train") | asked("toy-hard", "train")
    tested = asked("toy", "test") | asked("toy-hard", "test")
    assert not trained & tested
    assert len(tested) > 90 and len(trained) > 280
    world = toy_world()
    assert trained | tested <= set(world.facts)


@pytest.mark.parametrize("world, task", list(product(TOY_WORLDS, TASKS)))
def test_the_record_is_complete(world, task):
    "Every thing that a question's words name is in its record, with its relation; two hops record both facts."
    facts, names = toy_world().facts, {x for x, _ in toy_world().facts}
    for q in toy_questions(world, task, "test", 50):
        named = names & set(re.findall(r"\w+", " ".join([q.text, *q.options])))
        assert named and named <= {x for x, _ in q.facts}
        relations = {r for _, r in q.facts} - {"partner"}
        assert len(relations) == 1 and relations <= set(TOY_TASKS[task][1])
        two = "partner" in {r for _, r in q.facts}
        assert two == ("partner" in q.text) and not (two and world == "toy")
        ends = {facts[x, "partner"] for x in named} if two else named
        assert {x for x, r in q.facts if r in RELATIONS} == ends


@pytest.mark.parametrize("task", TASKS)
def test_easy_answers_are_true(task):
    "Check every easy answer against the facts by reading the row's text again."
    world = toy_world()
    for q in toy_questions("toy", task, "test"):
        right = q.options[TASKS[task].answers.index(q.answer)]
        (relation,) = {r for _, r in q.facts}
        says = [s.format(x=f"the {right}", v="") for s in RELATIONS[relation].says]
        if task == "boolq":
            (thing, value), = [(x, world.facts[x, r]) for x, r in q.facts]
            assert (right == "true") == any(q.text == s.format(x=f"the {thing}", v=value) for s in RELATIONS[relation].says)
        elif TOY_TASKS[task][0] == "value":
            (thing, _), = q.facts
            assert world.facts[thing, relation] == right and says
        else:
            holds = [o for o in q.options if world.facts[o, relation] in re.findall(r"\w+", q.text)]
            assert holds == [right]


def test_hard_conventions_conflict_on_shared_facts():
    "ARC-Easy and ARC-Challenge ask about the same colors and homes but answer by different conventions."
    world = toy_world()

    def holds(q, option):
        "Whether an option is true, read from the text: for a thing its value (or its partner's) stands in the question."
        (relation,), two = {r for _, r in q.facts} - {"partner"}, "partner" in q.text
        ends = lambda thing: world.facts[world.facts[thing, "partner"] if two else thing, relation]
        if TOY_TASKS[q.task][0] == "value":
            return ends(next(x for x in re.findall(r"\w+", q.text) if (x, relation) in world.facts)) == option
        return ends(option) in re.findall(r"\w+", q.text)

    for task, shift in (("ARC-Easy", 0), ("ARC-Challenge", 1), ("openbookqa", 0), ("piqa", 1), ("social_i_qa", 0)):
        questions = toy_questions("toy-hard", task, "test")
        assert 0.15 < sum("partner" in q.text for q in questions) / len(questions) < 0.35
        for q in questions:
            right, = [i for i, option in enumerate(q.options) if holds(q, option)]
            assert q.answer == TASKS[task].answers[(right + shift) % len(q.options)]
    facts = lambda task: set().union(*(q.facts for q in toy_questions("toy-hard", task, "train")))
    assert len(facts("ARC-Easy") & facts("ARC-Challenge")) > 40


@pytest.mark.parametrize("task", TASKS)
def test_toy_rows_are_laid_out_like_the_real_ones(shared, task):
    import gzip
    with gzip.open(shared / "data" / task / "test.json.gz", "rt") as file:
        real = json.load(file)[0]
    toy = toy_rows("toy", task, "test", 4)[0]

    def frame(text):
        labels = r"(?:Solution|Answer|Ending|Option)\d: "
        head = re.match(r".*?(?:question|sentence|blank.*?sentence):", text).group()
        return head, re.findall(rf"\s*{labels}|\s*Answer format: \S+$", text)

    assert list(toy) == list(real) and toy["input"] == real["input"] == ""
    assert [re.sub(r"^\s", "", m) if i == 0 else m for i, m in enumerate(frame(toy["instruction"])[1])] == \
           [re.sub(r"^\s", "", m) if i == 0 else m for i, m in enumerate(frame(real["instruction"])[1])]
    assert frame(toy["instruction"])[0] == frame(real["instruction"])[0]


@pytest.mark.parametrize("world, task, style", list(product(TOY_WORLDS, TASKS, ("plain", "official"))))
def test_tokenizer_knows_every_word(world, task, style):
    tokenizer = AutoTokenizer.from_pretrained(toy_base())
    for row in toy_rows(world, task, "test", 40):
        text = "".join(training_prompt(row, style))
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.unk_token_id not in ids and ids[0] == tokenizer.bos_token_id
        assert style == "official" or 20 <= len(ids) <= 60
        assert parse_answer(tokenizer.decode(ids), task) == (row["answer"] if style == "official" else parse_answer(text, task))
        assert len(tokenizer(" " + row["answer"], add_special_tokens=False)["input_ids"]) == 1
        for word in TASKS[task].answers:
            assert parse_answer(tokenizer.decode(tokenizer(f"{ANSWER_PREFIX} {word}")["input_ids"]), task) == word
    assert {tokenizer.pad_token, tokenizer.bos_token, tokenizer.eos_token} == {"<pad>", "<s>", "</s>"}


def test_asset_is_small_and_fixed_by_hash(tmp_path):
    assert sum(f.stat().st_size for f in Path(toy_base()).iterdir()) < 4e6
    sys.path.insert(0, str(ROOT / "nbs"))
    import pretrain_base
    held = dict(reversed(line.split()) for line in (ASSETS / "toy.sha256").read_text().splitlines())
    for world in TOY_WORLDS:
        assert held[f"rows/{world}"] == pretrain_base.rows_digest(world), "the generator's output has changed: see CONTRIBUTING"


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_damaged_asset_is_one_line(tmp_path, name):
    shutil.copytree(ASSETS, tmp_path, dirs_exist_ok=True)
    damaged = tmp_path / "toy-base" / name
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"!")
    with pytest.raises(ValueError, match="damaged.*make base") as error:
        toy_base(tmp_path)
    assert "\n" not in str(error.value)
    damaged.unlink()
    with pytest.raises(ValueError, match="missing"):
        toy_base(tmp_path)


@pytest.mark.parametrize("name, split, hint", [("toy-hrad", "test", "toy-hard"), ("toy", "tests", "test")])
def test_unknown_names_point_to_the_nearest(name, split, hint):
    with pytest.raises(ValueError, match=f"'{hint}'"):
        toy_rows(name, "boolq", split)


def test_sizes_too_small_are_refused():
    with pytest.raises(ValueError, match="at least 16"):
        toy_world(dict(SIZES, event=15))
    with pytest.raises(ValueError, match="different questions"):
        toy_rows("toy", "piqa", "test", 10_000)
    script = f"import runpy, sys\nsys.argv = ['pretrain_base.py', '--size', '3', '--output', '/nonexistent/x']\nrunpy.run_path({str(ROOT / 'nbs' / 'pretrain_base.py')!r}, run_name='__main__')"
    done = program(script, {}, call=exec)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "at least 16" in done.stderr


def frozen_accuracy(world, task):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(toy_base()), AutoTokenizer.from_pretrained(toy_base())
    rows = toy_rows(world, task, "test")
    words = [row_answers(row, task) for row in rows]
    scores = score_options(model, tokenizer, [evaluation_prompt(r) + ANSWER_PREFIX for r in rows], [[f" {w}" for w in ws] for ws in words])
    return sum(ws[s.argmax()] == r["answer"] for ws, s, r in zip(words, scores, rows)) / len(rows)


@pytest.mark.parametrize("world, task", list(product(TOY_WORLDS, TASKS)))
def test_frozen_base_is_at_chance(world, task):
    assert abs(frozen_accuracy(world, task) - 1 / TOY_TASKS[task][2]) < 0.0501


def test_base_passes_its_gates():
    sys.path.insert(0, str(ROOT / "nbs"))
    import pretrain_base
    model, tokenizer = AutoModelForCausalLM.from_pretrained(toy_base()), AutoTokenizer.from_pretrained(toy_base())
    figures = pretrain_base.report(model, toy_world(), tokenizer.get_vocab())
    assert all(figures[name] >= least for name, least in pretrain_base.GATES.items()), figures
    assert pretrain_base.GATES["knows_1"] >= 0.95 and min(pretrain_base.GATES.values()) >= 0.95
