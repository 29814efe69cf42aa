"""Every case of the catalogue (bad_input.py): one line that says what, where and how to mend; nothing written, nothing hangs.

With D2MORA_RECORD=1 the answers are kept in benchmarks/results/bad_input.json, from which the site's page is made.
"""

import json
import os
import re
import shlex
import signal
import sys
import time
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path

import bad_input
import peft
import pytest
import torch
from bad_input import CASES, Case

import d2mora
from d2mora.cli import main
from d2mora.data import read_task
from d2mora.recipe import load_recipe

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results" / "bad_input.json"
SECONDS = 120  # a case that takes longer hangs
LONGEST = 640  # characters of a line that is still read
NAMES = {**vars(bad_input), "d2mora": d2mora, "peft": peft, "torch": torch, "load_recipe": load_recipe, "read_task": read_task,
         "D2MoraConfig": d2mora.D2MoraConfig, "convert_official_checkpoint": d2mora.convert_official_checkpoint}
ANSWERS: dict[str, dict] = {}


def put(case: Case, folder: Path) -> None:
    "Make the case's files."
    for name, content in case.files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if callable(content): content(path)
        else: path.write_bytes(content if isinstance(content, bytes) else content.encode())


def there(folder: Path) -> dict[str, str]:
    "All that lies in a folder: files by their hash, and folders."
    return {str(p.relative_to(folder)): sha256(p.read_bytes()).hexdigest() if p.is_file() else "" for p in folder.rglob("*")}


def stop(*args): raise TimeoutError(f"no answer within {SECONDS} s")


def command(case: Case, capsys) -> str:
    "The line on stderr; the status must be 2, and stdout empty."
    capsys.readouterr()
    status, (out, err) = main(shlex.split(case.given)[1:]), capsys.readouterr()
    assert (status, out, err.count("\n")) == (2, "", 1), (status, out[-2000:], err[-2000:])
    return err.removesuffix("\n").removeprefix("d2mora: ")


def answer(case: Case, capsys) -> str:
    "What the case says, in one line."
    if case.given.startswith("d2mora "): return command(case, capsys)
    with pytest.raises(ValueError) as error: eval(case.given, dict(NAMES))
    return str(error.value)


def fits(said: str, says: str) -> bool:
    "Whether a message is the one in the table, where … stands for anything."
    return re.fullmatch(".*".join(map(re.escape, says.split("…"))), said) is not None


def short(given: str) -> str: return given if len(given) <= 160 else f"{given[:120]} … {given[-30:]}"


@pytest.fixture(scope="module", autouse=True)
def recorded(tmp_path_factory):
    "Nothing that `datasets` caches stays; afterwards the answers are kept, if that was asked for and every case was tried."
    import datasets

    before, datasets.config.HF_DATASETS_CACHE = datasets.config.HF_DATASETS_CACHE, tmp_path_factory.mktemp("cache")
    begun = time.perf_counter()
    yield
    datasets.config.HF_DATASETS_CACHE = before
    if os.environ.get("D2MORA_RECORD") and len(ANSWERS) == len(CASES):
        accepted = sum(case.says == "accepted" for case in CASES)
        total = {"cases": len(CASES), "refused": len(CASES) - accepted, "accepted": accepted, "seconds": round(time.perf_counter() - begun, 1)}
        found = {"total": total, "versions": {name: version(name) for name in ("d2mora", "torch", "transformers", "peft")}, "cases": [ANSWERS[case.id] for case in CASES]}
        RESULTS.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_case(case, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("D2MORA_DATA", raising=False)
    put(case, tmp_path)
    before = there(tmp_path)
    signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        if case.says == "accepted":
            assert eval(case.given, dict(NAMES)) == eval(case.same, dict(NAMES))
            said = "accepted: the same result"
        else: said = answer(case, capsys).replace(str(tmp_path), ".").replace(str(tmp_path.resolve()), ".")
    finally: signal.alarm(0)
    assert there(tmp_path) == before, "something was written"
    assert case.says == "accepted" or fits(said, case.says), f"\n{said}\nis not\n{case.says}"
    assert len(said) <= LONGEST and "Traceback" not in said and " at 0x" not in said, said
    ANSWERS[case.id] = {"id": case.id, "wrong": case.wrong, "given": short(case.given), "says": said}


def test_the_catalogue_is_large_and_each_case_another():
    assert len(CASES) >= 150 and len({case.id for case in CASES}) == len({(case.given, str(case.files)) for case in CASES}) == len(CASES)
    assert all(case.wrong and case.says not in ("", "…") and "\n" not in case.says for case in CASES)


def test_the_committed_answers_are_those_of_this_table():
    cases = json.loads(RESULTS.read_text(encoding="utf-8"))["cases"]
    assert [c["id"] for c in cases] == [case.id for case in CASES], "record again: D2MORA_RECORD=1"
    for kept, case in zip(cases, CASES):
        assert (kept["wrong"], kept["given"]) == (case.wrong, short(case.given))
        assert case.says == "accepted" or fits(kept["says"], case.says), case.id


@pytest.mark.parametrize("broken", ["a traceback", "two lines", "another line", "a file", "an answer"])
def test_a_worse_answer_is_noticed(broken, tmp_path, capsys, monkeypatch):
    case = next(case for case in CASES if case.id == "recipe: misspelt key")

    def worse(recipe, overrides=()):
        if broken == "a traceback": raise KeyError("cutof")
        if broken == "two lines": print("looking", file=sys.stderr)
        if broken == "a file": Path("out").mkdir()
        if broken == "an answer": raise SystemExit(0)
        raise ValueError("something is wrong" if broken == "another line" else case.says)

    monkeypatch.setattr("d2mora.train.load_recipe", worse)
    with pytest.raises((AssertionError, SystemExit)): test_case(case, tmp_path, capsys, monkeypatch)
