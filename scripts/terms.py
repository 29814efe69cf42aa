"""The first use of a glossary term in a notebook links to the glossary: say where it does not; --mend puts the links in."""

import re
import sys
from pathlib import Path

import nbformat

NBS = Path(__file__).resolve().parents[1] / "nbs"
OUTSIDE = ("glossary",)  # notebooks that are not checked
# words that mean something else as often; they are linked by hand where the term is meant
EVERYDAY = {"chance", "merge", "symbols", "token", "expert"}
MASKED = re.compile(
    r"```.*?```|`[^`]*`|\$\$.*?\$\$|\$[^$\n]*\$|!\[[^\]]*\]\([^)]*\)|\[[^\]]*\]\([^)]*\)|^#.*$|^\|.*$|^:::.*$|<[^>]*>|https?://\S+",
    re.S | re.M,
)


def terms() -> dict[str, str]:  # anchor by term
    "The headings of the glossary."
    text = "\n".join(c.source for c in nbformat.read(NBS / "glossary.ipynb", 4).cells)
    return {term: term.replace(" ", "-") for term in re.findall(r"^## (.+)$", text, re.M) if term not in EVERYDAY}


def pattern(term: str) -> re.Pattern:
    "The term in a sentence, also in the plural."
    words = re.escape(term).replace(r"\ ", r"[ -]")
    return re.compile(rf"(?<![\w-]){words}(?:e?s)?(?![\w-])", re.I)


def unlinked(
    cells: list,  # of a notebook
    term: str,  # of the glossary
    anchor: str,  # its heading
) -> tuple | None:  # (cell, start, end) of a first use without a link
    "Where a term is used for the first time and does not link to its entry."
    for cell in cells[1:]:  # the first holds title and subtitle, which cannot hold links
        if cell.cell_type != "markdown":
            continue
        link = re.search(rf"\]\(glossary\.ipynb#{anchor}\)", cell.source)
        plain = pattern(term).search(MASKED.sub(lambda m: " " * len(m[0]), cell.source))
        if link and (not plain or link.start() <= plain.end() + len(term)):
            return None
        if plain:
            return cell, *plain.span()
        if link:
            return None
    return None


def check(
    path: Path,  # a notebook
    mend: bool = False,  # put the links in
) -> list[str]:  # terms whose first use had none
    "The terms of one notebook that are used before they are linked."
    nb, found = nbformat.read(path, 4), []
    for term, anchor in sorted(terms().items(), key=lambda item: -len(item[0])):
        if not (place := unlinked(nb.cells, term, anchor)):
            continue
        found.append(term)
        cell, start, end = place
        if mend:
            cell.source = f"{cell.source[:start]}[{cell.source[start:end]}](glossary.ipynb#{anchor}){cell.source[end:]}"
    if mend and found:
        nbformat.write(nb, path)
    return found


def main():
    "All notebooks, or those named."
    mend, names = "--mend" in sys.argv, [a for a in sys.argv[1:] if not a.startswith("-")]
    lost = {
        p.stem: found
        for p in sorted(NBS.glob("*.ipynb"))
        if p.stem not in OUTSIDE and (not names or p.stem in names) and (found := check(p, mend))
    }
    for name, found in lost.items():
        print(f"{name}: {'linked' if mend else 'used without a link'}: {', '.join(found)}")
    if lost and not mend:
        raise SystemExit("terms: link them to the glossary, or run scripts/terms.py --mend")


if __name__ == "__main__":
    main()
