"""Count our notebooks and package, beside the codebases that they are measured against; --write puts the table into CONTRIBUTING.md.

usage: python scripts/counts.py [--write] [FOLDER ...]     further folders hold notebooks, of fastcore or claudette for example
Lines are lines with something on them, `#|` directives left out. A test cell is one that is not exported and checks something.
The models' column is what the project's notes on style say of them, where D2MORA_SHARED has these notes.
"""
import ast, os, re, sys
from pathlib import Path
from statistics import mean, median

import nbformat

ROOT = Path(__file__).resolve().parents[1]
MODELS = Path(os.environ.get("D2MORA_SHARED", ROOT / "../shared")) / "style.md"
CHECKS = re.compile(r"\bassert\b|assert_close|shows_error|test_\w+\(|expect_fail")
START, END = "<!-- counts: scripts/counts.py --write -->", "<!-- end of counts -->"


def code_lines(source: str  # of a code cell
               ) -> int:
    "Lines of code in a cell."
    return sum(bool(line.strip()) and not line.lstrip().startswith("#|") for line in source.splitlines())


def words(source: str  # of a markdown cell
          ) -> int:
    "Words of prose: no formulas, pictures, tables or addresses."
    text = re.sub(r"```.*?```|\$\$.*?\$\$|!\[[^\]]*\]\([^)]*\)|^\|.*$", " ", source, flags=re.S | re.M)
    return len(re.findall(r"[^\W\d_][\w'’-]*", re.sub(r"\]\([^)]*\)", "]", text)))


def exported(cells: list  # sources of code cells
             ) -> list:   # functions and classes
    "What a notebook gives to its module."
    trees = [ast.parse(re.sub(r"^[%!].*$", "", s, flags=re.M)) for s in cells if re.search(r"^#\|\s*export", s, re.M)]
    return [n for tree in trees for n in tree.body if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and not n.name.startswith("_")]


def count(paths: list  # notebooks
          ) -> dict:
    "The counts of some notebooks together."
    nbs = [nbformat.read(p, 4).cells for p in paths]
    code = [c.source for nb in nbs for c in nb if c.cell_type == "code" and code_lines(c.source)]
    prose = sum(words(c.source) for nb in nbs for c in nb if c.cell_type == "markdown")
    lines, names = [code_lines(s) for s in code], exported(code)
    tests = sum(bool(CHECKS.search(s)) for s in code if not re.search(r"^#\|\s*export", s, re.M))
    return {"notebooks": len(nbs), "code cells": len(code), "median": median(lines), "mean": mean(lines), "longest": max(lines),
            "words": prose / sum(lines), "exports": len(names), "tests": tests / len(names) if names else None}


def function_lengths(folder: Path  # a package
                     ) -> list:    # lines of each function, signature included
    "How long the functions of a package are."
    trees = [ast.parse(p.read_text(encoding="utf-8")) for p in sorted(folder.rglob("*.py"))]
    return [n.end_lineno - n.lineno + 1 for tree in trees for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]


def installed(name: str  # package or sub-package
              ) -> Path | None:
    "Where an installed package lies."
    from importlib.util import find_spec
    try: spec = find_spec(name)
    except ModuleNotFoundError: return None
    return Path(spec.origin).parent if spec and spec.origin else None


def said_of_models() -> dict[str, str]:  # by point: code cell, exported function, prose
    "What the notes on style say of the models."
    if not MODELS.is_file(): return {}
    return {m[1]: m[2] for m in re.finditer(r"^\| ([\w ]+) \| ([^|]+) \| [^|]+ \|$", MODELS.read_text(encoding="utf-8"), re.M)}


def table() -> str:  # markdown
    "Ours beside the models', then functions of packages beside each other."
    ours, said = count(sorted((ROOT / "nbs").glob("*.ipynb"))), said_of_models()
    rows = [("code cells", f"{ours['code cells']} in {ours['notebooks']} notebooks", ""),
            ("lines of a code cell", f"median {ours['median']:g}, mean {ours['mean']:.1f}, longest {ours['longest']}", said.get("code cell", "")),
            ("words of prose for a code line", f"{ours['words']:.1f}", said.get("prose", "")),
            ("test cells for an export", f"{ours['tests']:.1f} ({ours['exports']} exports)", "fastcore's `01_basics`: 1.2" if said else "")]
    lines = ["| | ours | the models |", "|---|---|---|", *(f"| {' | '.join(row)} |" for row in rows), "", "| functions, signature included | how many | median | longest |", "|---|---|---|---|"]
    for name in ("d2mora", "fastcore", "peft.tuners.lily", "peft.tuners.lora"):
        folder = ROOT / "d2mora" if name == "d2mora" else installed(name)
        if folder: lines.append(f"| {name} | {len(n := function_lengths(folder))} | {median(n):g} | {max(n)} |")
    return "\n".join(lines)


def main():
    "Print the table, and counts by notebook or folder; --write: into CONTRIBUTING.md."
    folders = [Path(a) for a in sys.argv[1:] if not a.startswith("-")]
    if "--write" in sys.argv:
        path = ROOT / "CONTRIBUTING.md"
        text = path.read_text(encoding="utf-8")
        if START not in text or END not in text: raise SystemExit(f"counts: {path.name} has no place for them: put {START} and {END} there")
        head, rest = text.split(START)
        path.write_text(f"{head}{START}\n{table()}\n{END}{rest.split(END)[1]}", encoding="utf-8")
    print(table(), end="\n\n")
    print(f"{'':24}{'cells':>6}{'median':>8}{'longest':>8}{'words/line':>11}{'exports':>8}{'tests/export':>13}")
    for name, paths in [(p.stem, [p]) for p in sorted((ROOT / "nbs").glob("*.ipynb"))] + [(f.name, sorted(f.rglob("*.ipynb"))) for f in folders]:
        if not any(c.cell_type == "code" for p in paths for c in nbformat.read(p, 4).cells): continue
        c = count(paths)
        print(f"{name[:23]:24}{c['code cells']:>6}{c['median']:>8g}{c['longest']:>8}{c['words']:>11.1f}{c['exports']:>8}{c['tests'] or 0:>13.1f}")


if __name__ == "__main__": main()
