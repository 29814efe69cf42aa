"""The book as a site: nbdev processes the notebooks, Quarto renders them where it is installed, else pandoc does; then the site is checked.

usage: python scripts/docs.py [FOLDER]     (default _docs)
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

from colab import CELL, FETCH, REPO

ROOT = Path(__file__).resolve().parents[1]
NBS, PROC, HERE = ROOT / "nbs", ROOT / "_proc", Path(__file__).parent
REFERENCES = re.compile(
    r"(?i)unable to resolve|unresolved|duplicate .*(?:label|identifier|crossref)|citeproc: citation"
)


def stop(
    message: str,  # what, where, how to mend
):
    "A user's mistake: one line, exit status 2."
    print(f"docs: {message}", file=sys.stderr)
    sys.exit(2)


# ---- notebooks ----
def read_notebook(
    path: Path,  # of nbs/
) -> dict:  # the notebook
    "Read a notebook that was run: it must have stored outputs, and none may be an error."
    import nbformat

    try:
        nb = nbformat.read(path, 4)
    except Exception as error:
        stop(f"{path.name} is no notebook ({type(error).__name__}): repair or remove it")
    code = [c for c in nb.cells if c.cell_type == "code" and c.source.strip()]
    for cell in code:
        for out in cell.outputs:
            if out.output_type == "error":
                stop(
                    f"{path.name} fails with {out.ename}: {out.evalue[:120]} in the cell {cell.source.splitlines()[0][:60]!r}: mend it, then make notebooks NB={path.name}"
                )
    drawn = [c for c in code if re.search(r"^#\| ?label: fig-", c.source, re.M)]
    if (len(code) > 3 and not any(c.outputs for c in code)) or any(not c.outputs for c in drawn):
        stop(f"{path.name} has no stored outputs: run make notebooks NB={path.name}")
    return nb


def show_exports(
    nb: dict,  # a notebook
) -> None:
    "Keep exported functions, each under a heading with its name, instead of nbdev's cards: here the code is the text."
    from execnb.nbio import dict2nb, mk_cell

    cells = []
    for cell in nb.cells:
        names = (
            re.findall(r"^(?:def|class) (\w+)", cell.source, re.M)
            if cell.cell_type == "code" and re.match(r"#\|\s*export", cell.source)
            else []
        )
        public = [n for n in names if not n.startswith("_")]
        if public:
            cells.append(
                mk_cell(
                    "### "
                    + ", ".join(public)
                    + f" {{#{public[0].lower()} .export}}\n\n"
                    + "".join(f"[]{{#{n.lower()}}}" for n in public[1:]),
                    "markdown",
                )
            )
        if names:
            cell.source = re.sub(r"^#\|\s*export\s*$", "#| exports", cell.source, flags=re.M)
        cells.append(cell)
    nb.cells = dict2nb(cells=cells).cells


def describe_pictures(
    nb: dict,  # a notebook
) -> None:
    "Give each plot an alt text: its own, else its caption; and each drawing its text, which Quarto would show as a caption only."
    for cell in nb.cells:
        if cell.cell_type == "markdown":
            cell.source = re.sub(
                r"^!\[([^\]]+)\]\(([^)]+)\)$",
                lambda m: f"![{m[1]}]({m[2]}){{fig-alt={json.dumps(m[1], ensure_ascii=False)}}}",
                cell.source,
                flags=re.M,
            )
        if cell.cell_type != "code" or not any("image/png" in o.get("data", {}) for o in cell.get("outputs", [])):
            continue
        caption = re.search(r"^#\| ?fig-cap: *(.+)$", cell.source, re.M)
        if caption and not re.search(r"^#\| ?fig-alt:", cell.source, re.M):
            cell.source = f"#| fig-alt: {caption[1]}\n{cell.source}"


def fold_code(
    nb: dict,  # a notebook
) -> None:
    "Fold the code of plots, long code of tables, and exported functions of more than 25 lines; shorter ones are open."
    for cell in nb.cells:
        if cell.cell_type != "code":
            continue
        lines, shown = cell.source.count("\n"), {kind for o in cell.get("outputs", []) for kind in o.get("data", {})}
        if lines > 25:
            cell.source = cell.source.replace("#| code-fold: show", "#| code-fold: true")
        what = "plot" if "image/png" in shown else "table" if "text/markdown" in shown and lines > 12 else ""
        if what and not re.search(r"^#\| ?(code-fold|echo)", cell.source, re.M):
            cell.source = f'#| code-fold: true\n#| code-summary: "Code of the {what}"\n{cell.source}'


def page_links(
    name: str,  # notebook
    module: str,  # its module, or ""
) -> str:  # markdown
    "The line under a page's title."
    links = [f'<a href="notebooks/{name}" download>Download the notebook</a>']
    if module:
        links.append(f"[API](api_{module}.qmd)")
    return f"::: {{.page-links}}\n{' · '.join([*links, f'[Edit this page]({REPO}/edit/main/nbs/{name})'])}\n:::"


def module_of(
    nb: dict,  # a notebook
) -> str:  # the module that it exports, or ""
    "The name behind `default_exp`."
    found = [
        m[1]
        for c in nb.cells
        if c.cell_type == "code"
        for m in [re.search(r"^#\|\s*default_exp (\w+)", c.source, re.M)]
        if m
    ]
    return found[0] if found else ""


def process_notebook(
    path: Path,  # a notebook of nbs/
    proc: Path,  # folder of processed notebooks
) -> str:  # the module that it exports, or ""
    "One notebook through nbdev's own steps, without those that run code."
    from execnb.nbio import mk_cell, read_nb, write_nb
    from nbdev.process import NBProcessor
    from nbdev.processors import FilterDefaults

    nb = read_nb(path)
    module = module_of(nb)
    show_exports(nb)
    steps = [
        p for p in FilterDefaults().base_procs() if p.__name__ not in ("add_show_docs", "exec_show_docs", "mv_exports")
    ]
    NBProcessor(nb=nb, procs=steps).process()
    describe_pictures(nb)
    fold_code(nb)
    front = next(i for i, c in enumerate(nb.cells) if c.cell_type == "raw")
    nb.cells.insert(front + 1, mk_cell(page_links(path.name, module), "markdown"))
    write_nb(nb, proc / path.name)
    return module


def portable(
    path: Path,  # a notebook of nbs/
    copy: Path,  # where to write it
    site: str,  # address of the hosted site
) -> None:
    "The notebook for download: it fetches what it imports, and its pictures and links lead to the site."
    import nbformat

    nb = nbformat.read(path, 4)
    for cell in nb.cells:
        if cell.cell_type == "markdown":
            cell.source = re.sub(r"\]\((images/[^)]+)\)", rf"]({site}/\1)", cell.source)
            cell.source = re.sub(r"\]\((?:\d+[a-z]?_)?(\w+)\.ipynb(#[\w-]+)?\)", rf"]({site}/\1.html\2)", cell.source)
        elif cell.source == CELL:
            cell.source = FETCH.replace("/content/", "")
    nbformat.write(nb, copy)


# ---- pages that are no notebooks ----
def repository_page(
    name: str,  # CHANGELOG.md, …
    description: str,
) -> str:  # markdown with front matter
    "A text of the repository's top level as a page; its links to notebooks become links to pages, to other files links to the repository."
    title, _, text = (ROOT / name).read_text(encoding="utf-8").partition("\n")
    text = re.sub(r"\]\(nbs/([\w.]+\.ipynb)", r"](\1", text)
    text = re.sub(r"\]\((?![a-z]+:|#|[\w.]+\.ipynb)", rf"]({REPO}/blob/main/", text)
    edit = f"::: {{.page-links}}\n[Edit this page]({REPO}/edit/main/{name})\n:::"
    return (
        f"---\ntitle: {json.dumps(title.lstrip('# '))}\ndescription: {json.dumps(description)}\n---\n\n{edit}\n\n{text}"
    )


def citation_page() -> str:  # markdown with front matter
    "How to cite, from CITATION.cff: the package, and the paper whose method it implements."
    import yaml

    cff = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    paper = cff["references"][0]
    people = lambda authors: " and ".join(
        a["name"] if "name" in a else f"{a['family-names']}, {a['given-names']}" for a in authors
    )
    software = f"@software{{d2mora,\n  title   = {{{cff['title']}}},\n  author  = {{{{{people(cff['authors'])}}}}},\n  version = {{{cff['version']}}},\n  url     = {{{cff['repository-code']}}}\n}}"
    article = (
        f"@inproceedings{{d2mora-paper,\n  title     = {{{paper['title']}}},\n  author    = {{{people(paper['authors'])}}},\n  booktitle = {{{paper['collection-title']}}},\n"
        f"  year      = {{{paper['year']}}},\n  volume    = {{{paper['volume']}}},\n  number    = {{{paper['issue']}}},\n  pages     = {{{paper['start']}--{paper['end']}}}\n}}"
    )
    return (
        f'---\ntitle: "Citing"\ndescription: "The paper for the method, the package for the code."\n---\n\nThe method is the paper\'s:\n\n```bibtex\n{article}\n```\n\n'
        f"This package and book:\n\n```bibtex\n{software}\n```\n\nThe same is in [CITATION.cff]({REPO}/blob/main/CITATION.cff), which GitHub reads.\n"
    )


def lost_page() -> str:  # markdown with front matter
    "404."
    return (
        '---\ntitle: "No such page"\ndescription: "The address is wrong, or the page has moved."\nsearch: false\n---\n\n'
        "Begin at [the book's first page](index.ipynb), look a name up in the [API](api.qmd) or a term in the [glossary](glossary.ipynb).\n"
    )


def local_links(
    text: str,  # markdown
    site: str,  # address of the hosted site
    pages: dict,  # page of the hosted site -> its source in the project
) -> str:  # markdown
    "nbdev's links to names lead to the hosted site: make them links between sources, which work everywhere."
    return re.sub(re.escape(site) + r"/([\w.-]+\.html)", lambda m: pages.get(m[1], m[0]), text)


def write_pages(
    proc: Path,  # folder of processed pages
    modules: dict,  # notebook -> module, reading order
) -> list:  # names of the pages written
    "The reference and the texts of the repository."
    import api
    from nbdev.doclinks import NbdevLookup

    paths = [ROOT / "d2mora" / f"{m}.py" for m in modules.values()]
    made = {"api.qmd": api.overview(paths, ROOT / "d2mora" / "__init__.py")}
    link = NbdevLookup().linkify
    for book, path in zip(modules, paths):
        made[f"api_{path.stem}.qmd"] = link(api.module_page(path, book, f"{REPO}/blob/main"))
    made["changelog.qmd"] = repository_page("CHANGELOG.md", "What changed, version by version.")
    made["security.qmd"] = repository_page(
        "SECURITY.md", "What is promised about hostile files and faults, by which test, and what is not."
    )
    made["contributing.qmd"] = repository_page("CONTRIBUTING.md", "How the book and the package are made.")
    made |= {"citing.qmd": citation_page(), "404.qmd": lost_page()}
    for name, text in made.items():
        (proc / name).write_text(text, encoding="utf-8")
    return list(made)


def write_project(
    proc: Path,  # folder of processed pages
    modules: dict,  # notebook -> module, reading order
    made: list,  # pages that are no notebooks
) -> dict:  # the project file
    "_quarto.yml with nbdev's part, the list of pages and the reference's sidebar, all in one file."
    import yaml
    from standin import names_in

    project = yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf-8"))
    nbdev = yaml.safe_load((NBS / "nbdev.yml").read_text(encoding="utf-8"))
    project["website"] = nbdev["website"] | project["website"]
    book = project["website"]["sidebar"][0]
    if lost := {*names_in(book["contents"])} ^ {
        *(p.name for p in proc.glob("*.ipynb")),
        *(n for n in made if not n.startswith(("api", "404"))),
    }:
        stop(f"the sidebar of _quarto.yml and the notebooks of nbs/ differ: {', '.join(sorted(lost))}")
    project["website"]["sidebar"].append(
        {
            "id": "api",
            "title": "API",
            "style": book["style"],
            "contents": ["api.qmd", *(f"api_{m}.qmd" for m in modules.values())],
        }
    )
    project["project"] |= {
        "output-dir": "_docs",
        "render": [*names_in(book["contents"]), *(n for n in made if n.startswith(("api", "404")))],
    }
    project.pop("metadata-files", None)
    (proc / "_quarto.yml").write_text(yaml.safe_dump(project, sort_keys=False, allow_unicode=True), encoding="utf-8")
    return project


def process(
    proc: Path,  # folder to fill
) -> None:
    "Everything that a renderer needs, in one folder."
    import nbdev.quarto

    paths = sorted(NBS.glob("*.ipynb"))
    for path in paths:
        read_notebook(path)
    os.chdir(ROOT)  # where nbdev finds settings.ini
    shutil.rmtree(proc, ignore_errors=True)
    (proc / "notebooks").mkdir(parents=True)
    nbdev.quarto.refresh_quarto_yml()
    shutil.copytree(NBS / "images", proc / "images")
    shutil.copy(HERE / "site.scss", proc / "site.scss")
    modules = {path.name: module for path in paths if (module := process_notebook(path, proc))}
    project = write_project(proc, modules, write_pages(proc, modules))
    site, pages = project["website"]["site-url"], {}
    for name in project["project"]["render"]:
        pages[re.sub(r"^\d+[a-z]?_|\.\w+$", "", name) + ".html"] = name
    for path in paths:
        portable(path, proc / "notebooks" / path.name, site)
    for path in [*proc.glob("*.ipynb"), *proc.glob("*.qmd")]:
        path.write_text(local_links(path.read_text(encoding="utf-8"), site, pages), encoding="utf-8")


# ---- the renderers ----
def render_quarto(
    proc: Path,  # processed pages
    out: Path,  # folder of the site
) -> None:
    "Quarto; its warnings about references, which leave its exit status 0, stop the build."
    done = subprocess.Popen(
        ["quarto", "render", proc, "--no-execute"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
        errors="replace",
    )
    said = []
    for line in done.stdout:
        sys.stdout.write(line)
        said.append(re.sub(r"\x1b\[[0-9;]*m", "", line).strip())
    if done.wait():
        stop(f"quarto render failed with exit status {done.returncode}: see its last lines above")
    if bad := sorted({line for line in said if REFERENCES.search(line)}):
        stop("Quarto warns of references:\n" + "\n".join(bad))
    shutil.rmtree(out, ignore_errors=True)
    shutil.move(proc / "_docs", out)
    shutil.copytree(proc / "notebooks", out / "notebooks", dirs_exist_ok=True)


def renderer() -> str:  # "Quarto" or "pandoc"
    "Which program renders; neither is a mistake that is found before any work."
    if shutil.which("quarto"):
        return "Quarto"
    try:
        import pypandoc

        pypandoc.get_pandoc_path()
    except (ImportError, OSError):
        stop(
            "found neither Quarto nor pandoc: install Quarto (https://quarto.org), or run make install, which brings pandoc (pypandoc_binary)"
        )
    return "pandoc"


def build(
    out: Path,  # folder of the site
) -> None:
    "Process, render, check."
    sys.path.insert(0, str(HERE))
    sys.modules["d2mora"] = package = ModuleType("d2mora")  # nbdev imports our index of names: without torch
    package.__path__ = [str(ROOT / "d2mora")]
    program = renderer()
    import site_check
    import standin

    process(PROC)
    if program == "Quarto":
        render_quarto(PROC, out)
    else:
        standin.render(PROC, out)
    pages = [standin.read_page(path) for path in [*PROC.glob("*.ipynb"), *PROC.glob("*.qmd")]]
    if bad := site_check.faults(out, ROOT / "d2mora", {front["output-file"]: text for front, text in pages}):
        stop("the site is built, but not good:\n" + "\n".join(bad))
    print(f"docs: {len(pages)} pages in {out} by {program}; links, anchors, pictures, formulas and reference are good")


if __name__ == "__main__":
    build(Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "_docs").resolve())
