"""The built site in a real browser: nothing is wider than its place, the sidebar fits one screen, the sliders move what they should.

usage: python scripts/browser_check.py [FOLDER]     (default _docs; needs Chromium)
"""

import shutil
import sys
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome")
WIDE = """() => {
  const bad = [], width = document.documentElement.clientWidth;
  if (document.documentElement.scrollWidth > width) bad.push(`the page is ${document.documentElement.scrollWidth} wide`);
  if (width < 1000) return bad;  // on a phone a block may scroll, the page may not
  for (const e of document.querySelectorAll("main pre, main table, main math, main img, main svg"))
    if (e.scrollWidth > e.clientWidth + 1 && e.clientWidth) bad.push(`${e.tagName.toLowerCase()} is ${e.scrollWidth} wide, its place ${e.clientWidth}: ${e.textContent.trim().slice(0, 60)}`);
  const book = document.querySelector("nav.book, #quarto-sidebar");
  if (book && book.scrollHeight > innerHeight) bad.push(`the sidebar is ${book.scrollHeight} high, the screen ${innerHeight}`);
  return bad;
}"""
SLIDE = """value => {
  const root = document.querySelector(".d2mora-live"), field = root.querySelector("[name=L]");
  field.value = value;
  field.dispatchEvent(new Event("input", {bubbles: true}));
  return root.querySelector("p").textContent;
}"""


def browser_path() -> str | None:  # of a program
    "Chromium or Chrome, if there is one."
    return next(filter(None, map(shutil.which, NAMES)), None)


def page_faults(
    page,  # of the browser
    path: Path,  # of an HTML file
    width: int,  # of the window, pixels
) -> list[str]:  # one line for each
    "What is wrong with a page at a width."
    page.set_viewport_size({"width": width, "height": 900})
    page.goto(path.resolve().as_uri())
    bad = page.evaluate(WIDE)
    if page.query_selector(".d2mora-live"):
        few, much = (float(page.evaluate(SLIDE, value).split("B's ")[-1].rstrip(".")) for value in ("0", "1"))
        bad += [] if few > 0.5 > much else [f"λ moves the cosine of the B's from {few} to {much}"]
    return [f"{path.name} at {width}: {' '.join(line.split())}" for line in bad]


def faults(
    site: Path,  # folder of the site, or of single pages
    widths: tuple = (1400, 400),  # pixels
) -> list[str]:  # one line for each
    "All pages at all widths."
    from playwright.sync_api import sync_playwright

    with sync_playwright() as p, p.chromium.launch(executable_path=browser_path(), args=["--no-sandbox"]) as browser:
        page, errors = browser.new_page(), []
        page.on("pageerror", lambda error: errors.append(f"{page.url}: {error}"))
        found = [
            line for width in widths for path in sorted(site.glob("*.html")) for line in page_faults(page, path, width)
        ]
        return found + errors


def main():
    "Exit status 1 with the faults, 2 without a browser."
    if not browser_path():
        print(f"browser check: not run, none of {', '.join(NAMES)} is installed", file=sys.stderr)
        sys.exit(2)
    bad = faults(Path(sys.argv[1] if len(sys.argv) > 1 else "_docs"))
    print("\n".join(bad) or "browser check: nothing is too wide at 1400 and 400 pixels")
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
