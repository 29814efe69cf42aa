"""Pre-train the base of the study on real rows: a LLaMA of about 3 million parameters that has read the text of the real train sets.

    python benchmarks/real_base.py --data FOLDER      # runs/real/base, runs/real/data; run again to resume; writes nbs/results/real-base.json

First it draws the study's rows (runs/real/data): 16,000 train rows and 700 to validate on, every task in proportion to its train set, and
300 test rows a task. The base reads the other train rows, each as a question with the text of its right option, as protocol `content` puts
it, and nothing of the form in which tasks are put (no "Please choose", no "answer2"). Train rows whose question or text stands in a test
set are left out of both, and the base reads none that stands among the study's.
Weights are no part of the repository: they follow from seed and data, and their hash stands in the figures.
"""

import json
import os
import random
import sys
import time
from hashlib import sha256
from pathlib import Path

import datasets
import torch
import transformers
from common import ROOT, command_line, store, versions
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    TrainingArguments,
    default_data_collator,
)
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK

from d2mora.data import plain, read_task
from d2mora.scoring import content_pairs
from d2mora.train import D2MoraTrainer, Stopper, last_checkpoint, listening
from d2mora.train import ProgressBar
from d2mora.utils import publish, write_text
from d2mora.tasks import TASKS, row_answers, training_prompt

TRAINED = [task for task in TASKS if task != "hellaswag"]  # whose train sets are free to ship
SIZES = dict(hidden_size=256, intermediate_size=640, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2)
BLOCK, ROWS = 256, 8  # tokens of a training sequence; sequences a step

# --- text ------------------------------------------------------------------------------------------------------------------


def told(row: dict, task: str) -> str:
    "A row as running text: its question and the text of its right option."
    return "".join(content_pairs(row, task)[row_answers(row, task).index(row["answer"])])


def asked(row: dict, task: str) -> str:
    "What a row asks, whatever its options: the context, or for a gap the sentence around it."
    return plain(
        row["instruction"].partition(": ")[2].partition("Option1:")[0]
        if task == "winogrande"
        else content_pairs(row, task)[0][0]
    )


def train_rows(data: str) -> dict[str, list[dict]]:
    "The train sets that are there."
    return {task: read_task(data, task, "train").to_list() for task in TRAINED}


def shares(sizes: dict[str, int], total: int) -> dict[str, int]:
    "`total` in proportion to the sizes; the largest remainders are rounded up."
    exact = {task: total * n / sum(sizes.values()) for task, n in sizes.items()}
    up = sorted(exact, key=lambda task: int(exact[task]) - exact[task])[: total - sum(map(int, exact.values()))]
    return {task: int(exact[task]) + (task in up) for task in sizes}


def draw_rows(data: str, train: dict[str, list[dict]], rows: int, test_rows: int) -> dict[str, dict[str, list[dict]]]:
    "The study's own rows: for each task `train` and `test`, drawn by a seed."
    drawn = {task: {"test": read_task(data, task, "test").to_list()} for task in TASKS}
    for task, n in shares({task: len(own) for task, own in train.items()}, rows).items():
        drawn[task]["train"] = random.Random(f"train {task}").sample(train[task], n)
    for task, own in drawn.items():
        own["test"] = random.Random(f"test {task}").sample(own["test"], min(test_rows, len(own["test"])))
    return drawn


def write_rows(folder: Path, drawn: dict) -> None:
    "A data folder as `data.path` names it."
    for task, own in drawn.items():
        (folder / task).mkdir(parents=True, exist_ok=True)
        for split, rows in own.items():
            write_text(
                folder / task / f"{split}.json",
                json.dumps([{k: row[k] for k in ("instruction", "input", "output", "answer")} for row in rows]),
            )


def texts_of(rows: list[dict], task: str) -> set[str]:
    "Every question and every right text."
    return {asked(row, task) for row in rows} | {plain(told(row, task)) for row in rows}


def without(rows: dict[str, list[dict]], texts: set[str]) -> dict[str, list[dict]]:
    "The rows of which neither question nor right text is among these."
    return {
        task: [row for row in own if asked(row, task) not in texts and plain(told(row, task)) not in texts]
        for task, own in rows.items()
    }


def documents(rows: dict[str, list[dict]]) -> list[str]:
    "The texts to read, each once, in a seeded order."
    found = sorted({told(row, task) for task, own in rows.items() for row in own})
    random.Random(0).shuffle(found)
    return found


def split(data: str, rows: int, test_rows: int) -> tuple[dict, dict, dict]:
    "The study's own rows; the texts' rows, that share no question with them or any test set; how many there are of each task."
    train, tests = (
        train_rows(data),
        set().union(*(texts_of(read_task(data, task, "test").to_list(), task) for task in TASKS)),
    )
    clean = without(train, tests)
    drawn = draw_rows(data, clean, rows, test_rows)
    to_read = without(clean, set().union(*(texts_of(own.get("train", []), task) for task, own in drawn.items())))
    counts = {
        task: {
            "rows": len(train[task]),
            "in_test": len(train[task]) - len(clean[task]),
            "study": len(drawn[task]["train"]),
            "to_read": len(to_read[task]),
        }
        for task in train
    }
    return drawn, to_read, counts


def make_tokenizer(texts: list[str], size: int) -> PreTrainedTokenizerFast:
    "Byte pairs of these texts, so that rows are short too as they are put to a model; <s> begins every text."
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer, tokenizer.decoder = normalizers.NFC(), decoders.ByteLevel()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    special = ["<pad>", "<s>", "</s>"]
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=size,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", model_max_length=512
    )


def blocks(texts: list[str], tokenizer, tokens: int) -> tuple[datasets.Dataset, int]:
    "The texts end to end, each with <s> and </s>, cut into sequences, from the beginning again where they are too few; and how many tokens there are."
    stream = [i for ids in tokenizer(texts)["input_ids"] for i in (*ids, tokenizer.eos_token_id)]
    needed = [stream[(start + i) % len(stream)] for start in range(0, tokens, BLOCK) for i in range(BLOCK)]
    return datasets.Dataset.from_dict(
        {"input_ids": (cut := [needed[i : i + BLOCK] for i in range(0, len(needed), BLOCK)]), "labels": cut}
    ), len(stream)


# --- training --------------------------------------------------------------------------------------------------------------


def trainer_for(model, rows: datasets.Dataset, work: Path) -> D2MoraTrainer:
    "transformers' Trainer with complete checkpoints; the order of the sequences follows from the seed."
    args = TrainingArguments(
        output_dir=str(work),
        max_steps=max(1, len(rows) // ROWS),
        per_device_train_batch_size=ROWS,
        learning_rate=3e-3,
        lr_scheduler_type="cosine",
        warmup_steps=min(100, len(rows) // ROWS // 10),
        weight_decay=0.1,
        adam_beta2=0.95,
        max_grad_norm=1.0,
        seed=0,
        logging_steps=25,
        save_steps=200,
        save_total_limit=1,
        report_to="none",
        use_cpu=True,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
    )
    trainer = D2MoraTrainer(
        model, args, train_dataset=rows, data_collator=default_data_collator, callbacks=[ProgressBar()]
    )
    for theirs in (DEFAULT_PROGRESS_CALLBACK, transformers.PrinterCallback):
        trainer.remove_callback(theirs)
    return trainer


def pretrain(args, tokenizer, rows: datasets.Dataset, work: Path):
    "Train to the end, from the last checkpoint if there is one; the seconds of all parts are summed."
    transformers.set_seed(0)
    special = dict(
        pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id
    )
    sizes = SIZES | {
        k: v
        for k, v in dict(
            hidden_size=args.hidden, intermediate_size=args.hidden and 2 * args.hidden, num_hidden_layers=args.layers
        ).items()
        if v
    }
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), max_position_embeddings=512, tie_word_embeddings=True, **sizes, **special
        )
    )
    trainer, stopper, begun = trainer_for(model, rows, work), Stopper(), time.process_time()
    trainer.add_callback(stopper)
    checkpoint = last_checkpoint(work)
    if checkpoint:
        print(f"go on from {checkpoint.name}", file=sys.stderr)
    clock = work / "seconds.json"
    before = json.loads(clock.read_text()) if checkpoint and clock.is_file() else 0
    with listening(stopper):
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    write_text(clock, json.dumps(seconds := before + time.process_time() - begun))
    if trainer.state.global_step < trainer.state.max_steps:
        raise SystemExit(f"stopped at step {trainer.state.global_step}: run again to go on")
    return model.eval(), trainer.state, seconds


# --- figures ---------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def text_loss(model, tokenizer, texts: list[str]) -> dict[str, float]:
    "Loss on texts that were not read: nats per token, bits per character."
    total = tokens = 0
    for text in texts:
        ids = torch.tensor([tokenizer(text)["input_ids"][:512]])
        total, tokens = (
            total + model(input_ids=ids, labels=ids).loss.item() * (ids.shape[1] - 1),
            tokens + ids.shape[1] - 1,
        )
    return {
        "nats_per_token": round(total / tokens, 4),
        "bits_per_character": round(total / 0.6931472 / sum(map(len, texts)), 4),
    }


def figures(args, model, tokenizer, state, read: dict, seconds: float, tests: dict[str, list[str]]) -> dict:
    "What was read, what came of it."
    losses = [line["loss"] for line in state.log_history if "loss" in line]
    return {
        "command": "python benchmarks/real_base.py --data FOLDER",
        "parameters": model.num_parameters(),
        "in_layers": sum(p.numel() for p in model.model.layers.parameters()),
        "vocabulary": len(tokenizer),
        "steps": state.max_steps,
        **read,
        "train_loss": {"first": losses[0], "last": losses[-1]} if losses else None,
        "unread_test_texts": {task: text_loss(model, tokenizer, own) for task, own in tests.items()},
        "cpu_seconds": round(seconds),
        "sha256": sha256((args.output / "model.safetensors").read_bytes()).hexdigest(),
        "threads": torch.get_num_threads(),
        "versions": versions("tokenizers"),
    }


def make(args) -> None:
    "Rows, tokenizer, training, figures."
    drawn, to_read, counts = split(args.data, args.rows, args.test_rows)
    texts = documents(to_read)
    tokenizer = make_tokenizer(
        ["".join(training_prompt(row)) for own in to_read.values() for row in own], args.vocabulary
    )
    rows, there = blocks(texts, tokenizer, args.tokens)
    read = {
        "tasks": counts,
        "texts": len(texts),
        "tokens_there": there,
        "tokens_read": len(rows) // ROWS * ROWS * BLOCK,
    }
    print(read, file=sys.stderr)
    work = args.output.with_name(args.output.name + ".unfinished")
    model, state, seconds = pretrain(args, tokenizer, rows, work)
    model.save_pretrained(work / "base"), tokenizer.save_pretrained(work / "base")
    write_rows(args.output.with_name("data"), drawn)
    publish(work / "base", args.output)
    tests = {task: [told(row, task) for row in own["test"][:100]] for task, own in drawn.items()}
    store(args.figures, figures(args, model, tokenizer, state, read, seconds, tests))


def main(argv=None) -> None:
    "Command line."
    parser = command_line(__doc__)
    parser.add_argument("--data", default=os.environ.get("D2MORA_DATA"), help="folder with one folder a task")
    parser.add_argument(
        "--output", type=Path, default=ROOT / "runs/real/base", help="the study's rows go beside it, into `data`"
    )
    parser.add_argument("--figures", type=Path, default=ROOT / "nbs/results/real-base.json")
    for name, usual, what in [
        ("tokens", 2_000_000, "read in training"),
        ("vocabulary", 2048, "of the tokenizer"),
        ("rows", 16_700, "of the study's train sets"),
        ("test-rows", 300, "a task"),
        ("hidden", None, "another width, for a short trial"),
        ("layers", None, "another depth"),
    ]:
        parser.add_argument(f"--{name}", type=int, default=usual, help=what)
    args = parser.parse_args(argv)
    if not args.data:
        raise ValueError("no data: give --data FOLDER, with one folder a task, or set D2MORA_DATA")
    if (args.output / "model.safetensors").is_file():
        return print(f"{args.output}: this base is finished", file=sys.stderr)
    make(args)


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    (
        transformers.logging.set_verbosity_error(),
        transformers.logging.disable_progress_bar(),
        datasets.disable_progress_bars(),
    )
    try:
        main()
    except ValueError as error:
        print(f"real_base: {error}", file=sys.stderr), sys.exit(2)
