"""The page of bad input: each case of tests/bad_input.py with the answer that it got, as the test kept them."""
import html, json
from pathlib import Path

PARTS = {"recipe": "Recipes", "command": "Command lines", "data": "Data files", "adapter": "Adapters and bases", "results": "Results of earlier calls",
         "published": "Published checkpoints", "configuration": "Configurations in Python"}
TEXT = """---
title: "Bad input"
description: "{count} things that can be wrong, and the line that says so."
---

Each row is tried by the tests: the files are made, the command is run, and the answer must be this one line, with exit status 2
(in Python a `ValueError`). Nothing may be written, and none may take long. {accepted} rows look odd and are right: there the result must equal that of the plain form.
`make bad-input` makes the answers anew; the table itself is `tests/bad_input.py`.
"""


def code(text: str  # anything
         ) -> str:  # HTML
    "Text as it stands, in small letters of one width; long words may break."
    return f"<code>{html.escape(text)}</code>"


def part(title: str,  # of the section
         cases: list  # of the results
         ) -> str:    # markdown and HTML
    "One section with its table."
    said = lambda c: html.escape(c["says"]) if c["says"].startswith("accepted") else code(c["says"])
    rows = "\n".join(f"<tr><td><b>{html.escape(c['id'].partition(': ')[2])}</b><br>{html.escape(c['wrong'])}</td><td>{code(c['given'])}<br>{said(c)}</td></tr>" for c in cases)
    head = "<thead><tr><th>What is wrong</th><th>What is given, and what is said</th></tr></thead>"
    return f"\n## {title}\n\n```{{=html}}\n<table class=\"catalogue\">\n{head}\n<tbody>\n{rows}\n</tbody>\n</table>\n```\n"


def page(results: Path  # bad_input.json
         ) -> str:      # markdown with front matter
    "The catalogue."
    cases = json.loads(results.read_text(encoding="utf-8"))["cases"]
    accepted = sum(c["says"].startswith("accepted") for c in cases)
    parts = [part(title, own) for name, title in PARTS.items() if (own := [c for c in cases if c["id"].split(":")[0] == name])]
    return TEXT.format(count=len(cases), accepted=accepted) + "".join(parts)
