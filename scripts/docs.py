"""The book as a site: nbdev processes the notebooks, Quarto renders them where it is installed, else pandoc does; then the site is checked.

usage: python scripts/docs.py [FOLDER]     (default _docs)
"""

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import site_check
import standin
import yaml
from colab import REPO
from execnb.nbio import dict2nb, mk_cell, read_nb, write_nb

ROOT = Path(__file__).resolve().parents[1]
NBS, PROC, HERE = ROOT / "nbs", ROOT / "_proc", Path(__file__).parent


def stop(message: str):
    "A user's mistake: one line, exit status 2."
    print(f"docs: {message}", file=sys.stderr)
    sys.exit(2)


def read_notebook(path: Path):
    "Read a notebook, which must have been run without an error."
    nb = read_nb(path)
    code = [c for c in nb.cells if c.cell_type == "code" and c.source.strip()]
    outputs = [out for c in code for out in c.get("outputs", [])]
    for out in outputs:
        if out["output_type"] == "error":
            what = f"{out['ename']}: {out['evalue'][:120]}"
            stop(f"{path.name} fails with {what}: mend it, then make notebooks NB={path.name}")
    if len(code) > 3 and not outputs:
        stop(f"{path.name} has no stored outputs: run make notebooks NB={path.name}")
    return nb


def prepare(cell):
    "One cell as the cells of its page: exported functions get a heading, the code of plots and long tables is folded."
    if cell.cell_type != "code":
        return [cell]
    lines, kinds = cell.source.count("\n"), {kind for out in cell.get("outputs", []) for kind in out.get("data", {})}
    names = []
    if re.match(r"#\|\s*export", cell.source):
        names = re.findall(r"^(?:def|class) (\w+)", cell.source, re.M)
    public = [n for n in names if not n.startswith("_")]
    what = "plot" if "image/png" in kinds else "table" if "text/markdown" in kinds and lines > 12 else ""
    if names:
        fold = "show" if lines <= 25 else "true"
        head = f'#| code-fold: {fold}\n#| code-summary: "Exported source"\n'
        cell.source = head + re.sub(r"^#\|\s*export\s*\n", "", cell.source, flags=re.M)
    elif what and not re.search(r"^#\| ?(code-fold|echo|hide)", cell.source, re.M):
        cell.source = f'#| code-fold: true\n#| code-summary: "Code of the {what}"\n{cell.source}'
    anchors = "".join(f"[]{{#{n.lower()}}}" for n in public[1:])
    heading = f"### {', '.join(public)} {{#{public[0].lower()} .export}}\n\n{anchors}" if public else ""
    return [mk_cell(heading, "markdown"), cell] if heading else [cell]


def process_notebook(path: Path):
    "One notebook through nbdev's own steps, without those that run code."
    from nbdev.process import NBProcessor
    from nbdev.processors import FilterDefaults

    nb = read_notebook(path)
    nb.cells = dict2nb(cells=[new for cell in nb.cells for new in prepare(cell)]).cells
    left_out = ("add_show_docs", "exec_show_docs", "mv_exports")
    NBProcessor(nb=nb, procs=[p for p in FilterDefaults().base_procs() if p.__name__ not in left_out]).process()
    front = next(i for i, c in enumerate(nb.cells) if c.cell_type == "raw")
    source = f"::: {{.page-links}}\n[The notebook of this page]({REPO}/blob/main/nbs/{path.name})\n:::"
    nb.cells.insert(front + 1, mk_cell(source, "markdown"))
    write_nb(nb, PROC / path.name)


def names_page(order: list[str]) -> str:
    "All exported functions and classes with their docstrings, in the order of the pages; each name leads to its place there."
    from d2mora._modidx import d

    text = ['---\ntitle: "API"\ndescription: "Every exported function and class, and where the book builds it."\n---']
    place = lambda item: order.index(next(iter(item[1].values()))[0].partition("#")[0])
    for module, names in sorted(d["syms"].items(), key=place):
        tree = ast.parse((ROOT / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8"))
        rows = []
        for node in tree.body:
            if not isinstance(node, (ast.FunctionDef, ast.ClassDef)) or node.name.startswith("_"):
                continue
            parts = (ast.get_docstring(node) or "").split("\n")[0].split("`")  # every second one is code
            said = "`".join(p if i % 2 else re.sub(r"([*_$<>|@^~])", r"\\\1", p) for i, p in enumerate(parts))
            rows.append(f"[`{node.name}`]({names[f'{module}.{node.name}'][0]})\n: {said}")
        text += [f"## {module} {{#{module.split('.')[-1]}}}", *rows]
    return "\n\n".join(text) + "\n"


def process():
    "Everything that a renderer needs, in one folder."
    os.chdir(ROOT)  # where nbdev finds settings.ini
    shutil.rmtree(PROC, ignore_errors=True)
    shutil.copytree(NBS / "images", PROC / "images")
    shutil.copy(HERE / "site.scss", PROC)
    project = yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf-8"))
    book = standin.names_in(project["website"]["sidebar"]["contents"])
    paths = sorted(NBS.glob("*.ipynb"))
    if lost := {*book} ^ {p.name for p in paths}:
        stop(f"the sidebar of _quarto.yml and the notebooks of nbs/ differ: {', '.join(sorted(lost))}")
    for path in paths:
        process_notebook(path)
    project["project"] |= {"output-dir": "_docs", "render": [*book, "api.qmd"]}
    (PROC / "_quarto.yml").write_text(yaml.safe_dump(project, sort_keys=False, allow_unicode=True), encoding="utf-8")
    pages = {re.sub(r"^\d+[a-z]?_|\.\w+$", "", name) + ".html": name for name in [*book, "api.qmd"]}
    (PROC / "api.qmd").write_text(names_page([*pages]), encoding="utf-8")
    for path in PROC.glob("*.ipynb"):  # nbdev's links to names lead to the hosted site: link to the source instead
        links = re.escape(project["website"]["site-url"]) + r"/([\w.-]+\.html)"
        text = re.sub(links, lambda m: pages.get(m[1], m[0]), path.read_text(encoding="utf-8"))
        path.write_text(text, encoding="utf-8")


def build(out: Path):
    "Process, render, check."
    sys.modules["d2mora"] = package = ModuleType("d2mora")  # nbdev imports our index of names: this way without torch
    package.__path__ = [str(ROOT / "d2mora")]
    quarto = shutil.which("quarto")
    process()
    if quarto:
        if subprocess.run([quarto, "render", PROC, "--no-execute"]).returncode:
            stop("quarto render failed: see its last lines above")
        shutil.rmtree(out, ignore_errors=True)
        shutil.move(PROC / "_docs", out)
    else:
        standin.render(PROC, out)
    if bad := site_check.faults(out):
        stop("the site is built, but not good:\n" + "\n".join(bad))
    count = len(list(out.glob("*.html")))
    print(f"docs: {count} pages in {out} by {'Quarto' if quarto else 'pandoc'}; links, anchors and pictures are good")


if __name__ == "__main__":
    build(Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "_docs").resolve())
