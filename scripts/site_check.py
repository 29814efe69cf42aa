"""What must hold of the built site, whichever program built it."""

import ast
import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

from api import exported

FOREIGN = re.compile(r"(?:https?:)?//")
MARKUP = re.compile(
    r"(^|\s)(:::+|#\| ?\w+|\?@[a-z]+-|\$\$)|\{#[\w-]+|\]\([\w./#-]+\)|\{\.[\w-]+\}|@(?:fig|eq|tbl|sec)-\w|\\(?:frac|sum|mathrm|lambda)\b",
    re.M,
)
UNSEEN = {"script", "style", "pre", "code", "math", "annotation", "title", "template"}
BLOCKS = {"p", "div", "section", "li", "td", "th", "tr", "h1", "h2", "h3", "h4", "figcaption", "blockquote"}


class Page(HTMLParser):
    "Collects the anchors of a page, what it points to and loads, its pictures, and its text outside code."

    def __init__(self, text):
        super().__init__()
        self.ids, self.targets, self.loaded, self.no_alt, self.text, self.inside, self.heads, self.math, self.figure = (
            set(),
            [],
            [],
            [],
            [],
            [],
            0,
            0,
            [],
        )
        self.feed(text)
        self.settle()

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.ids |= {attrs[k] for k in ("id", "name") if attrs.get(k)}
        if tag == "a" and attrs.get("href"):
            self.targets.append(attrs["href"])
        if attrs.get("src"):
            self.loaded.append(attrs["src"])
        if tag == "link" and attrs.get("rel", "") not in ("canonical", "next", "prev"):
            self.loaded.append(attrs.get("href") or "")
        if tag == "img" and len((attrs.get("alt") or "").strip()) < 5:
            self.figure.append((attrs.get("src") or "")[:60])
        if tag == "figcaption":
            self.figure.clear()  # what it says describes the picture
        if tag in ("figure", "p", "h2"):
            self.settle()
        self.heads, self.math = self.heads + (tag == "h1"), self.math + (tag == "math")
        if tag in UNSEEN:
            self.inside.append(tag)
        if tag in BLOCKS:
            self.text.append("\n")

    def settle(self):
        "Pictures without a text of their own, and with no caption behind them."
        self.no_alt += self.figure
        self.figure = []

    def handle_endtag(self, tag):
        if tag in ("figure", "main"):
            self.settle()
        if tag in self.inside:
            del self.inside[len(self.inside) - 1 - self.inside[::-1].index(tag) :]

    def handle_data(self, data):
        if not self.inside:
            self.text.append(data)


def read_site(
    site: Path,  # folder of the site
) -> dict:  # path -> Page
    "Every page, parsed."
    return {path.resolve(): Page(path.read_text(encoding="utf-8")) for path in sorted(site.rglob("*.html"))}


def broken_links(
    pages: dict,  # of `read_site`
) -> list:  # one line for each
    "Links to pages, files or anchors of the site that do not exist; other sites are not visited."
    bad = []
    for path, page in pages.items():
        for target in page.targets + page.loaded:
            if re.match(r"[a-z][a-z0-9+.-]*:|//|$", target):
                continue
            file, _, anchor = unquote(target).partition("#")
            there = (path.parent / file.partition("?")[0]).resolve() if file else path
            if not there.exists():
                bad.append(f"{path.name}: {target}: no such file")
            elif anchor and there in pages and anchor not in pages[there].ids:
                bad.append(f"{path.name}: {target}: no such anchor")
    return sorted({*bad})


def page_faults(
    path: Path,  # of a page
    page: Page,  # the same, parsed
) -> list:  # one line for each
    "Pictures without a description, raw markup, and what is loaded from elsewhere."
    seen = "".join(page.text)
    bad = [f"{path.name}: picture without alt text: {src}" for src in page.no_alt]
    bad += [f"{path.name}: raw markup: {seen[max(0, m.start() - 20) : m.end() + 20]!r}" for m in MARKUP.finditer(seen)]
    bad += [f"{path.name}: loaded from elsewhere: {src[:80]}" for src in page.loaded if FOREIGN.match(src)]
    return bad + ([] if page.heads == 1 else [f"{path.name}: {page.heads} first-level headings, not one"])


def foreign_styles(
    site: Path,  # folder of the site
) -> list:  # one line for each
    "Style sheets that fetch something from elsewhere."
    found = [
        (path, m[0])
        for path in sorted(site.rglob("*.css"))
        for m in re.finditer(
            r"(?:@import|url\()[\s\"'(]*(?:url\([\"']?)?(?:https?:)?//[^)\"';]+", path.read_text(encoding="utf-8")
        )
    ]
    return [f"{path.name}: loads from elsewhere: {what[:80]}" for path, what in found]


def lost_mathematics(
    pages: dict,  # of `read_site`
    sources: dict,  # page's file name -> its markdown
) -> list:  # one line for each
    "Pages whose source has formulas must show as many or more."
    bad = []
    for path, page in pages.items():
        text = re.sub(r"^(```+).*?^\1|`[^`\n]*`", "", sources.get(path.name, ""), flags=re.S | re.M)
        wanted = len(re.findall(r"\$\$.+?\$\$", text, re.S))
        if page.math < wanted:
            bad.append(f"{path.name}: {page.math} formulas shown, {wanted} displayed ones written")
    return bad


def undocumented(
    pages: dict,  # of `read_site`
    package: Path,  # folder of the exported modules
) -> list:  # one line for each
    "Exported names without an entry in the reference."
    ids, bad = {path.name: page.ids for path, page in pages.items()}, []
    for module in sorted(package.glob("[!_]*.py")):
        known = ids.get(f"api_{module.stem}.html", set())
        bad += [
            f"d2mora.{module.stem}.{name} is not in the reference"
            for name in exported(ast.parse(module.read_text(encoding="utf-8")))
            if name.lower() not in known
        ]
    return bad


def faults(
    site: Path,  # folder of the site
    package: Path,  # folder of the exported modules
    sources: dict,  # page's file name -> its markdown
) -> list:  # one line for each
    "All that is wrong."
    pages = read_site(site)
    bad = broken_links(pages) + foreign_styles(site) + lost_mathematics(pages, sources) + undocumented(pages, package)
    return bad + [line for path, page in pages.items() for line in page_faults(path, page)]
