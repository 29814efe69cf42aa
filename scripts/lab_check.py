"""Run notebooks in the real JupyterLab: server, browser, Run All; fails on an error, a cell that did not run, a picture not drawn, a broken bar, or a run of over a minute.

usage: python scripts/lab_check.py [NAME.ipynb ...]     (default: every notebook with code; needs Chromium)
"""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import nbformat
from browser_check import browser_path
from notebooks import NBS, SKIPPED
from playwright.sync_api import sync_playwright

PROMPTS = "() => [...document.querySelectorAll('.jp-NotebookPanel:not(.lm-mod-hidden) .jp-CodeCell .jp-InputPrompt')].map(p => p.textContent)"
SETTINGS = {
    "notebook-extension/tracker": {"windowingMode": "none"},
    "apputils-extension/notification": {"fetchNews": "false"},
}
SECONDS = 60  # longest Run All of a notebook


def code_cells(path: Path) -> list:
    "The cells that are run; flagged ones are not."
    return [
        c
        for c in nbformat.read(path, 4).cells
        if c.cell_type == "code" and c.source.strip() and not SKIPPED.search(c.source)
    ]


def copy_notebooks(folder: Path):
    "A copy to work in, since JupyterLab saves: without outputs, flagged cells empty, folded cells open, so that their prompt is seen."
    shutil.copytree(NBS, folder, ignore=shutil.ignore_patterns(".*", "_quarto.yml"))
    results = NBS.parent / "benchmarks" / "results"  # which notebooks show
    shutil.copytree(results, folder.parent / "benchmarks" / "results")
    for path in folder.glob("*.ipynb"):
        nb = nbformat.read(path, 4)
        for cell in nb.cells:
            if cell.cell_type == "code":
                cell.outputs = []
                cell.metadata.pop("jupyter", None)
                cell.source = "" if SKIPPED.search(cell.source) else cell.source
        nbformat.write(nb, path)


@contextmanager
def lab_server(folder: Path, home: Path):
    "JupyterLab on a free port of loopback, without the user's settings; yields its address."
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    for name, value in SETTINGS.items():
        path = home / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(value))
    places = {"JUPYTERLAB_SETTINGS_DIR": "settings", "JUPYTER_CONFIG_DIR": "config", "JUPYTER_RUNTIME_DIR": "run"}
    env = os.environ | {"HOME": str(home)} | {key: str(home / name) for key, name in places.items()}
    options = ["--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}", "--IdentityProvider.token=book"]
    command = [sys.executable, "-m", "jupyterlab", *options, f"--ServerApp.root_dir={folder}"]
    with (home / "log").open("w") as log, subprocess.Popen(command, env=env, stdout=log, stderr=log) as server:
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()


def wait_for(what: str, ready, seconds: float):
    "Poll until ready."
    end = time.time() + seconds
    while not ready():
        if time.time() > end:
            raise SystemExit(f"lab check: {what}: not within {seconds:g} s")
        time.sleep(0.5)


def run_all(page, address: str, path: Path) -> float:
    "Open a notebook, Run > Run All Cells, wait for the last one, save, end the kernel; the seconds of the run."

    def answers():
        try:
            return page.goto(address).ok
        except Exception:
            return False

    wait_for("JupyterLab's server", answers, 60)
    page.wait_for_selector(".jp-NotebookPanel .jp-CodeCell", timeout=60_000)
    page.get_by_text("| Idle").wait_for(timeout=60_000)  # in the status bar: the kernel is there
    page.wait_for_timeout(1000)
    start = time.time()
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    wait_for(f"{path.name}: start", lambda: any(re.search(r"[*\d]", p) for p in page.evaluate(PROMPTS)), 60)
    wait_for(f"{path.name}: Run All", lambda: not any("*" in p for p in page.evaluate(PROMPTS)), 10 * SECONDS)
    seconds, before = time.time() - start, path.stat().st_mtime_ns
    page.keyboard.press("Control+s")
    wait_for(f"{path.name}: save", lambda: path.stat().st_mtime_ns != before, 30)
    page.get_by_role("menuitem", name="Kernel", exact=True).click()
    page.get_by_role("menuitem", name="Shut Down Kernel", exact=True).click()
    return seconds


def problems(path: Path, stored: Path, seconds: float) -> list[str]:
    "What is wrong with a notebook that was run and saved, against the committed one."
    cells = code_cells(path)
    pictures = lambda cell: sum("image/png" in o.get("data", {}) for o in cell.outputs)
    drawn = {c.id: pictures(c) for c in code_cells(stored)}
    bad = [f"{o.ename}: {o.evalue}" for c in cells for o in c.outputs if o.output_type == "error"]
    bad = bad or [f"did not run: {c.source.splitlines()[0]}" for c in cells if not c.execution_count]
    bad += [f"picture not drawn: {c.source.splitlines()[0]}" for c in cells if pictures(c) < drawn.get(c.id, 0)]
    said = json.dumps([c.outputs for c in cells])
    bad += [f"{word} in an output" for word in ("IProgress not found", "widget-view+json") if word in said]
    return bad + ([f"Run All took {seconds:.0f} s, not under {SECONDS}"] if seconds > SECONDS else [])


def main():
    "Check each notebook; exit status 1 with its problems."
    if not browser_path():
        sys.exit("lab check: no Chromium found: install it (apt-get install chromium)")
    names, count = sys.argv[1:] or [p.name for p in sorted(NBS.glob("*.ipynb")) if code_cells(p)], 0
    with tempfile.TemporaryDirectory() as tmp, sync_playwright() as p:
        folder, home = Path(tmp, "nbs"), Path(tmp, "home")
        copy_notebooks(folder)
        home.mkdir()
        launch = p.chromium.launch(executable_path=browser_path(), args=["--no-sandbox"])
        with lab_server(folder, home) as server, launch as browser:
            for name in names:
                page = browser.new_page(viewport={"width": 1300, "height": 1000})
                seconds = run_all(page, f"{server}/lab/tree/{name}?token=book&reset", folder / name)
                page.close()
                bad = problems(folder / name, NBS / name, seconds)
                count += len(bad)
                state = "failed" if bad else "ok"
                print(f"{name}: {state} in JupyterLab, {seconds:.0f} s", *bad, sep="\n  ", flush=True)
    sys.exit(f"lab check: {count} problems" if count else 0)


if __name__ == "__main__":
    main()
