"""The stand-in for Quarto: the same processed pages rendered by pandoc, on which Quarto itself is built."""

import html
import json
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat
import pypandoc
import yaml

HERE = Path(__file__).parent
DIRECTIVE = re.compile(r"^#\|\s*([\w-]+):?\s*(.*)\n?", re.M)
READER = "markdown-implicit_figures+lists_without_preceding_blankline-smart"
WORDS = {"fig": "Figure", "eq": "Equation"}


def fence(code: str, classes: str) -> str:
    "A code block whose fence is longer than any fence in it."
    ticks = "`" * max([3, *(len(m) + 1 for m in re.findall(r"^`{3,}", code, re.M))])
    return f"{ticks} {{{classes}}}\n{code.rstrip()}\n{ticks}"


def output_markdown(out, alt: str) -> str:
    "A stored output: Markdown and pictures as they are, HTML raw, the rest as text."
    data = out.get("data", {})
    if "text/markdown" in data:
        return data["text/markdown"]
    if "image/png" in data:
        return f"![{alt}](data:image/png;base64,{data['image/png'].strip()})"
    if raw := data.get("image/svg+xml") or data.get("text/html"):
        return fence(raw, "=html")
    return f"::: {{.output}}\n{fence(out.get('text') or data.get('text/plain', ''), '.default')}\n:::"


def code_markdown(cell) -> str:
    "The source (shown, folded or hidden, as its directives say), then the outputs."
    options = {k: v.strip().strip('"') for k, v in DIRECTIVE.findall(cell.source)}
    source, parts = DIRECTIVE.sub("", cell.source).strip("\n"), []
    if source and options.get("echo") != "false":
        parts.append(fence(source, ".python"))
        if fold := options.get("code-fold"):
            opened = " open" if fold == "show" else ""
            head = f"<details{opened}><summary>{options.get('code-summary', 'Code')}</summary>"
            parts = [fence(head, "=html"), *parts, fence("</details>", "=html")]
    alt = re.sub(r"([][])", r"\\\1", options.get("fig-alt") or options.get("fig-cap", ""))
    parts += [output_markdown(out, alt) for out in ([] if options.get("output") == "false" else cell.outputs)]
    if "label" in options:
        parts += [f"::: {{.figcaption}}\n@@{options['label']}. {options['fig-cap']}\n:::"]
        parts = [f":::: {{#{options['label']}}}", *parts, "::::"]
    return "\n\n".join(parts)


def numbered(text: str) -> str:
    "Number the figures and equations, and the references to them."
    labels = re.findall(r"\{#((?:fig|eq)-[\w-]+)\}", text)
    names = {x: f"{WORDS[x.split('-')[0]]} {[y for y in labels if y[:2] == x[:2]].index(x) + 1}" for x in labels}
    equation = r"(\$\$[^$]+\$\$) *\{#(eq-[\w-]+)\}"
    text = re.sub(equation, lambda m: f"::: {{#{m[2]} .equation}}\n\n{m[1]} ({names[m[2]].split()[1]})\n\n:::", text)
    text = re.sub(r"@@((?:fig|eq)-[\w-]+)", lambda m: names[m[1]], text)
    return re.sub(r"(?<!\w)@((?:fig|eq)-[\w-]+)", lambda m: f"[{names.get(m[1], '?@' + m[1])}](#{m[1]})", text)


def read_page(path: Path) -> tuple[dict, str]:
    "Front matter and Markdown of a processed page."
    if path.suffix == ".qmd":
        _, front, text = path.read_text(encoding="utf-8").split("---\n", 2)
        return {"output-file": f"{path.stem}.html"} | yaml.safe_load(front), text
    front, parts = {}, []
    for cell in nbformat.read(path, 4).cells:
        if cell.cell_type == "raw":
            front.update(yaml.safe_load(cell.source.strip().strip("-")) or {})
        else:
            parts.append(cell.source if cell.cell_type == "markdown" else code_markdown(cell))
    return front, numbered("\n\n".join(parts))


def names_in(contents: list) -> list[str]:
    "The pages of a sidebar, flat."
    return [n for e in contents for n in (names_in(e["contents"]) if isinstance(e, dict) else [e])]


def sidebar(contents: list, pages: dict, here: str) -> str:
    "The list of pages in reading order, as HTML."
    items = []
    for entry in contents:
        if isinstance(entry, dict):
            inner = f'<span class="section">{entry["section"]}</span>{sidebar(entry["contents"], pages, here)}'
        else:
            current = " aria-current=page" if entry == here else ""
            inner = f'<a href="{entry}"{current}>{html.escape(pages[entry][0]["title"])}</a>'
        items.append(f"<li>{inner}</li>")
    return f"<ul>{''.join(items)}</ul>"


def turn(order: list, pages: dict, name: str) -> str:
    "Links to the page before and the page after, as HTML."
    at = order.index(name) if name in order else len(order)
    before, after = order[max(at - 1, 0) : at], order[at + 1 : at + 2]
    link = lambda names, form: "".join(f'<a href="{n}">{form.format(pages[n][0]["title"])}</a>' for n in names)
    return link(before, "← {}") + "<span></span>" + link(after, "{} →")


def pandoc(text: str, *options) -> str:
    "Pandoc's answer to Markdown."
    command = [pypandoc.get_pandoc_path(), "-f", READER, *options]
    return subprocess.run(command, input=text, capture_output=True, text=True, timeout=120, check=True).stdout


def stem(front: dict) -> str:
    "A page's name without its ending."
    return Path(front["output-file"]).stem


def relink(text: str, pages: dict, before: str, ending: str) -> str:
    "Links to sources of pages, which stand after `before`, become links to pages with this ending."
    files = {source: stem(front) + ending for source, (front, _) in pages.items()}
    return re.sub(re.escape(before) + r"([\w.-]+\.(?:ipynb|qmd))", lambda m: before + files.get(m[1], m[1]), text)


def render_page(name: str, pages: dict, website: dict, out: Path):
    "Write one page with pandoc; links to sources become links to pages."
    (front, text), contents = pages[name], website["sidebar"]["contents"]
    variables = {
        "sidebar": sidebar(contents, pages, name),
        "turn": turn(names_in(contents), pages, name),
        "top": "".join(f'<a href="{item["href"]}">{item["text"]}</a>' for item in website["navbar"]["left"]),
        "site": website["title"],
        "favicon": website["favicon"],
        "title": front["title"],
        "description": front.get("description") or "",
        "twin": f"{stem(front)}.llms.md",
    }
    options = ["-t", "html5", "--mathml", "--standalone", "--toc", "--toc-depth=3", "-M", f"title={front['title']}"]
    options += [word for key, value in variables.items() for word in ("-V", f"{key}={value}")]
    text = re.sub(r"^(`{3,}) ?sh$", r"\1bash", text, flags=re.M)
    page = pandoc(text, "--template", HERE / "standin.html", *options)
    (out / front["output-file"]).write_text(relink(page, pages, 'href="', ".html"), encoding="utf-8")


def write_twin(name: str, pages: dict, out: Path):
    "The page as plain Markdown, PAGE.llms.md, as Quarto's `llms-txt` makes it; a plot is its description."
    front, text = pages[name]
    text = re.sub(r"`{3,} \{=html\}\n.*?\n`{3,}", "", text, flags=re.S)
    text = pandoc(re.sub(r"!\[([^\n]*)\]\(data:[^)]*\)", r"[Picture: \1]", text), "-t", "gfm-raw_html", "--wrap=none")
    head = f"# {front['title']}\n\n> {front.get('description') or front['title']}\n\n"
    (out / f"{stem(front)}.llms.md").write_text(head + relink(text, pages, "](", ".llms.md"), encoding="utf-8")


def sections(file: str, title: str, page: str) -> list[list[str]]:
    "Address, title, heading and text of each section of a page, for the search."
    text = page.partition("<header>")[2].partition('<nav class="turn"')[0]
    first, *rest = re.split(r'<h[23][^>]* id="([^"]+)"[^>]*>(.*?)</h[23]>', text, flags=re.S)
    found = []
    for anchor, *parts in [("", "", first), *zip(rest[::3], rest[1::3], rest[2::3])]:
        plain = [re.sub(r"<script.*?</script>|<[^>]+>", " ", part, flags=re.S) for part in parts]
        found.append([f"{file}#{anchor}".rstrip("#"), title, *(" ".join(html.unescape(p).split()) for p in plain)])
    return found


def write_lists(pages: dict, website: dict, out: Path):
    "llms.txt, which lists the Markdown pages; and search.js, the sections of all pages."
    fronts, found = [front for front, _ in pages.values()], []
    lines = [f"# {website['title']}", f"> {website['description']}", "## Pages"]
    links = [f"- [{front['title']}]({website['site-url']}/{stem(front)}.llms.md)" for front in fronts]
    (out / "llms.txt").write_text("\n\n".join([*lines, "\n".join(links)]) + "\n", encoding="utf-8")
    for front in fronts:
        page = (out / front["output-file"]).read_text(encoding="utf-8")
        found += sections(front["output-file"], front["title"], page)
    (out / "search.js").write_text(f"window.SECTIONS = {json.dumps(found, ensure_ascii=False)}\n", encoding="utf-8")


def render(proc: Path, out: Path):
    "The whole site."
    project = yaml.safe_load((proc / "_quarto.yml").read_text(encoding="utf-8"))
    pages = {name: read_page(proc / name) for name in project["project"]["render"]}
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(proc / "images", out / "images")
    for file in ("standin.css", "standin.js"):
        shutil.copy(HERE / file, out)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda name: render_page(name, pages, project["website"], out), pages))
        list(pool.map(lambda name: write_twin(name, pages, out), pages))
    write_lists(pages, project["website"], out)
