"""The eight tasks: byte-exact prompts on real rows, parsing as published; and tasks of one's own through all commands."""

import gzip
import json

import datasets
import pytest
import yaml

from d2mora.cli import main
from d2mora.data import DataConfig, read_task
from d2mora.tasks import (
    ANSWER_PREFIX,
    TASKS,
    content_pairs,
    evaluation_prompt,
    parse_answer,
    row_answers,
    task_table,
    training_prompt,
)

LISTED = "Please choose the correct answer to the question: Why?\n\nAnswer1: a Answer2: b Answer format: {}"


@pytest.mark.parametrize("task", TASKS)
def test_real_rows_are_understood_and_their_prompts_are_byte_exact(shared, task):
    official = json.loads((shared / "facts" / "official_prompts.json").read_text())
    with gzip.open(shared / "data" / task / "test.json.gz", "rt") as file:
        rows = json.load(file)
    for number, row in enumerate(rows):
        assert row["answer"] in row_answers(row, task) and row["output"] == f"{ANSWER_PREFIX} {row['answer']}"
        assert parse_answer(row["output"], task) == row["answer"]
        cloze = training_prompt(row | {"task": task}, "cloze")
        assert cloze == content_pairs(row, task)[row_answers(row, task).index(row["answer"])]
        assert "Answer format" not in "".join(cloze)
        assert training_prompt(row) == (row["instruction"] + "\n\n", row["output"])
        assert training_prompt(row)[0] == evaluation_prompt(row)
        for extra, key in (("", ""), ("context {x}", "_with_input")) if number < 100 else ():
            r = row | {"input": extra}
            assert "".join(training_prompt(r, "official")).encode() == official["train" + key].format(**r).encode()
            assert evaluation_prompt(r, "official").encode() == official["eval" + key].format(**r).encode()


GAPLESS = {"instruction": "Fill in: no gap here. Option1: a Option2: b Answer format: option1/option2"}


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: parse_answer("ending1", "hellaswg"), "'hellaswag'.*own-tasks"),
        (lambda: training_prompt({"instruction": "", "output": ""}, "oficial"), "'official'"),
        (lambda: content_pairs({"instruction": LISTED.format("answer1/answer2/answer3")}, "ARC-Easy"), "no text"),
        (lambda: content_pairs(GAPLESS, "winogrande"), "no gap"),
    ],
)
def test_mistakes_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# --- tasks of one's own

OWN = {
    "mood": {"answers": ["true", "false"], "chance": 0.4},
    "size": {"answers": {0: "option1", 1: "option2"}, "fields": {"instruction": "text", "answer": "label"}},
}
SMALL = """data.cutoff=64 training.max_steps=2 training.warmup_steps=0 training.logging_steps=1
training.per_device_train_batch_size=4 training.disable_tqdm=true""".split()


def own_world(folder, described="tasks.yaml"):
    "Two tasks: one in CSV, one in JSON Lines and Parquet with other columns and numbers for answers."
    for task in OWN:
        (folder / task).mkdir(parents=True)
    for split in ("train", "test"):
        lines = [f'"red, blue, {n}",{("true", "false")[n % 2]}' for n in range(12)]
        (folder / f"mood/{split}.csv").write_text("\n".join(["instruction,answer", *lines]) + "\n")
    rows = [{"text": f"green {n}", "label": n % 2, "more": [1]} for n in range(10)]
    (folder / "size/train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    datasets.Dataset.from_list(rows).to_parquet(folder / "size/test.parquet")
    (folder / described).write_text(yaml.safe_dump(OWN))
    return str(folder)


def test_own_tasks_go_through_training_grading_comparison_and_export(tmp_path):
    data, run = own_world(tmp_path / "data"), str(tmp_path / "run")
    assert main(["train", "demo", f"data.path={data}", *SMALL, "--output", run]) == 0
    kept = yaml.safe_load((tmp_path / "run/recipe.yaml").read_text())["data"]
    assert kept["tasks"] == ["mood", "size"] and kept["own_tasks"]["mood"] == OWN["mood"] and not kept["tasks_file"]
    (tmp_path / "data/tasks.yaml").unlink()  # from here on the run knows its tasks alone
    for protocol, rows in (("choice", "4"), ("generate", "2")):
        assert main(["evaluate", run, "--protocol", protocol, "--limit", rows]) == 0
        tasks = json.loads((tmp_path / f"run/evaluation-{protocol}.json").read_text())["tasks"]
        assert {task: t["chance"] for task, t in tasks.items()} == {"mood": 0.4, "size": 0.5}
        assert tasks["mood"]["n"] == int(rows)
    assert main(["export", run, str(tmp_path / "out"), "--tasks", "size", "--rows", "4", "--limit", "4"]) == 0
    assert (tmp_path / "out/adapter_model.safetensors").is_file()
    one = "--methods d2mora --seeds 0 --learning-rates 1e-3 --limit 2".split()
    words = [f"data.own_tasks={json.dumps(OWN)}", f"data.path={data}", *SMALL, "data.validation_rows=4", *one]
    assert main(["compare", "demo", *words, "--output", str(tmp_path / "all")]) == 0
    (found,) = json.loads((tmp_path / "all/comparison-equal.json").read_text())["runs"]
    assert list(found["grades"]["choice"]["tasks"]) == ["mood", "size"]


def test_a_named_tasks_file_says_the_same_and_a_changed_one_is_another_recipe(tmp_path):
    folder = own_world(tmp_path / "data", "mine.yaml")
    config = DataConfig(path=folder, tasks_file=f"{folder}/mine.yaml")
    assert config == DataConfig(path=folder, own_tasks={name: OWN[name] for name in sorted(OWN)})
    assert config != DataConfig(path=folder, own_tasks={"mood": {"options": 3}})
    rows = read_task(folder, config.table["size"], "test").to_list()
    assert rows[1] == {
        **{"instruction": "green 1", "input": None, "output": "the correct answer is option2", "answer": "option2"},
        **{"task": "size", "row": 1},
    }


def test_a_parquet_file_is_read(tmp_path):
    import datasets

    (tmp_path / "size").mkdir()
    rows = datasets.Dataset.from_list([{"text": "green", "label": 1}])
    rows.to_parquet(tmp_path / "size/test.parquet")
    size = DataConfig(path=str(tmp_path), own_tasks=OWN).table["size"]
    assert read_task(str(tmp_path), size, "test")["answer"][:] == ["option2"]


def test_own_expressions():
    table = task_table(
        {"verdict": {"answers": ["no", "not sure", "C++"]}, "last": {"options": 3, "pattern": r"is (\w+)$"}}
    )
    assert [parse_answer(text, table["verdict"]) for text in ("nothing", "not sure", "it is C++.")] == [
        None,
        "not sure",
        "C++",
    ]
    assert parse_answer("answer1? it is answer2", table["last"]) == "answer2"
    assert table["last"].answers == ("answer1", "answer2", "answer3")


@pytest.mark.parametrize(
    "own, message",
    [
        ("mood: {answers: [yes, no]}", "'mood': answers: .*string"),
        ("mood: {answers: [happy]}", "two or more"),
        ("mood: {answers: [a, b], colour: red}", "colour"),
        ("mood: {answers: [a, b], pattern: '('}", "pattern"),
        ("../mood: {answers: [a, b]}", "none of the eight: letters"),
        ("- mood", "no tasks by name"),
        ("mood: !!python/object:os.system {}", "not YAML"),
        (
            "mood: {answers: ['true', 'false'], fields: {answer: label}}",
            "no columns instruction and label .there are: answer, instruction",
        ),
        ("other: {answers: [a, b]}", "other: no train.json, .*parquet"),
    ],
)
def test_wrong_own_tasks_are_one_line_with_the_page_that_shows_them(own, message, tmp_path, capsys):
    data = own_world(tmp_path / "data")
    (tmp_path / "data/tasks.yaml").write_text(own)
    assert main(["train", "demo", f"data.path={data}", *SMALL, "--output", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and ("#your-own-tasks" in said or "not YAML" in said)
    with pytest.raises(ValueError, match=message):
        raise ValueError(said)
