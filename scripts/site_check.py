"""What must hold of the built site, whichever program built it."""

import re
from pathlib import Path
from urllib.parse import unquote

CODE = re.compile(r"<(script|style|pre|code|math|title)\b([^>]*)>.*?</\1>", re.S)
MARKUP = re.compile(
    r"(?:^|\s)(?::::+|#\| ?\w+|\$\$)|\?@[a-z]+-|\{[#.][\w-]+|\]\([\w./#-]+\)|@(?:fig|eq)-\w|\\(?:frac|sum)\b", re.M
)
LOADED = re.compile(
    r'<(?:img|script|iframe)\b[^>]*\bsrc="((?:https?:)?//[^"]*)|<link\b[^>]*\brel="stylesheet"[^>]*\bhref="((?:https?:)?//[^"]*)'
)


def broken_links(path: Path, text: str, ids: dict) -> list[str]:
    "Links to pages, files or anchors of the site that do not exist; other sites are not visited."
    bad = []
    for target in re.findall(r'\b(?:href|src)="([^"]+)"', text):
        if re.match(r"[a-z][a-z0-9+.-]*:|//", target):
            continue
        file, _, anchor = unquote(target).partition("#")
        there = (path.parent / file.partition("?")[0]).resolve() if file else path
        if not there.exists():
            bad.append(f"{target}: no such file")
        elif anchor and there in ids and anchor not in ids[there]:
            bad.append(f"{target}: no such anchor")
    return sorted({*bad})


def undescribed(text: str) -> list[str]:
    "Pictures without an alt text, except in figures with a caption."
    text = re.sub(r"<figure.*?</figure>", lambda m: "" if "<figcaption" in m[0] else m[0], text, flags=re.S)
    images = re.findall(r"<img\b[^>]*>", text)
    return [f"picture without alt text: {tag[:60]}" for tag in images if not re.search(r'\balt="[^"]{5}', tag)]


def faults(site: Path) -> list[str]:
    "All that is wrong, a line each."
    pages = {path.resolve(): path.read_text(encoding="utf-8") for path in sorted(site.rglob("*.html"))}
    ids = {path: {*re.findall(r'\b(?:id|name)="([^"]+)"', text)} for path, text in pages.items()}
    bad = []
    for path, text in pages.items():
        text = CODE.sub(r"<\1\2>", text)
        seen = re.sub(r"<[^>]*>", "\n", text)
        found = broken_links(path, text, ids) + undescribed(text)
        found += [f"raw markup: {seen[max(0, m.start() - 20) : m.end() + 20]!r}" for m in MARKUP.finditer(seen)]
        found += [f"loaded from elsewhere: {m[1] or m[2]}" for m in LOADED.finditer(text)]
        if (heads := len(re.findall(r"<h1\b", text))) != 1:
            found.append(f"{heads} first-level headings, not one")
        bad += [f"{path.name}: {line}" for line in found]
    return bad
