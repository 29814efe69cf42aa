"""Run the tests with the lowest, or with the newest, versions that pyproject.toml allows, in an environment of their own.

usage: python scripts/compatibility.py lowest|newest [FOLDER [TEST.py ...]]     (FOLDER keeps the environment; default: a temporary one)

Tests what is committed, the warnings that arise in d2mora being errors; writes its part of benchmarks/results/compatibility.json.
"""

import json
import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
FLAGS = {"lowest": ["-c", "constraints-lowest.txt"], "newest": ["--upgrade", "--upgrade-strategy", "eager"]}
TESTS = [
    f"tests/test_{name}.py" for name in ("golden", "peft", "tasks", "numerics", "safe_loading", "train", "evaluate")
]
RESULT = ROOT / "benchmarks" / "results" / "compatibility.json"
ASK = "import json, platform; from importlib.metadata import version as v; print(json.dumps({'python': platform.python_version()} | {n: v(n) for n in %r.split()}))"
NAMES = "torch transformers peft accelerate datasets huggingface_hub safetensors numpy click pydantic pyyaml"


def committed(
    folder: Path,  # is filled
) -> str:  # the commit
    "The committed tree, so that work in progress does not matter."
    folder.mkdir(parents=True, exist_ok=True)
    archive = subprocess.run(["git", "archive", "HEAD"], cwd=ROOT, check=True, capture_output=True).stdout
    subprocess.run(["tar", "x", "-C", folder], input=archive, check=True)
    return subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.strip()


def environment(
    folder: Path,  # of the environment
    tree: Path,  # of the committed files
    which: str,  # lowest or newest
) -> Path:  # its Python
    "Install d2mora and pytest, nothing else."
    python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
    subprocess.run(
        [python, "-m", "pip", "install", "-q", *FLAGS[which], "-e", ".", "pytest", "hypothesis", "psutil"],
        cwd=tree,
        check=True,
    )
    return python


def counts(
    report: Path,  # of pytest, in JUnit's form
    commit: str,  # that was tested
) -> dict:  # by file: passed, failed, skipped, commit
    "How the tests ended."
    found: dict[str, dict] = {}
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        own = found.setdefault(
            case.get("classname").split(".")[-1], {"passed": 0, "failed": 0, "skipped": 0, "commit": commit}
        )
        marks = {mark.tag for mark in case}
        own["failed" if marks & {"failure", "error"} else "skipped" if "skipped" in marks else "passed"] += 1
    return found


def run(which: str, folder: Path, work: Path, tests: list[str]) -> dict:  # what is written
    "One set of versions."
    tree = work / "tree"
    commit, python = committed(tree), environment(folder, tree, which)
    shared = os.environ.get("D2MORA_SHARED", str(ROOT.parent / "shared"))
    quiet = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "D2MORA_SHARED": shared, "PYTHONPATH": ""}
    subprocess.run(
        [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={work}/report.xml", *tests],
        cwd=tree,
        env=os.environ | quiet,
    )
    versions = json.loads(
        subprocess.run([python, "-c", ASK % NAMES], check=True, capture_output=True, text=True).stdout
    )
    return {"versions": versions, "files": counts(work / "report.xml", commit)}


def merged(old: dict, new: dict) -> dict:
    "What was found before with these versions, and now; with its totals."
    files = (old.get("files", {}) if old.get("versions") == new["versions"] else {}) | new["files"]
    return {
        "versions": new["versions"],
        **{how: sum(own[how] for own in files.values()) for how in ("passed", "failed", "skipped")},
        "files": files,
    }


def main(words: list[str]) -> int:
    if not words or words[0] not in FLAGS:
        print("compatibility: name lowest or newest", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as work:
        new = run(
            words[0], Path(words[1]) if len(words) > 1 else Path(work) / "environment", Path(work), words[2:] or TESTS
        )
    known = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    known[words[0]] = found = merged(known.get(words[0], {}), new)
    RESULT.write_text(json.dumps({name: known[name] for name in FLAGS if name in known}, indent=1) + "\n")
    print(f"{words[0]}: {found['passed']} passed, {found['failed']} failed, {found['skipped']} skipped")
    return int(found["failed"] > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
