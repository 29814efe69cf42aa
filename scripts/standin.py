"""The stand-in for Quarto: the same processed pages rendered by pandoc, which Quarto itself is built on. Small on purpose."""

import html
import json
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat
import yaml

HERE = Path(__file__).parent
DIRECTIVE = re.compile(r"^#\|\s*([\w-]+):?\s*(.*)\n?", re.M)
READER = "markdown-implicit_figures+lists_without_preceding_blankline+emoji-smart"


# ---- a processed page as pandoc's markdown ----
def fence(
    code: str,  # any text
    classes: str,  # such as ".python"
) -> str:  # a fenced block longer than any fence in it
    "A code block."
    ticks = max([3, *(len(m) + 1 for m in re.findall(r"^`{3,}", code, re.M))])
    return f"{'`' * ticks} {{{classes}}}\n{code.rstrip()}\n{'`' * ticks}"


def output_markdown(
    out: dict,  # one output of a cell
    alt: str,  # what a picture shows
) -> str:  # markdown
    "A stored output: markdown and pictures as they are, HTML tables raw, the rest as text."
    if out.output_type == "stream":
        return f"::: {{.output .{out.name}}}\n{fence(out.text, '.text')}\n:::"
    if out.output_type == "error":
        return f"::: {{.output .error}}\n{fence(f'{out.ename}: {out.evalue}', '.text')}\n:::"
    data = out.data
    if "text/markdown" in data:
        return data["text/markdown"]
    if "image/png" in data:
        return f"![{alt}](data:image/png;base64,{data['image/png'].strip()})"
    if "image/svg+xml" in data:
        return fence(data["image/svg+xml"], "=html")
    if "text/html" in data:
        return fence(data["text/html"], "=html")
    return f"::: {{.output}}\n{fence(data.get('text/plain', ''), '.text')}\n:::"


def code_markdown(
    cell: dict,  # a code cell
) -> str:  # markdown of its source and outputs
    "Source (shown, folded or hidden, as its directives say), then outputs."
    options = {k: v.strip().strip('"') for k, v in DIRECTIVE.findall(cell.source)}
    source, parts = DIRECTIVE.sub("", cell.source).strip("\n"), []
    if source and options.get("echo") != "false":
        parts.append(fence(source, ".python"))
        if options.get("code-fold") in ("true", "show"):
            parts[0] = (
                f'::: {{.fold summary="{options.get("code-summary", "Code")}" open={str(options["code-fold"] == "show").lower()}}}\n{parts[0]}\n:::'
            )
    alt = re.sub(r"([][])", r"\\\1", options.get("fig-alt", ""))
    shown = [] if options.get("output") == "false" else cell.outputs
    body = "\n\n".join([*parts, *(output_markdown(o, alt) for o in shown)])
    if caption := options.get("fig-cap") or options.get("tbl-cap"):
        body += f"\n\n::: {{.figcaption}}\n{caption}\n:::"
    return f":::: {{#{options['label']}}}\n{body}\n::::" if "label" in options else body


def notebook_page(
    nb: dict,  # a processed notebook
) -> tuple:  # (front matter, markdown)
    "The whole notebook as one markdown text."
    front, parts = {}, []
    for cell in nb.cells:
        if cell.cell_type == "raw" and cell.source.strip().startswith("---"):
            front.update(yaml.safe_load(cell.source.strip().strip("-")) or {})
        elif cell.cell_type == "markdown":
            parts.append(cell.source)
        elif cell.cell_type == "code":
            parts.append(code_markdown(cell))
    return front, "\n\n".join(parts)


def read_page(
    path: Path,  # .ipynb or .qmd
) -> tuple:  # (front matter, markdown); the front matter names the output file
    "A processed page."
    if path.suffix == ".ipynb":
        return notebook_page(nbformat.read(path, 4))
    _, front, text = path.read_text(encoding="utf-8").split("---\n", 2)
    return {"output-file": f"{path.stem}.html", **yaml.safe_load(front)}, text


# ---- pages ----
def names_in(
    contents: list,  # of a sidebar
) -> list:  # the pages' file names
    "The sidebar, flat."
    return [n for e in contents for n in (names_in(e["contents"]) if isinstance(e, dict) else [e])]


def sidebar(
    contents: list,  # of _quarto.yml
    pages: dict,  # file name -> (front matter, markdown)
    here: str,  # the page's file name
) -> str:  # HTML list
    "The list of pages in reading order."
    items = []
    for entry in contents:
        if isinstance(entry, dict):
            items.append(
                f'<li><span class="section">{html.escape(entry["section"])}</span>{sidebar(entry["contents"], pages, here)}</li>'
            )
        else:
            items.append(
                f'<li><a href="{entry}"{" aria-current=page" if entry == here else ""}>{html.escape(pages[entry][0]["title"])}</a></li>'
            )
    return f"<ul>{''.join(items)}</ul>"


def turn(
    order: list,  # file names in reading order
    pages: dict,  # file name -> (front matter, markdown)
    name: str,  # this page's
) -> str:  # HTML
    "Links to the page before and the page after."
    at, links = order.index(name) if name in order else None, []
    for step, word in ((-1, "← {}"), (1, "{} →")):
        to = None if at is None else at + step
        links.append(
            f'<a href="{order[to]}">{word.format(html.escape(pages[order[to]][0]["title"]))}</a>'
            if to is not None and 0 <= to < len(order)
            else "<span></span>"
        )
    return "".join(links)


def render_page(
    name: str,  # file name of a page
    pages: dict,  # file name -> (front matter, markdown)
    project: dict,  # the project file
    out: Path,  # folder of the site
) -> None:
    "Write one page with pandoc."
    import pypandoc

    (front, text), site = pages[name], project["website"]
    bar = next((b for b in site["sidebar"] if name in names_in(b["contents"])), site["sidebar"][0])
    top = "".join(
        f'<a href="{item["href"]}">{html.escape(item["text"])}</a>'
        for item in site["navbar"]["left"] + [i for i in site["navbar"]["right"] if "text" in i]
    )
    variables = {
        "sidebar": sidebar(bar["contents"], pages, name),
        "part": bar["title"],
        "turn": turn(names_in(bar["contents"]), pages, name),
        "top": top,
        "site": site["title"],
        "card": f"{site['site-url']}/{site['image']}",
        "url": f"{site['site-url']}/{front['output-file']}",
        "favicon": site["favicon"],
        "twin": f"{Path(front['output-file']).stem}.llms.md",
    }
    command = [
        pypandoc.get_pandoc_path(),
        "-f",
        READER,
        "-t",
        "html5",
        "--mathml",
        "--standalone",
        "--toc",
        "--toc-depth=3",
        "--template",
        HERE / "standin.html",
        "--lua-filter",
        HERE / "standin.lua",
        "-M",
        f"title={front['title']}",
        "-M",
        f"description={front.get('description') or ''}",
    ]
    for key, value in variables.items():
        command += ["-V", f"{key}={value}"]
    page = subprocess.run(command, input=text, capture_output=True, text=True, timeout=120, check=True).stdout
    (out / front["output-file"]).write_text(relink(page, pages), encoding="utf-8")


def relink(
    page: str,  # HTML, or Markdown with `before` set to `](`
    pages: dict,  # file name -> (front matter, markdown)
    before: str = 'href="',  # what stands before a target
    ending: str = ".html",  # of the files to link to
) -> str:  # the same with other targets
    "Links to sources of pages become links to the pages."
    files = {name: Path(front["output-file"]).stem + ending for name, (front, _) in pages.items()}
    return re.sub(re.escape(before) + r"([\w.-]+\.(?:ipynb|qmd))", lambda m: before + files.get(m[1], m[1]), page)


def write_twin(
    name: str,  # file name of a page
    pages: dict,  # file name -> (front matter, markdown)
    out: Path,  # folder of the site
) -> None:
    "The page as plain Markdown, PAGE.llms.md, as Quarto's `llms-txt` makes it; a plot is its description."
    import pypandoc

    front, text = pages[name]
    text = re.sub(
        r"!\[([^\n]*)\]\(data:[^)]*\)", r"[Picture: \1]", re.sub(r"`{3,} \{=html\}\n.*?\n`{3,}", "", text, flags=re.S)
    )
    command = [pypandoc.get_pandoc_path(), "-f", READER, "-t", "gfm-raw_html", "--wrap=none"]
    body = subprocess.run(command, input=text, capture_output=True, text=True, timeout=120, check=True).stdout
    page = f"# {front['title']}\n\n> {front.get('description') or front['title']}\n\n{relink(body, pages, '](', '.llms.md')}"
    (out / f"{Path(front['output-file']).stem}.llms.md").write_text(page, encoding="utf-8")


def write_indices(
    pages: dict,  # file name -> (front matter, markdown)
    project: dict,  # the project file
    out: Path,  # folder of the site, its pages written
) -> None:
    "llms.txt, the list of the Markdown pages; and search.js, what the search field looks through: the sections of all pages."
    site, lines, found = project["website"], [], []
    for name, (front, _) in pages.items():
        file, title = front["output-file"], front["title"]
        lines.append(f"- [{title}]({site['site-url']}/{Path(file).stem}.llms.md)")
        page = (out / file).read_text(encoding="utf-8").partition("<header>")[2].partition('<nav class="turn"')[0]
        first, *rest = re.split(r'<h[23][^>]* id="([^"]+)"[^>]*>(.*?)</h[23]>', page, flags=re.S)
        for anchor, heading, text in [("", "", first), *zip(rest[::3], rest[1::3], rest[2::3])]:
            plain = [
                " ".join(html.unescape(re.sub(r"<script.*?</script>|<[^>]+>", " ", t, flags=re.S)).split())
                for t in (heading, text)
            ]
            found.append([file + ("#" + anchor if anchor else ""), title, *plain])
    text = f"# {site['title']}\n\n> {site['description']}\n\n## Pages\n\n" + "\n".join(lines) + "\n"
    (out / "llms.txt").write_text(text, encoding="utf-8")
    (out / "search.js").write_text(f"window.SECTIONS = {json.dumps(found, ensure_ascii=False)}\n", encoding="utf-8")


def render(
    proc: Path,  # processed pages and the project file
    out: Path,  # folder of the site
) -> None:
    "The whole site by pandoc."
    project = yaml.safe_load((proc / "_quarto.yml").read_text(encoding="utf-8"))
    pages = {name: read_page(proc / name) for name in project["project"]["render"]}
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    for folder in ("images", "notebooks"):
        shutil.copytree(proc / folder, out / folder)
    for file in ("standin.css", "standin.js"):
        shutil.copy(HERE / file, out / file)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda name: render_page(name, pages, project, out), pages))
        list(pool.map(lambda name: write_twin(name, pages, out), pages))
    write_indices(pages, project, out)
