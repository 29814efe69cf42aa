"""The book as a site: nbdev processes the notebooks, Quarto renders them where it is installed, else pandoc does; then every link is checked.

usage: python scripts/docs.py [FOLDER]     (default _docs)
"""
import html, os, re, shutil, subprocess, sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import nbformat, pypandoc, yaml

ROOT = Path(__file__).resolve().parents[1]
NBS, PROC, HERE = ROOT / "nbs", ROOT / "_proc", Path(__file__).parent
DIRECTIVE = re.compile(r"^#\|\s*([\w-]+):?\s*(.*)\n?", re.M)


# ---- nbdev's processing: titles, hidden cells, links to names; outputs stay the stored ones and nothing is run ----
def show_exports(nb: dict  # a notebook
                 ) -> None:
    "Keep exported functions, each under a heading with its name, instead of nbdev's cards: here the code is the text."
    from execnb.nbio import NbCell, dict2nb, mk_cell
    cells = []
    for cell in nb.cells:
        names = re.findall(r"^(?:def|class) (\w+)", cell.source, re.M) if cell.cell_type == "code" and re.match(r"#\|\s*export", cell.source) else []
        public = [n for n in names if not n.startswith("_")]
        if public: cells.append(mk_cell("### " + ", ".join(public) + f" {{#{public[0].lower()} .export}}\n\n" + "".join(f"[]{{#{n.lower()}}}" for n in public[1:]), "markdown"))
        if names: cell.source = re.sub(r"^#\|\s*export\s*$", "#| exports", cell.source, flags=re.M)
        cells.append(cell)
    nb.cells = dict2nb(cells=cells).cells


def process_notebook(path: Path,  # a notebook of nbs/
                     proc: Path   # folder of processed notebooks
                     ) -> None:
    "One notebook through nbdev's own steps, without those that run code."
    from execnb.nbio import read_nb, write_nb
    from nbdev.process import NBProcessor
    from nbdev.processors import FilterDefaults
    nb = read_nb(path)
    show_exports(nb)
    steps = [p for p in FilterDefaults().base_procs() if p.__name__ not in ("add_show_docs", "exec_show_docs", "mv_exports")]
    NBProcessor(nb=nb, procs=steps).process()
    write_nb(nb, proc / path.name)


def process(paths: list,  # notebooks
            proc: Path    # folder to fill
            ) -> None:
    "Process the notebooks, and put beside them what they show."
    import nbdev.doclinks, nbdev.quarto
    os.chdir(ROOT)  # where nbdev finds settings.ini
    shutil.rmtree(proc, ignore_errors=True)
    proc.mkdir(parents=True)
    nbdev.quarto.refresh_quarto_yml()
    nbdev.doclinks._build_modidx()
    for name in ("_quarto.yml", "nbdev.yml"): shutil.copy(NBS / name, proc / name)
    shutil.copytree(NBS / "images", proc / "images")
    for path in paths: process_notebook(path, proc)


# ---- a processed notebook as pandoc's markdown ----
def fence(code: str,    # any text
          classes: str  # such as ".python"
          ) -> str:     # a fenced block longer than any fence in it
    "A code block."
    ticks = max([3, *(len(m) + 1 for m in re.findall(r"^`{3,}", code, re.M))])
    return f"{'`' * ticks} {{{classes}}}\n{code.rstrip()}\n{'`' * ticks}"


def output_markdown(out: dict,  # one output of a cell
                    alt: str    # what a picture shows
                    ) -> str:   # markdown
    "A stored output: markdown and pictures as they are, HTML tables raw, the rest as text."
    if out.output_type == "stream": return f"::: {{.output .{out.name}}}\n{fence(out.text, '.text')}\n:::"
    if out.output_type == "error": return f"::: {{.output .error}}\n{fence(f'{out.ename}: {out.evalue}', '.text')}\n:::"
    data = out.data
    if "text/markdown" in data: return data["text/markdown"]
    if "image/png" in data: return f"![{alt}](data:image/png;base64,{data['image/png'].strip()})"
    if "image/svg+xml" in data: return fence(data["image/svg+xml"], "=html")
    if "text/html" in data: return fence(data["text/html"], "=html")
    return f"::: {{.output}}\n{fence(data.get('text/plain', ''), '.text')}\n:::"


def code_markdown(cell: dict   # a code cell
                  ) -> str:    # markdown of its source and outputs
    "Source (shown, folded or hidden, as its directives say), then outputs."
    options = {k: v.strip().strip('"') for k, v in DIRECTIVE.findall(cell.source)}
    source, parts = DIRECTIVE.sub("", cell.source).strip("\n"), []
    if source and options.get("echo") != "false":
        parts.append(fence(source, ".python"))
        if options.get("code-fold") in ("true", "show"):
            parts[0] = f"::: {{.fold summary=\"{options.get('code-summary', 'Code')}\" open={str(options['code-fold'] == 'show').lower()}}}\n{parts[0]}\n:::"
    alt = options.get("fig-alt") or options.get("fig-cap") or "Plot made by the cell above"
    alt = re.sub(r"([][])", r"\\\1", alt)
    shown = [] if options.get("output") == "false" else cell.outputs
    body = "\n\n".join([*parts, *(output_markdown(o, alt) for o in shown)])
    if caption := options.get("fig-cap") or options.get("tbl-cap"): body += f"\n\n::: {{.figcaption}}\n{caption}\n:::"
    return f":::: {{#{options['label']}}}\n{body}\n::::" if "label" in options else body


def page_markdown(nb: dict    # a processed notebook
                  ) -> tuple:  # (front matter, markdown)
    "The whole notebook as one markdown text."
    front, parts = {}, []
    for cell in nb.cells:
        if cell.cell_type == "raw" and cell.source.strip().startswith("---"): front.update(yaml.safe_load(cell.source.strip().strip("-")) or {})
        elif cell.cell_type == "markdown": parts.append(cell.source)
        elif cell.cell_type == "code": parts.append(code_markdown(cell))
    return front, "\n\n".join(parts)


# ---- pages ----
def sidebar(contents: list,  # of _quarto.yml
            pages: dict,     # notebook -> (front matter, markdown)
            here: str        # the page's notebook
            ) -> str:        # HTML list
    "The list of pages in reading order."
    items = []
    for entry in contents:
        if isinstance(entry, dict): items.append(f'<li><span class="section">{html.escape(entry["section"])}</span>{sidebar(entry["contents"], pages, here)}</li>')
        else: items.append(f'<li><a href="{entry}"{" aria-current=page" if entry == here else ""}>{html.escape(pages[entry][0]["title"])}</a></li>')
    return f"<ul>{''.join(items)}</ul>"


def reading_order(contents: list  # of _quarto.yml
                  ) -> list:      # notebooks' names
    "The sidebar, flat."
    return [n for e in contents for n in (reading_order(e["contents"]) if isinstance(e, dict) else [e])]


def render_page(name: str,       # notebook
                pages: dict,     # notebook -> (front matter, markdown)
                contents: list,  # of _quarto.yml
                out: Path        # folder of the site
                ) -> None:
    "Write one page with pandoc; links to notebooks and to the hosted site become links between pages."
    front, text = pages[name]
    order, turn = reading_order(contents), []
    for step, word in ((-1, "← {}"), (1, "{} →")):
        at = order.index(name) + step
        turn.append(f'<a href="{order[at]}">{word.format(html.escape(pages[order[at]][0]["title"]))}</a>' if 0 <= at < len(order) else "<span></span>")
    command = [pypandoc.get_pandoc_path(), "-f", "markdown-implicit_figures+lists_without_preceding_blankline+emoji-smart", "-t", "html5", "--mathml", "--standalone",
               "--toc", "--toc-depth=3", "--template", HERE / "docs.html", "--lua-filter", HERE / "docs.lua", "-M", f"title={front['title']}",
               "-M", f"description={front.get('description') or ''}", "-V", f"sidebar={sidebar(contents, pages, name)}", "-V", f"turn={''.join(turn)}"]
    page = subprocess.run(command, input=text, capture_output=True, text=True, timeout=120, check=True).stdout
    (out / front["output-file"]).write_text(relink(page, pages), encoding="utf-8")


def relink(page: str,   # HTML
           pages: dict  # notebook -> (front matter, markdown)
           ) -> str:    # HTML
    "Links to NAME.ipynb and to the hosted site's pages become links to the pages beside."
    files = {name: front["output-file"] for name, (front, _) in pages.items()}
    config = yaml.safe_load((NBS / "nbdev.yml").read_text())
    page = re.sub(r'href="([\w.-]+\.ipynb)', lambda m: f'href="{files.get(m[1], m[1])}', page)
    return page.replace(f'href="{config["website"]["site-url"]}/', 'href="')


def render(proc: Path,  # processed notebooks
           out: Path    # folder of the site
           ) -> None:
    "The whole site by pandoc."
    contents = yaml.safe_load((ROOT / "_quarto.yml").read_text())["website"]["sidebar"]["contents"]
    pages = {p.name: page_markdown(nbformat.read(p, 4)) for p in sorted(proc.glob("*.ipynb"))}
    if lost := {*pages} ^ {*reading_order(contents)}: raise SystemExit(f"docs: sidebar of _quarto.yml and notebooks of nbs/ differ: {', '.join(sorted(lost))}")
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(proc / "images", out / "images")
    shutil.copy(HERE / "docs.css", out / "docs.css")
    for name in pages: render_page(name, pages, contents, out)


# ---- links ----
class Links(HTMLParser):
    "Collects the anchors of a page and what it points to."
    def __init__(self): super().__init__(); self.ids, self.targets = set(), []

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.ids |= {attrs[k] for k in ("id", "name") if attrs.get(k)}
        self.targets += [attrs[k] for k in ("href", "src") if attrs.get(k)]


def broken_links(site: Path  # folder of the site
                 ) -> list:  # one line for each broken link
    "Links to pages, files or anchors of the site that do not exist; other sites are not visited."
    pages = {}
    for path in site.rglob("*.html"):
        pages[path.resolve()] = Links()
        pages[path.resolve()].feed(path.read_text(encoding="utf-8"))
    bad = []
    for path, links in pages.items():
        for target in links.targets:
            if re.match(r"[a-z][a-z0-9+.-]*:|//", target): continue
            file, _, anchor = unquote(target).partition("#")
            there = (path.parent / file).resolve() if file else path
            if not there.exists(): bad.append(f"{path.name}: {target}: no such file")
            elif anchor and there in pages and anchor not in pages[there].ids: bad.append(f"{path.name}: {target}: no such anchor")
    return sorted(set(bad))


def build(out: Path  # folder of the site
          ) -> None:
    "Process, render, check."
    process(sorted(NBS.glob("*.ipynb")), PROC)
    if shutil.which("quarto"):
        subprocess.run(["quarto", "render", PROC, "--no-execute"], check=True)
        shutil.rmtree(out, ignore_errors=True)
        shutil.move(PROC / "_docs", out)
    else: render(PROC, out)
    if bad := broken_links(out): raise SystemExit("docs: broken links\n" + "\n".join(bad))
    print(f"docs: {len(list(out.glob('*.html')))} pages in {out}, all links good")


if __name__ == "__main__": build(Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "_docs").resolve())
