"""Pre-train the small LLaMA that knows the toy world (`python nbs/pretrain_base.py`): documents, tokenizer, training, gates.

    python nbs/pretrain_base.py                        # d2mora/assets/toy-base, from its seed; run again to resume
    python nbs/pretrain_base.py --output /tmp/other --seed 1 --no-guesses --steps-scale 0.5 --size 16
    python nbs/pretrain_base.py --measure --figures nbs/results/toy-base.json     # the base that is there, and the rows' hashes

The base is saved only if it passes its gates: it picks from lists, judges claims and takes quizzes (0.97 or more each), and gives the
values of at least 95 % of all facts in its own wordings, asked for directly or by way of a partner (two hops). What it must not know is how
the eight tasks are put: "guesses" are documents in the tasks' own format whose answer word is drawn at random.
"""

import argparse
import json
import os
import random
import sys
import time
from dataclasses import dataclass, replace
from hashlib import sha256
from itertools import product
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from d2mora import toy as T
from d2mora.tasks import ANSWER_PREFIX, TASKS, evaluation_prompt, row_answers

ASSETS = Path(T.__file__).parent / "assets"
LABELS = [
    s.split()
    for s in ("a b c d", "1 2 3 4", "i ii iii iv", "first second third fourth", "north east south west", "p q r s")
]
WORDS = [f"{w}{i}" for w in ("answer", "solution", "ending", "option") for i in range(1, 5)]
GLUE = "list find claim verdict fact quiz think pick is which one what the partner of = ) - : ; , . ? / _"

# --- tokenizer -----------------------------------------------------------------------------------------------------------


def split_words() -> Tokenizer:
    "A tokenizer without vocabulary: words, runs of #, and single marks; `Answer1` is written like `answer1`."
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Replace(w.capitalize(), w) for w in ("answer", "solution", "ending", "option")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"#+|\w+|[^\w\s]"), "removed", invert=True)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace(Regex(r"^(?=[\w#=])"), " "),
            decoders.Fuse(),
            decoders.Replace("/ ", "/"),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return tokenizer


def cut(text: str) -> list[str]:
    "The words of a text, as the tokenizer will see them."
    t = split_words()
    return [w for w, _ in t.pre_tokenizer.pre_tokenize_str(t.normalizer.normalize_str(text))]


def vocabulary(world) -> list[str]:
    "Every word of the world, of both prompt templates, of the tasks' instructions and of the documents."
    text = [
        GLUE,
        *WORDS,
        *sum(LABELS, []),
        *(x for x, _ in world.facts),
        *(v for r in T.RELATIONS.values() for v in r.values),
        *(s for r in T.RELATIONS.values() for s in (*r.says, r.asks)),
    ]
    for style, extra, task in product(("plain", "official"), ("", "x"), TASKS):
        row = dict(T.toy_rows("toy-hard", task, "test", 4, world=world)[0], input=extra)
        text += [evaluation_prompt(row, style), row["output"], *TASKS[task].answers]
    return ["<pad>", "<s>", "</s>", "<unk>", *sorted(set(cut(" ".join(text))) - {"x"})]


def make_tokenizer(world) -> PreTrainedTokenizerFast:
    "The word-level tokenizer in Hugging Face form; it begins every text with <s>."
    tokenizer = split_words()
    tokenizer.model = models.WordLevel({w: i for i, w in enumerate(vocabulary(world))}, unk_token="<unk>")
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=256,
    )


# --- documents: words apart, those that the loss weighs fully begin with ^ --------------------------------------------------


def documents_rng(seed, one_hop):
    "Random numbers for documents, with the share of one-hop questions that they should have."
    rng = random.Random(seed)
    rng.one_hop = one_hop
    return rng


def pick(world, rng, hops=None):
    "A random thing, a relation of its kind, hops (1 or 2), and the value."
    name = rng.choice(list(T.RELATIONS))
    things = [x for (kind, _), group in world.things.items() if kind == T.RELATIONS[name].kind for x in group]
    thing, hops = rng.choice(things), hops or (1 if rng.random() < rng.one_hop else 2)
    return thing, name, hops, T._reach(world, thing, name, hops)[0], things


def fact(world, rng):
    "One statement; now and then about the partner, or who the partner is."
    thing, name, hops, value, _ = pick(world, rng)
    if rng.random() < 0.3:
        return f"the partner of the {thing} is the ^{world.facts[thing, 'partner']} ."
    return rng.choice(T.RELATIONS[name].says).format(x=T._phrase(thing, hops), v=f"^{value}") + " ."


def portrait(world, rng):
    "All that is known of one thing."
    thing = pick(world, rng)[0]
    known = [(r, v) for (x, r), v in world.facts.items() if x == thing and r != "partner"]
    return " ".join(
        T.RELATIONS[r].says[0].format(x=f"the {thing}", v=f"^{v}") + " ." for r, v in rng.sample(known, len(known))
    )


def question(world, rng):
    "A question and its value."
    thing, name, hops, value, _ = pick(world, rng)
    if rng.random() < 0.15:
        return f"which one is the partner of the {thing} ? ^{world.facts[thing, 'partner']} ."
    return f"{T.RELATIONS[name].asks.format(x=T._phrase(thing, hops))} ? ^{value} ."


def _claim(world, rng, middle):
    thing, name, hops, value, _ = pick(world, rng)
    holds, r = rng.random() < 0.5, T.RELATIONS[name]
    shown = value if holds else T._others(r.values, value, 1, rng)[0]
    said = rng.choice(r.says).format(x=T._phrase(thing, hops), v=shown)
    return f"claim : {said} .{middle.format(value)} verdict : ^{'true' if holds else 'false'} ."


def claim(world, rng):
    return _claim(world, rng, "")


def claim_fact(world, rng):
    return _claim(world, rng, " fact : ^{} .")


def _words(world, rng, count):
    return rng.sample(
        [v for r in T.RELATIONS.values() for v in r.values] + [x for group in world.things.values() for x in group],
        count,
    )


def _labels(rng, count, mixed):
    return (
        rng.sample(sum(LABELS, WORDS), count)
        if rng.random() < mixed
        else rng.choice([*LABELS, *(WORDS[i : i + 4] for i in range(0, 16, 4))])[:count]
    )


def listed(labels, mark, options, comma=" , "):
    "Options with their labels, in a line."
    return comma.join(f"{label} {mark} {option}" for label, option in zip(labels, options))


def pairs(world, rng, order=1):
    "Word and label again and again, at random: from the second time on the label follows from the text."
    count = rng.randint(2, 4)
    links, seen, out = list(zip(_words(world, rng, count), rng.sample(sum(LABELS, WORDS), count))), set(), []
    for _ in range(14):
        i = rng.randrange(count)
        first, second = links[i][::order]
        out += [first, ("^" if i in seen else "") + second]
        seen.add(i)
    return " ".join(out)


def pairs_back(world, rng):
    return pairs(world, rng, -1)


def find(world, rng, queries=8, mixed=0.4):
    "A labelled list and many queries for labels."
    count = rng.randint(2, 4)
    names, labels = _words(world, rng, count), _labels(rng, count, mixed)
    mark = rng.choice("=)-:")
    asked = [rng.randrange(count) for _ in range(queries)]
    return (
        f"list {listed(labels, mark, names, ' ')} ; find " + " ".join(f"{names[i]} ^{labels[i]}" for i in asked) + " ;"
    )


def _ending(right, label, rng, given="^"):
    "How an answer is told: the option and then its label, or the label alone; `given` says whether the option is graded too."
    return f"think {given}{right} is ^{label} ;" if not given or rng.random() < 0.5 else f"pick ^{label} ;"


def quiz(world, rng):
    "A question with labelled options, in the base's own wordings and labels."
    thing, name, hops, value, things = pick(world, rng)
    count = rng.randint(2, 4)
    place, form = rng.randrange(count), T._ask_which if rng.random() < 0.55 else T._ask_value
    text, options, _ = form(world, name, things, hops, count, place, rng)
    labels, mark = rng.choice(LABELS)[:count], rng.choice("=)-")
    return f"quiz {text} ? {listed(labels, mark, options)} ; {_ending(options[place], labels[place], rng)}"


def check_values(world, rng):
    "A question, and of many values whether they answer it."
    thing, name, hops, value, _ = pick(world, rng)
    shown = [value if rng.random() < 0.4 else rng.choice(T.RELATIONS[name].values) for _ in range(5)]
    listed = " , ".join(f"{v} ^{'true' if v == value else 'false'}" for v in shown)
    return f"{T.RELATIONS[name].asks.format(x=T._phrase(thing, hops))} ? {listed} ."


def check_things(world, rng):
    "A question, and of many things whether they answer it."
    _, name, hops, value, things = pick(world, rng)
    subject = "which one" if hops == 1 else "the partner of which one"
    fits = {t: T._reach(world, t, name, hops)[0] == value for t in things}
    shown = [rng.choice([t for t in things if fits[t] == (rng.random() < 0.4)]) for _ in range(5)]
    listed = " , ".join(f"{t} ^{'true' if fits[t] else 'false'}" for t in shown)
    return f"{rng.choice(T.RELATIONS[name].says).format(x=subject, v=value)} ? {listed} ."


def find_told(world, rng):
    "A labelled list in the layout of a quiz, and options whose label is asked in the words of a quiz."
    count = rng.randint(2, 4)
    options, labels, mark = _words(world, rng, count), rng.choice(LABELS)[:count], rng.choice("=)-")
    return f"list {listed(labels, mark, options)} ; " + " ".join(
        _ending(*rng.choice(list(zip(options, labels))), rng, given="") for _ in range(5)
    )


def quiz_many(world, rng):
    "One labelled list of things and several questions about them."
    name, count, hops = rng.choice(list(T.RELATIONS)), rng.randint(2, 4), 1 if rng.random() < rng.one_hop else 2
    kind, labels, mark = T.RELATIONS[name].kind, rng.choice(LABELS)[:count], rng.choice("=)-")
    things = rng.sample([x for (k, _), group in world.things.items() if k == kind for x in group], count)
    out, subject = [], "which one" if hops == 1 else "the partner of which one"
    for _ in range(4):
        name = rng.choice([n for n, r in T.RELATIONS.items() if r.kind == kind])
        values = [T._reach(world, t, name, hops)[0] for t in things]
        i = rng.randrange(count)
        if values.count(values[i]) > 1:
            continue
        out.append(
            f"{rng.choice(T.RELATIONS[name].says).format(x=subject, v=values[i])} ? {_ending(things[i], labels[i], rng)}"
        )
    return "list " + listed(labels, mark, things) + " ; " + " ".join(out)


def quiz_values(world, rng):
    "One labelled list of values and several questions that they answer."
    name, count, hops = rng.choice(list(T.RELATIONS)), rng.randint(2, 4), 1 if rng.random() < rng.one_hop else 2
    r, labels, mark = T.RELATIONS[name], rng.choice(LABELS)[:count], rng.choice("=)-")
    values = rng.sample(r.values, count)
    fit = [
        (x, v)
        for x, v in (
            (x, T._reach(world, x, name, hops)[0]) for (k, _), g in world.things.items() if k == r.kind for x in g
        )
        if v in values
    ]
    asked = [(x, v) for x, v in rng.sample(fit, min(4, len(fit)))]
    told = [f"{r.asks.format(x=T._phrase(x, hops))} ? {_ending(v, labels[values.index(v)], rng)}" for x, v in asked]
    return "list " + listed(labels, mark, values) + " ; " + " ".join(told)


def _three_lists(world, rng, marks, commas, ending):
    "One question and three lists of options for it, one after the other; `ending(right, label)` tells the answer."
    thing, name, hops, value, things = pick(world, rng)
    fits = [t for t in things if T._reach(world, t, name, hops)[0] == value]
    inverse, r, out = rng.random() < 0.55, T.RELATIONS[name], []
    for _ in range(3):
        right = rng.choice(fits) if inverse else value
        pool = [t for t in things if t not in fits] if inverse else [v for v in r.values if v != value]
        labels, mark = rng.choice(LABELS)[: rng.randint(2, 4)], rng.choice(marks)
        comma = rng.choice(commas) if len(commas) > 1 else commas[0]
        options = [right, *rng.sample(pool, len(labels) - 1)]
        rng.shuffle(options)
        out.append(f"{listed(labels, mark, options, comma)} ; {ending(right, labels[options.index(right)])}")
    subject = "which one" if hops == 1 else "the partner of which one"
    text = rng.choice(r.says).format(x=subject, v=value) if inverse else r.asks.format(x=T._phrase(thing, hops))
    return f"quiz {text} ? " + " ".join(out)


def quiz_lists(world, rng):
    "Three lists in one layout; the answer is told as in a quiz."
    return _three_lists(world, rng, "=)-", (" , ",), lambda right, label: _ending(right, label, rng))


def picks(world, rng):
    "Three lists in all layouts; only the label is told."
    return _three_lists(world, rng, "=)-:", (" , ", " "), lambda right, label: f"pick ^{label} ;")


def guess(world, rng):
    "A toy task in its own format, all facts, with an answer word drawn at random."
    name, task, split = rng.choice(T.TOY_WORLDS), rng.choice(list(TASKS)), rng.choice(("train", "test"))
    row = T._row(
        T._question(world, name, task, split, rng.randrange(T.TOY_TASKS[task][2]), rng, hops=1 + (name == "toy-hard"))
    )
    words = rng.sample(row_answers(row, task), len(row_answers(row, task)))
    style = "plain" if rng.random() < 0.8 else "official"
    return " ".join(cut(evaluation_prompt(row, style) + ANSWER_PREFIX)) + f" ^{words[0]}"


@dataclass(frozen=True)
class Stage:
    "A stretch of pre-training: optimizer steps, peak learning rate, and how often each kind of document comes."

    steps: int
    lr: float
    mix: dict
    falls: bool = True  # linearly to 3 % in its second half
    one_hop: float = 0.65  # share of questions of one hop; the rest asks about a partner


MIXED = {
    fact: 0.4,
    portrait: 0.2,
    question: 0.7,
    claim: 1,
    claim_fact: 0.2,
    check_values: 0.7,
    check_things: 0.7,
    find: 0.3,
    find_told: 0.5,
    quiz_many: 1.5,
    quiz_values: 1.5,
    quiz: 1.5,
    guess: 0.4,
}
STAGES = (  # lists first: without them a labelled option is never picked; then a little of all, facts, all of it, and a fine end
    Stage(2500, 2e-3, {pairs: 2, pairs_back: 0.5, find: 1.5, find_told: 1.5, question: 0.7}),
    Stage(1007, 2e-3, MIXED, falls=False),
    Stage(
        1300,
        2e-3,
        {
            fact: 1,
            portrait: 0.7,
            question: 3,
            claim: 0.5,
            check_values: 0.4,
            check_things: 0.4,
            find: 0.3,
            find_told: 0.4,
            quiz: 0.5,
            guess: 0.3,
        },
        falls=False,
    ),
    Stage(1356, 2e-3, MIXED, falls=False),
    Stage(
        3500,
        2e-3,
        {
            fact: 0.3,
            question: 0.5,
            claim: 1,
            check_values: 0.5,
            check_things: 0.5,
            find: 0.2,
            find_told: 0.3,
            quiz_lists: 3,
            quiz: 1.5,
            guess: 0.4,
        },
    ),
    Stage(
        3000,
        2e-3,
        {
            fact: 0.2,
            question: 0.4,
            claim: 2,
            check_values: 0.8,
            check_things: 0.8,
            find: 0.3,
            find_told: 0.2,
            quiz_lists: 1.5,
            quiz: 2.5,
            guess: 0.4,
        },
    ),
    Stage(
        3000,
        2e-3,
        {
            fact: 0.1,
            question: 0.3,
            claim: 1.5,
            check_values: 0.3,
            check_things: 0.3,
            find: 0.3,
            quiz: 0.7,
            picks: 4,
            guess: 0.4,
        },
    ),
    Stage(
        6000,
        2e-3,
        {
            fact: 0.3,
            question: 0.7,
            claim: 1.0,
            check_values: 0.3,
            check_things: 0.3,
            find: 0.6,
            find_told: 0.3,
            quiz: 0.5,
            picks: 5,
            guess: 0.15,
        },
        one_hop=0.8,
    ),
)

# --- training --------------------------------------------------------------------------------------------------------------


def encode(text, ids):
    "Token ids with <s> and </s>, and for each token whether the loss weighs it fully."
    words = text.split()
    missing = [w for w in words if w.removeprefix("^") not in ids]
    if missing:
        raise KeyError(f"words without a token: {missing}")
    return [1, *(ids[w.removeprefix("^")] for w in words), 2], [0, *(int(w[0] == "^" and w != "^") for w in words), 0]


def batches(world, ids, mix, rng, docs=400, tokens=1024):
    "Batches of about `tokens` tokens from `docs` documents, of similar length within a batch, in random order."
    kinds = rng.choices(list(mix), list(mix.values()), k=docs)
    coded = sorted((encode(kind(world, rng), ids) for kind in kinds), key=lambda c: len(c[0]))
    out = []
    while coded:
        n = max(1, tokens // (len(coded[0][0]) + 2))
        out.append(collate(coded[:n]))
        del coded[:n]
    return rng.sample(out, len(out))


def collate(coded):
    "Right-padded ids and weights, each (documents, T)."
    pad = lambda part: torch.nn.utils.rnn.pad_sequence([torch.tensor(c[part]) for c in coded], batch_first=True)
    return pad(0), pad(1)


def doc_loss(model, x, weight, elsewhere=0.02):
    "Mean loss: weight 1 where graded, 0.02 on all other words."
    target, w = x[:, 1:], weight[:, 1:].float()
    w = w + elsewhere * ((target != 0) & (w == 0))
    loss = cross_entropy(model(x[:, :-1]).logits.flatten(0, 1), target.flatten(), reduction="none").view_as(w)
    return (loss * w).sum() / w.sum()


def rate(stage, done):
    "Learning rate after `done` steps of a stage: short warm-up, flat half, linear fall."
    left = done / stage.steps
    return stage.lr * min(1, (done + 1) / 100) * (1 if left < 0.5 or not stage.falls else max(0.03, (1 - left) / 0.5))


def new_model(vocab_size, seed):
    "The LLaMA: 3 layers, width 128, 2 heads of 64, tied embeddings."
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=128,
            intermediate_size=320,
            num_hidden_layers=3,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=256,
            tie_word_embeddings=True,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            initializer_range=0.03,
            rope_parameters=dict(rope_type="default", rope_theta=1000.0),
        )
    )


def train_stage(model, world, ids, stage, number, args, state, save):
    "Run one stage from `state['step']`; batches depend only on seed, stage and block, so that a resumed run sees the same."
    optimizer = torch.optim.AdamW(model.parameters(), lr=stage.lr, betas=(0.9, 0.98), weight_decay=0.05)
    if state["optimizer"]:
        optimizer.load_state_dict(state["optimizer"])
    while state["step"] < stage.steps:
        begun = time.perf_counter()
        rng = documents_rng(f"{args.seed}/{number}/{state['block']}", stage.one_hop)
        for x, weight in batches(world, ids, stage.mix, rng):
            for group in optimizer.param_groups:
                group["lr"] = rate(stage, state["step"])
            doc_loss(model, x, weight).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            state["step"] += 1
        state["block"] += 1
        state["seconds"] += time.perf_counter() - begun
        if state["block"] % 25 == 0:
            state["optimizer"] = optimizer.state_dict()
            save(number, state)
            print(
                f"stage {number} step {state['step']}/{stage.steps}",
                report(model, world, ids),
                file=sys.stderr,
                flush=True,
            )


def run(args):
    "Tokenizer, all stages with checkpoints, gates, and only then the asset."
    world = T.toy_world({kind: args.size or n for kind, n in T.SIZES.items()})
    tokenizer, work = make_tokenizer(world), Path(f"{args.output}.unfinished.pt")
    ids, model = tokenizer.get_vocab(), new_model(len(tokenizer), args.seed)
    stages = [
        replace(
            s,
            steps=int(s.steps * args.steps_scale),
            mix={k: v for k, v in s.mix.items() if args.guesses or k is not guess},
        )
        for s in STAGES
    ]
    first, state = 0, dict(step=0, block=0, optimizer=None, seconds=0.0)
    if work.exists():
        kept = torch.load(work, weights_only=True)
        first, state = kept["stage"], kept["state"]
        model.load_state_dict(kept["model"])

    def save(stage, state):
        torch.save(dict(stage=stage, state=state, model=model.state_dict()), f"{work}.new")
        os.replace(f"{work}.new", work)

    for number in range(first, len(stages)):
        train_stage(model, world, ids, stages[number], number, args, state, save)
        state |= dict(step=0, block=0, optimizer=None)
        save(number + 1, state)
    return finish(model, tokenizer, world, ids, args, work, state["seconds"])


# --- gates -------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def doc_accuracy(model, world, ids, kind, docs=128):
    "Share of graded words of fresh documents that the model predicts."
    rng, right, total = documents_rng("gate", 1.0), 0, 0
    for x, weight in batches(world, ids, {kind: 1}, rng, docs, 4096):
        graded = weight[:, 1:] > 0
        hit = model(x[:, :-1]).logits.argmax(-1) == x[:, 1:]
        right, total = right + hit[graded].sum().item(), total + graded.sum().item()
    return right / total


@torch.no_grad()
def next_words(model, coded):
    "Logits of the word after each of some lists of token ids: (texts, vocabulary)."
    x = torch.nn.utils.rnn.pad_sequence([torch.tensor(c) for c in coded], batch_first=True)
    return model(x).logits[torch.arange(len(coded)), torch.tensor([len(c) - 1 for c in coded])]


def knowledge(model, world, ids, hops):
    "Share of all facts whose value is the model's first word after the question."
    asked = [(x, r, T._reach(world, x, r, hops)[0]) for x, r in world.facts if r != "partner"]
    coded = [encode(f"{T.RELATIONS[r].asks.format(x=T._phrase(x, hops))} ?", ids)[0][:-1] for x, r, _ in asked]
    first = next_words(model, coded).argmax(-1).tolist()
    return sum(ids[value] == word for (_, _, value), word in zip(asked, first)) / len(asked)


def report(model, world, ids, kinds=(find, claim, quiz, picks)):
    "The gates' figures, 0 to 1."
    model.eval()
    out = {k.__name__: doc_accuracy(model, world, ids, k) for k in kinds}
    out |= {f"knows_{h}": knowledge(model, world, ids, h) for h in (1, 2)}
    model.train()
    return {k: round(v, 3) for k, v in out.items()}


GATES = {"find": 0.97, "claim": 0.97, "quiz": 0.97, "picks": 0.97, "knows_1": 0.95, "knows_2": 0.95}


def accuracy(model, tokenizer, task, rows):
    "Share of a task's rows whose answer word is the likeliest of those offered; each answer word is one token."
    logits = next_words(model, tokenizer([evaluation_prompt(row) + ANSWER_PREFIX for row in rows])["input_ids"])
    ids = tokenizer.get_vocab()
    right = 0
    for row, own in zip(rows, logits):
        words = row_answers(row, task)
        right += words[own[[ids[word] for word in words]].argmax()] == row["answer"]
    return right / len(rows)


def at_tasks(model, tokenizer, world):
    "Accuracy of the model on both toy worlds' test rows as they are put: it should be at chance."
    model.eval()
    out = {}
    for name, task in product(T.TOY_WORLDS, TASKS):
        rows = T.toy_rows(name, task, "test", world=world)
        out.setdefault(name, {})[task] = dict(
            n=len(rows), accuracy=accuracy(model, tokenizer, task, rows), chance=1 / T.TOY_TASKS[task][2]
        )
    return out


# --- the asset and its hashes ------------------------------------------------------------------------------------------------


def rows_digest(name: str) -> str:
    "One hash over every row of a toy world, both splits of all tasks."
    rows = [T.toy_rows(name, task, split) for task, split in product(TASKS, ("train", "test"))]
    return sha256(json.dumps(rows).encode()).hexdigest()


def write_hashes(assets: Path):
    "Fix the base's files and the generator's rows in assets/toy.sha256, in the form of sha256sum."
    files = sorted((assets / "toy-base").iterdir())
    lines = [f"{sha256(f.read_bytes()).hexdigest()}  toy-base/{f.name}" for f in files]
    lines += [f"{rows_digest(name)}  rows/{name}" for name in T.TOY_WORLDS]
    (assets / "toy.sha256").write_text("\n".join(lines) + "\n")


def write_figures(path, model, tokenizer, world, figures, seconds=None):
    "What was measured of a base; the seconds of an earlier making are kept when it is only measured again."
    made = (
        json.loads(Path(path).read_text()).get("made")
        if seconds is None and Path(path).is_file()
        else dict(command=" ".join(["python nbs/pretrain_base.py", *sys.argv[1:]]), seconds=seconds)
    )
    measured = dict(made=made, parameters=model.num_parameters(), gates=figures)
    if len(world.facts) == len(T.toy_world().facts):
        measured["frozen"] = at_tasks(model, tokenizer, world)  # a smaller world has too few questions
    Path(path).write_text(json.dumps(measured, indent=1) + "\n")


def measure(args):
    "Gates and accuracy of a base that is there; the embedded one's hashes are written anew."
    model, tokenizer, world = (
        LlamaForCausalLM.from_pretrained(args.output),
        AutoTokenizer.from_pretrained(args.output),
        T.toy_world(),
    )
    figures = report(model, world, tokenizer.get_vocab())
    print(json.dumps(figures))
    if args.figures:
        write_figures(args.figures, model, tokenizer, world, figures)
    if Path(args.output).resolve() == (ASSETS / "toy-base").resolve():
        write_hashes(ASSETS)
    return int(any(figures[k] < least for k, least in GATES.items()))


def finish(model, tokenizer, world, ids, args, work, seconds):
    "Save the base if it passes its gates."
    figures = report(model, world, ids)
    failed = [k for k, least in GATES.items() if figures[k] < least]
    print(json.dumps(figures))
    if args.figures:
        write_figures(args.figures, model, tokenizer, world, figures, round(seconds))
    if failed:
        print(
            f"not saved: {', '.join(failed)} below its gate; try another --seed or more --steps-scale", file=sys.stderr
        )
        return 1
    model.eval().save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    for file in Path(args.output).iterdir():
        file.chmod(0o644)
    if Path(args.output).resolve() == (ASSETS / "toy-base").resolve():
        write_hashes(ASSETS)
    work.unlink(missing_ok=True)
    return 0


def arguments(argv=None):
    "Command line."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default=str(ASSETS / "toy-base"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--size", type=int, help="things of each kind (default: the embedded world's)")
    parser.add_argument("--steps-scale", type=float, default=1.0)
    parser.add_argument("--figures", help="write gates and accuracy in the tasks' format to this JSON file")
    parser.add_argument("--measure", action="store_true", help="train nothing: measure the base in --output")
    parser.add_argument(
        "--no-guesses", dest="guesses", action="store_false", help="leave out task-like prompts with random answers"
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    args = arguments()
    try:
        sys.exit(measure(args) if args.measure else run(args))
    except ValueError as error:
        print(f"pretrain_base: {error}", file=sys.stderr)
        sys.exit(2)
