"""Start Chromium and JupyterLab on first use, and stop them when the tests end.

The environment variable LLAMAGYM_SCREENSHOTS sets the folder of the screenshots, by default runs/screenshots.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parent.parent
SCREENSHOTS = Path(os.environ.get("LLAMAGYM_SCREENSHOTS", ROOT / "runs" / "screenshots"))
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
LAB = ["--no-browser", "--allow-root", "--ip=127.0.0.1", "--IdentityProvider.token=", "--ServerApp.password=", "--LabApp.news_url=",
       "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate", "--LabApp.expose_app_in_browser=True", "--ServerApp.terminals_enabled=False",
       "--LabApp.extension_manager=readonly"]  # fmt: skip
READY = """async () => {
    const w = window.jupyterapp.shell.currentWidget;
    await w.context.ready; await w.sessionContext.ready; await w.revealed;
    await window.jupyterapp.commands.execute('application:toggle-left-area');
}"""


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@contextmanager
def jupyter_lab(folder: Path):
    """Serve a folder with JupyterLab and yield the address"""
    port = free_port()
    command = [
        Path(sys.executable).with_name("jupyter"),
        "lab",
        *LAB,
        f"--port={port}",
        f"--ServerApp.root_dir={folder}",
    ]
    settings = (
        folder
        / ".settings"
        / "@jupyterlab"
        / "apputils-extension"
        / "notification.jupyterlab-settings"
    )
    settings.parent.mkdir(parents=True)
    settings.write_text('{"fetchNews": "false", "checkForUpdates": false}')
    own = {
        "JUPYTERLAB_SETTINGS_DIR": ".settings",
        "JUPYTER_CONFIG_DIR": ".jupyter",
        "IPYTHONDIR": ".ipython",
    }
    environment = {
        k: v for k, v in os.environ.items() if k not in ("IN_TEST", "LLAMAGYM_DOCS", "MPLBACKEND")
    }
    environment |= {"JUPYTER_PLATFORM_DIRS": "1", "OMP_NUM_THREADS": "1"} | {
        name: str(folder / place) for name, place in own.items()
    }
    with (folder / "server.log").open("w") as log:
        server = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True
        )
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/api/status", timeout=2)
                break
            except OSError:
                if server.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(
                        f"JupyterLab did not start:\n{(folder / 'server.log').read_text()[-3000:]}"
                    ) from None
                time.sleep(0.25)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(20)


def write_notebook(path: Path, *cells: str) -> None:
    """Write a notebook of code cells"""
    kernel = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    made = [
        {
            "cell_type": "code",
            "id": f"cell{i}",
            "metadata": {},
            "source": text,
            "outputs": [],
            "execution_count": None,
        }
        for i, text in enumerate(cells)
    ]
    path.write_text(
        json.dumps({"cells": made, "metadata": kernel, "nbformat": 4, "nbformat_minor": 5})
    )


def watch_errors(page) -> list[str]:
    """Return a list to which the page's errors are appended from now on"""
    errors = []
    page.on(
        "console",
        lambda message: errors.append(message.text) if message.type == "error" else None,
    )
    page.on("pageerror", lambda error: errors.append(str(error)))
    return errors


def open_notebook(page, address: str, name: str, run: bool = True, subshells: bool = True) -> None:
    """Open a notebook in JupyterLab and start running it, without waiting until it has finished.

    Without `subshells`, the kernel handles widget messages only between cells.
    """
    page.goto(f"{address}/lab/tree/{name}?reset")
    page.wait_for_function(
        "() => window.jupyterapp?.shell?.currentWidget?.sessionContext", timeout=90_000
    )
    page.evaluate(READY)
    if not subshells:
        page.evaluate(
            "() => { window.jupyterapp.shell.currentWidget.sessionContext.session.kernel.commsOverSubshells = 'disabled' }"
        )
    if run:
        page.evaluate("() => { window.jupyterapp.commands.execute('notebook:run-all-cells') }")


def screenshot(page, name: str) -> None:
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SCREENSHOTS / f"{name}.png")
