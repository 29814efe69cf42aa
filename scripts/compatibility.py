"""Run the tests with the lowest, or with the newest, versions that pyproject.toml allows, in an environment of their own.

usage: python scripts/compatibility.py lowest|newest [FOLDER]     (FOLDER keeps the environment; default: a temporary one)

Tests what is committed, the warnings that arise in d2mora being errors; writes its part of benchmarks/results/compatibility.json.
"""
import json, os, subprocess, sys, tempfile, time, venv
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
FLAGS = {"lowest": ["-c", "constraints-lowest.txt"], "newest": ["--upgrade", "--upgrade-strategy", "eager"]}
TESTS = [f"tests/test_{name}.py" for name in ("golden", "peft", "tasks", "numerics", "hostile", "train", "evaluate")]
RESULT = ROOT / "benchmarks" / "results" / "compatibility.json"
ASK = "import json, platform; from importlib.metadata import version as v; print(json.dumps({'python': platform.python_version()} | {n: v(n) for n in %r.split()}))"
NAMES = "torch transformers peft accelerate datasets huggingface_hub safetensors numpy click pydantic pyyaml"


def committed(folder: Path  # is filled
              ) -> str:     # the commit
    "The committed tree, so that work in progress does not matter."
    folder.mkdir(parents=True, exist_ok=True)
    archive = subprocess.run(["git", "archive", "HEAD"], cwd=ROOT, check=True, capture_output=True).stdout
    subprocess.run(["tar", "x", "-C", folder], input=archive, check=True)
    return subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()


def environment(folder: Path,  # of the environment
                tree: Path,    # of the committed files
                which: str     # lowest or newest
                ) -> Path:     # its Python
    "Install d2mora and pytest, nothing else."
    python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    if not python.exists(): venv.create(folder, with_pip=True)
    subprocess.run([python, "-m", "pip", "install", "-q", *FLAGS[which], "-e", ".", "pytest", "hypothesis", "psutil"], cwd=tree, check=True)
    return python


def counts(report: Path  # of pytest, in JUnit's form
           ) -> dict:    # passed, failed, skipped, and what passed by file
    "How the tests ended."
    found, by_file = {"passed": 0, "failed": 0, "skipped": 0}, dict.fromkeys((Path(name).stem for name in TESTS), 0)
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        marks = {mark.tag for mark in case}
        how = "failed" if marks & {"failure", "error"} else "skipped" if "skipped" in marks else "passed"
        found[how] += 1
        by_file[case.get("classname").split(".")[-1]] += how == "passed"
    return found | {"passed_by_file": by_file}


def run(which: str, folder: Path, work: Path) -> dict:  # what is written
    "One set of versions."
    tree, begun = work / "tree", time.time()
    commit, python = committed(tree), environment(folder, tree, which)
    shared = os.environ.get("D2MORA_SHARED", str(ROOT.parent / "shared"))
    quiet = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "D2MORA_SHARED": shared, "PYTHONPATH": ""}
    subprocess.run([python, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={work}/report.xml", *TESTS], cwd=tree, env=os.environ | quiet)
    versions = json.loads(subprocess.run([python, "-c", ASK % NAMES], check=True, capture_output=True, text=True).stdout)
    return {"versions": versions, "commit": commit, **counts(work / "report.xml"), "minutes": round((time.time() - begun) / 60, 1)}


def main(words: list[str]) -> int:
    if not words or words[0] not in FLAGS:
        print("compatibility: name lowest or newest", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as work:
        found = run(words[0], Path(words[1]) if len(words) > 1 else Path(work) / "environment", Path(work))
    known = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    RESULT.write_text(json.dumps({name: (known | {words[0]: found})[name] for name in FLAGS if name in known | {words[0]: found}}, indent=1) + "\n")
    print(f"{words[0]}: {found['passed']} passed, {found['failed']} failed, {found['skipped']} skipped")
    return int(found["failed"] > 0)


if __name__ == "__main__": sys.exit(main(sys.argv[1:]))
