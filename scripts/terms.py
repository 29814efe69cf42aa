"""The first use of a glossary term in a notebook links to the glossary: say where it does not; --mend puts the links in."""

import re
import sys
from pathlib import Path

import nbformat

NBS = Path(__file__).resolve().parents[1] / "nbs"
# words that mean something else as often; they are linked by hand where the term is meant
EVERYDAY = {"chance", "symbols", "token", "expert"}
MASKED = re.compile(
    r"```.*?```|`[^`]*`|\$\$.*?\$\$|\$[^$\n]*\$|!?\[[^\]]*\]\([^)]*\)|^#.*$|^\|.*$|^:::.*$|<[^>]*>|https?://\S+",
    re.S | re.M,
)


def terms() -> list[str]:
    "The headings of the glossary, longest first."
    text = "\n".join(c.source for c in nbformat.read(NBS / "glossary.ipynb", 4).cells)
    return sorted({*re.findall(r"^## (.+)$", text, re.M)} - EVERYDAY, key=lambda term: (-len(term), term))


def unlinked(cells: list, term: str) -> tuple | None:
    "Cell, start and end of a first use of a term, also in the plural, that does not link to its entry."
    words = re.escape(term).replace(r"\ ", r"[ -]")
    pattern = re.compile(rf"(?<![\w-]){words}(?:e?s)?(?![\w-])", re.I)
    for cell in cells[1:]:  # the first holds title and subtitle, which cannot hold links
        if cell.cell_type != "markdown":
            continue
        link = re.search(rf"\]\(glossary\.ipynb#{term.replace(' ', '-')}\)", cell.source)
        plain = pattern.search(MASKED.sub(lambda m: " " * len(m[0]), cell.source))
        if link and (not plain or link.start() <= plain.end() + len(term)):
            return None
        if plain:
            return cell, *plain.span()
    return None


def check(path: Path, mend: bool = False) -> list[str]:
    "The terms of one notebook that are used before they are linked."
    nb, found = nbformat.read(path, 4), []
    for term in terms():
        if not (place := unlinked(nb.cells, term)):
            continue
        found.append(term)
        cell, start, end = place
        link = f"[{cell.source[start:end]}](glossary.ipynb#{term.replace(' ', '-')})"
        cell.source = cell.source[:start] + link + cell.source[end:]
    if mend and found:
        nbformat.write(nb, path)
    return found


def main():
    "All notebooks but the glossary."
    mend = "--mend" in sys.argv
    lost = {p.stem: found for p in sorted(NBS.glob("*.ipynb")) if p.stem != "glossary" and (found := check(p, mend))}
    for name, found in lost.items():
        print(f"{name}: {'linked' if mend else 'used without a link'}: {', '.join(found)}")
    if lost and not mend:
        raise SystemExit("terms: link them to the glossary, or run scripts/terms.py --mend")


if __name__ == "__main__":
    main()
