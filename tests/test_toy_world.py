"""The toy world: split by fact, format of the real tasks, tokenizer, hashes, gates, and the frozen base at chance."""

import gzip
import importlib.util
import json
import re
from hashlib import sha256
from itertools import product
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

import d2mora
from d2mora.tasks import ANSWER_PREFIX, TASKS, parse_answer, training_prompt
from d2mora.toy import RELATIONS, TOY_TASKS, TOY_WORLDS, toy_base, toy_questions, toy_rows, toy_world

ROOT = Path(__file__).parents[1]
ASSETS = Path(d2mora.__file__).parent / "assets"
WORLD = toy_world()


@pytest.fixture(scope="module")
def script():
    "The script that makes the base, as a module."
    spec = importlib.util.spec_from_file_location("pretrain_base", ROOT / "nbs" / "pretrain_base.py")
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    return module


@pytest.fixture(scope="module")
def base():
    return AutoModelForCausalLM.from_pretrained(toy_base()), AutoTokenizer.from_pretrained(toy_base())


def test_no_tested_fact_is_asked_in_training():
    "From the generator's record, over both worlds and all tasks; the record holds wrong options' facts too."
    trained, tested = (
        set().union(*(q.facts for name, task in product(TOY_WORLDS, TASKS) for q in toy_questions(name, task, split)))
        for split in ("train", "test")
    )
    assert not trained & tested and trained | tested <= set(WORLD.facts) and len(tested) > 90 and len(trained) > 280


def holds(q, option):
    "Whether an option is true, read from the question's text and the facts."
    (relation,) = {r for _, r in q.facts} - {"partner"}
    words, form = re.findall(r"\w+", q.text), TOY_TASKS[q.task][0]
    thing = option if form in ("which", "blank") else next(x for x in words if (x, relation) in WORLD.facts)
    value = WORLD.facts[WORLD.facts[thing, "partner"] if "partner" in words else thing, relation]
    return value == option if form == "value" else (value in words) == (option != "false")


@pytest.mark.parametrize("world, task", list(product(TOY_WORLDS, TASKS)))
def test_questions_are_true_and_their_record_is_complete(world, task):
    "Read again from the text: one option holds, its word (or the next, where the world says so) is the answer."
    questions, names = toy_questions(world, task, "test"), {x for x, _ in WORLD.facts}
    shift = world == "toy-hard" and task in ("piqa", "ARC-Challenge")
    for q in questions:
        (right,) = [i for i, option in enumerate(q.options) if holds(q, option)]
        assert q.answer == TASKS[task].answers[(right + shift) % len(q.options)]
        named = names & set(re.findall(r"\w+", " ".join([q.text, *q.options])))
        asked = {x for x, r in q.facts if r in RELATIONS}
        if "partner" in q.text:
            assert asked == {WORLD.facts[x, "partner"] for x in named} and {(x, "partner") for x in named} <= q.facts
        else:
            assert asked == named and len(q.facts) == len(named)
    share = sum("partner" in q.text for q in questions) / len(questions)
    assert 0.15 < share < 0.35 if world == "toy-hard" else share == 0
    answers = [q.answer for q in questions]
    assert max(map(answers.count, answers)) - min(map(answers.count, answers)) <= 1  # a constant guess is at chance
    assert len({(q.text, q.options) for q in questions}) == len(questions)


@pytest.mark.parametrize("task", TASKS)
def test_toy_rows_are_laid_out_like_the_real_ones(shared, task):
    with gzip.open(shared / "data" / task / "test.json.gz", "rt") as file:
        real = json.load(file)[0]
    toy = toy_rows("toy", task, "test", 4)[0]

    def frame(text):
        head = re.match(r".*?(?:question|sentence|blank.*?sentence):", text).group()
        labels = re.findall(r"\s*(?:Solution|Answer|Ending|Option)\d: |\s*Answer format: \S+$", text)
        return head, [labels[0].lstrip(), *labels[1:]]

    assert list(toy) == list(real) and toy["input"] == real["input"] == ""
    assert frame(toy["instruction"]) == frame(real["instruction"])


def test_the_tokenizer_knows_every_word(base):
    tokenizer = base[1]
    for world, task, style in product(TOY_WORLDS, TASKS, ("plain", "official")):
        for row in toy_rows(world, task, "test", 20):
            ids = tokenizer(text := "".join(training_prompt(row, style)))["input_ids"]
            assert tokenizer.unk_token_id not in ids and ids[0] == tokenizer.bos_token_id
            assert parse_answer(tokenizer.decode(ids), task) == parse_answer(text, task)
        for word in TASKS[task].answers:
            assert len(tokenizer(" " + word, add_special_tokens=False)["input_ids"]) == 1
            assert parse_answer(tokenizer.decode(tokenizer(f"{ANSWER_PREFIX} {word}")["input_ids"]), task) == word


def test_rows_and_base_are_fixed_by_hash(script):
    held = dict(reversed(line.split()) for line in (ASSETS / "toy.sha256").read_text().splitlines())
    found = {f"rows/{world}": script.rows_digest(world) for world in TOY_WORLDS}
    found |= {f"toy-base/{f.name}": sha256(f.read_bytes()).hexdigest() for f in Path(toy_base()).iterdir()}
    assert found == held and sum(f.stat().st_size for f in Path(toy_base()).iterdir()) < 4e6


def test_the_base_passes_its_gates_and_is_at_chance_on_the_tasks(script, base):
    "The committed figures, measured again."
    figures = script.report(base[0], WORLD, base[1].get_vocab())
    assert all(figures[name] >= least >= 0.95 for name, least in script.GATES.items()), figures
    accuracies = script.at_tasks(*base, WORLD)
    assert accuracies == json.loads((ROOT / "nbs/results/toy-base.json").read_text())["frozen"]
    for world, task in product(TOY_WORLDS, TASKS):
        assert abs(accuracies[world][task]["accuracy"] - 1 / TOY_TASKS[task][2]) < 0.0501
