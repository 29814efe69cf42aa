"""Run notebooks in the real JupyterLab: server, browser, Run All; fails on an error, a cell that did not run, a picture not drawn, a broken bar, or too long a run.

usage: python scripts/lab_check.py [NAME.ipynb ...] [--seconds 60] [--pictures FOLDER]     (default: every notebook with code; needs Chromium)
"""

import argparse
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import nbformat
from playwright.sync_api import sync_playwright

from notebooks import NBS, SKIPPED

PROMPTS = "() => [...document.querySelectorAll('.jp-NotebookPanel:not(.lm-mod-hidden) .jp-CodeCell .jp-InputPrompt')].map(p => p.textContent)"


def copy_notebooks(
    folder: Path,  # an empty folder
) -> None:
    "A copy to work in, since JupyterLab saves; cells flagged slow or gpu are emptied, folded ones unfolded: their prompt tells when they have run."
    shutil.copytree(NBS, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(".*", "_quarto.yml"))
    shutil.copytree(
        NBS.parent / "benchmarks" / "results", folder.parent / "benchmarks" / "results"
    )  # which notebooks replay
    for path in folder.glob("*.ipynb"):
        nb = nbformat.read(path, 4)
        for cell in nb.cells:
            if cell.cell_type == "code":
                cell.outputs = []
                cell.metadata.pop("jupyter", None)
                if SKIPPED.search(cell.source):
                    cell.source = ""
        nbformat.write(nb, path)


@contextmanager
def lab_server(
    folder: Path,  # notebooks
    home: Path,  # an own HOME: the user's settings stay out
):
    "JupyterLab on a free port of loopback; yields its address."
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    for extension, name, value in (
        ("notebook-extension", "tracker", {"windowingMode": "none"}),
        ("apputils-extension", "notification", {"fetchNews": "false"}),
    ):
        settings = home / "settings" / "@jupyterlab" / extension
        settings.mkdir(parents=True)
        (settings / f"{name}.jupyterlab-settings").write_text(json.dumps(value))
    env = {
        **os.environ,
        "HOME": str(home),
        "JUPYTERLAB_SETTINGS_DIR": str(home / "settings"),
        "JUPYTER_CONFIG_DIR": str(home / "config"),
        "JUPYTER_RUNTIME_DIR": str(home / "run"),
    }
    command = [
        sys.executable,
        "-m",
        "jupyterlab",
        "--no-browser",
        "--allow-root",
        "--ip=127.0.0.1",
        f"--port={port}",
        "--IdentityProvider.token=book",
        f"--ServerApp.root_dir={folder}",
    ]
    with (home / "log").open("w") as log, subprocess.Popen(command, env=env, stdout=log, stderr=log) as server:
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()


def wait_for(
    what: str,  # for the message
    ready,  # function without arguments
    seconds: float,  # longest wait
) -> None:
    "Poll until ready."
    end = time.time() + seconds
    while not ready():
        if time.time() > end:
            raise SystemExit(f"lab check: {what}: not within {seconds:g} s")
        time.sleep(0.5)


def open_page(
    page,  # of the browser
    address: str,  # of the notebook
) -> None:
    "Open a notebook, once the server answers."

    def answers():
        try:
            return page.goto(address).ok
        except Exception:
            return False

    wait_for("JupyterLab's server", answers, 60)
    page.wait_for_selector(".jp-NotebookPanel .jp-CodeCell", timeout=60_000)
    page.get_by_text("| Idle").wait_for(timeout=60_000)  # in the status bar: the kernel is there
    page.wait_for_timeout(1000)


def run_all(
    page,  # with the notebook open
    path: Path,  # the copy that JupyterLab saves
    seconds: float,  # longest run
) -> None:
    "Run > Run All Cells, wait for the last one, save."
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    wait_for(f"{path.name}: start", lambda: any(re.search(r"[*\d]", p) for p in page.evaluate(PROMPTS)), 60)
    wait_for(f"{path.name}: Run All", lambda: not any("*" in p for p in page.evaluate(PROMPTS)), seconds)
    before = path.stat().st_mtime_ns
    page.keyboard.press("Control+s")
    wait_for(f"{path.name}: save", lambda: path.stat().st_mtime_ns != before, 30)


def picture(
    page,  # with the notebook open
    path: Path,  # PNG to write
) -> None:
    "The whole notebook as one picture: the window is made as tall as its content."
    cells = "document.querySelector('.jp-NotebookPanel:not(.lm-mod-hidden) .jp-WindowedPanel-outer')"
    tall = page.evaluate(f"() => [...{cells}.querySelectorAll('.jp-Cell')].reduce((sum, c) => sum + c.offsetHeight, 0)")
    page.set_viewport_size({"width": 1300, "height": min(tall + 300, 16000)})
    page.wait_for_timeout(1000)
    page.evaluate(f"() => {{ {cells}.scrollTop = 0 }}")
    page.wait_for_timeout(1000)
    page.screenshot(path=path)


def shut_kernels(
    server: str,  # address
) -> None:
    "End the kernels of notebooks that are done: each next one has the machine for itself."
    headers = {"Authorization": "token book"}
    with urllib.request.urlopen(urllib.request.Request(f"{server}/api/sessions", headers=headers)) as answer:
        sessions = json.load(answer)
    for session in sessions:
        urllib.request.urlopen(
            urllib.request.Request(f"{server}/api/sessions/{session['id']}", headers=headers, method="DELETE")
        )


def pictures_in(
    cell: dict,  # a code cell
) -> int:  # how many
    "Pictures among a cell's outputs."
    return sum(any(kind.startswith("image/") for kind in o.get("data", {})) for o in cell.outputs)


def problems(
    path: Path,  # a notebook that was run and saved
    stored: Path,  # the same as committed
) -> list:  # one line each
    "Error outputs, cells that did not run, pictures that were not drawn, bars that the page cannot show."
    cells = [c for c in nbformat.read(path, 4).cells if c.cell_type == "code" and c.source.strip()]
    before = {c.id: c for c in nbformat.read(stored, 4).cells if c.cell_type == "code" and not SKIPPED.search(c.source)}
    bad = [f"{path.name}: {o.ename}: {o.evalue}" for c in cells for o in c.outputs if o.output_type == "error"]
    bad = bad or [f"{path.name}: did not run: {c.source.splitlines()[0]}" for c in cells if not c.execution_count]
    bad += [
        f"{path.name}: picture not drawn: {c.source.splitlines()[0]}"
        for c in cells
        if c.id in before and pictures_in(c) < pictures_in(before[c.id])
    ]
    said = "".join(str(o.get("text", "")) + str(o.get("data", "")) for c in cells for o in c.outputs)
    return bad + [
        f"{path.name}: {word} in an output"
        for word in ("IProgress not found", "Error displaying widget", "widget-view+json")
        if word in said
    ]


def check(
    name: str,  # notebook
    page,  # of the browser
    server: str,  # its address
    folder: Path,  # the copies that JupyterLab saves
    seconds: float,  # longest run
    pictures: Path,  # folder for a picture of the page, or None
) -> tuple:  # (problems, seconds of Run All)
    "One notebook, opened, run and saved."
    open_page(page, f"{server}/lab/tree/{name}?token=book&reset")
    start = time.time()
    run_all(page, folder / name, 10 * seconds)
    took = time.time() - start
    if pictures:
        picture(page, pictures / f"{Path(name).stem}.png")
    shut_kernels(server)
    slow = [f"{name}: Run All took {took:.0f} s, not under {seconds:g}"] if took > seconds else []
    return problems(folder / name, NBS / name) + slow, took


def notebooks_with_code() -> list:  # file names
    "What there is to run."
    return [
        p.name
        for p in sorted(NBS.glob("*.ipynb"))
        if any(c.cell_type == "code" and c.source.strip() for c in nbformat.read(p, 4).cells)
    ]


def main():
    "Check each notebook; exit status 1 with its problems."
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME.ipynb")
    parser.add_argument("--seconds", type=float, default=60, help="longest Run All of a notebook")
    parser.add_argument("--pictures", type=Path, help="folder for a picture of each page")
    args, bad = parser.parse_args(), []
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not chromium:
        sys.exit("lab check: no Chromium found: install it (apt-get install chromium)")
    if args.pictures:
        args.pictures.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as tmp, sync_playwright() as p:
        folder, home = Path(tmp, "nbs"), Path(tmp, "home")
        copy_notebooks(folder)
        home.mkdir()
        with (
            lab_server(folder, home) as server,
            p.chromium.launch(executable_path=chromium, args=["--no-sandbox"]) as browser,
        ):
            for name in args.names or notebooks_with_code():
                page = browser.new_page(viewport={"width": 1300, "height": 1000})
                found, took = check(name, page, server, folder, args.seconds, args.pictures)
                page.close()
                bad += found
                print(
                    f"{name}: {'ok' if not found else 'failed'} in JupyterLab, {took:.0f} s",
                    *found,
                    sep="\n  ",
                    flush=True,
                )
    sys.exit(f"lab check: {len(bad)} problems" if bad else 0)


if __name__ == "__main__":
    main()
