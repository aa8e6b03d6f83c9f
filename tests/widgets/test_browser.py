"""The widgets in a real browser, by JupyterLab and by Voila, on loopback and with a token."""

import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import nbformat
import pytest
from conftest import TRAIN
from test_widgets import HOSTILE, checkpoints, write_run

from dlnb.launch.background import jobs
from dlnb.tracking.environment import now
from dlnb.tracking.record import RunRecord

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
LACKING = [name for name in ("playwright", "jupyterlab", "voila") if importlib.util.find_spec(name) is None]
pytestmark = [
    pytest.mark.soak,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(bool(LACKING) or not CHROMIUM, reason=f"needs {', '.join(LACKING) or 'Chromium'}"),
]
TOKEN = "a-token-of-the-test"
PATIENCE = 240_000  # milliseconds for a page on a machine that does something else too


@pytest.fixture
def folder(tmp_path):
    "A project: three runs that finished, one of hostile names, one that trains."
    runs = tmp_path / "runs" / "Digits-DigitsNet" / "train" / "ddp"
    for number in range(3):
        record = write_run(runs / f"run-{number}", rows=30, settings={"lr": 1e-3 * (number + 1)}, notebook="train.ipynb")
        nbformat.write(
            nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(f"# Trained {number}")]), record.folder / "train.ipynb"
        )
    acts = HOSTILE.replace("alert(1)", "window.acted=1").replace("/", "")
    write_run(runs / acts, settings={"lr": 0.5, "tags": [HOSTILE.replace("alert(1)", "window.acted=1")]}, error=HOSTILE)
    write_run(tmp_path / "runs" / "trains", rows=10, status="running", resolved={"total_steps": 100, "global_batch_size": 64})
    return tmp_path


def write_page(path: Path, *cells: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    notebook.metadata["kernelspec"] = {"name": "python3", "language": "python", "display_name": "Python 3"}  # else JupyterLab asks for one
    nbformat.write(notebook, path)
    return path


@contextmanager
def serving(*command: str, cwd: Path):
    "A server of Jupyter, as its address; it and its kernels are ended."
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = cwd / "server.log"
    own = {
        name: str(cwd / "jupyter") for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR", "JUPYTERLAB_WORKSPACES_DIR")
    }  # not the user's
    with log.open("w") as output:
        words = [sys.executable, "-m", *command, "--no-browser", f"--port={port}"]
        process = subprocess.Popen(words, cwd=cwd, env=os.environ | own, stdout=output, stderr=output, start_new_session=True)
    try:
        deadline = time.monotonic() + PATIENCE / 1000
        while True:
            with socket.socket() as asking:
                if asking.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.3)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.fixture
def page(tmp_path):
    "A tab of Chromium; how it looked last is kept beside the test's files."
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"] if os.geteuid() == 0 else [])
        page = browser.new_page(viewport={"width": 1300, "height": 1500})
        page.set_default_timeout(PATIENCE)
        yield page
        page.screenshot(path=tmp_path / "last.png")
        browser.close()


def of_row(page, name: str):
    "The box that ticks a run: the rows and the boxes have the same order, below the heading."
    rows = page.locator("table:has(th:text-is('run')) tr").all_inner_texts()
    (number,) = [number for number, row in enumerate(rows) if name in row]
    return page.locator(".widget-checkbox input:visible").nth(number - 1)


def overlaid(page) -> None:
    "Two runs ticked, their curves in one picture, and nothing has acted."
    page.get_by_text("5 of 5 runs").wait_for()
    of_row(page, "run-0").check()
    of_row(page, "run-2").check()
    page.get_by_text("2 ticked").wait_for()
    page.locator("img.widget-image:visible").first.wait_for()
    page.get_by_role("tab", name="Differences").click()
    page.get_by_text("setting or result").wait_for()
    assert page.get_by_text("0.003").count() >= 2
    assert page.evaluate("window.acted") is None


def test_runs_are_compared_and_tidied_by_voila(folder, page, tmp_path):
    notebook = write_page(folder / "nbs" / "page.ipynb", "from dlnb.widgets.runs import Runs\nRuns('../runs')")
    with serving("voila", str(notebook), f"--token={TOKEN}", cwd=folder) as address:
        assert "/login" in page.request.get(address).url  # without the token there is no page
        page.goto(f"{address}/?token={TOKEN}")
        overlaid(page)
        where = page.get_by_placeholder("strategy ==")
        where.fill("lrr < 1")
        where.press("Enter")
        page.get_by_text("Did you mean 'lr'?").wait_for()
        where.fill("lr < 1e-2 and status == 'finished'")
        where.press("Enter")
        page.get_by_text("3 of 5 runs").wait_for()
        before = checkpoints(folder)
        page.get_by_role("tab", name="Test, delete").click()
        page.get_by_role("button", name="Delete checkpoints").click()
        page.get_by_text("Delete these 2 checkpoints").wait_for()
        assert checkpoints(folder) == before
        page.screenshot(path=tmp_path / "voila.png", full_page=True)
        page.get_by_role("button", name="Delete", exact=True).click()
        page.get_by_text("2 checkpoints are deleted").wait_for()
        assert len(checkpoints(folder)) == len(before) - 2


@contextmanager
def lab(page, folder: Path, notebook: Path):
    "A notebook in JupyterLab, all of whose cells have been started."
    options = [f"--IdentityProvider.token={TOKEN}", "--LabApp.news_url=None", *(["--allow-root"] if os.geteuid() == 0 else [])]
    with serving("jupyterlab", f"--ServerApp.root_dir={folder}", *options, cwd=folder) as address:
        assert page.request.get(f"{address}/api/contents").status == 403
        # A page that is quicker than its server asks which kernel it is, or says that there is no answer yet.
        page.add_locator_handler(page.locator(".jp-Dialog-button.jp-mod-accept").first, lambda accept: accept.click())
        page.goto(f"{address}/lab/tree/{notebook.relative_to(folder)}?token={TOKEN}")
        page.locator(".jp-Notebook-ExecutionIndicator[data-status=idle]").wait_for(state="attached")
        ran = page.locator(".jp-InputPrompt").get_by_text(re.compile(r"\[[\d*]+\]:"))
        while not ran.count():  # JupyterLab drops what is run while it still connects to the kernel
            page.get_by_role("menuitem", name="Run", exact=True).click()
            page.get_by_text("Run All Cells", exact=True).click()
            page.wait_for_timeout(5000)
        yield


def save(page, notebook, holds):
    "Save it until its text holds what the page shows: JupyterLab passes over a Ctrl+S while it is busy. Returns what `holds` gives."
    deadline = time.monotonic() + 60
    while not (found := holds(notebook.read_text())):
        assert time.monotonic() < deadline
        page.keyboard.press("Control+s")
        page.wait_for_timeout(2000)
    return found


def test_runs_are_compared_in_jupyterlab_and_their_notebooks_opened(folder, page, tmp_path):
    notebook = write_page(folder / "nbs" / "page.ipynb", "from dlnb.widgets.runs import Runs\nRuns('../runs')")
    with lab(page, folder, notebook):
        overlaid(page)
        page.screenshot(path=tmp_path / "lab.png")
        outputs = save(page, notebook, lambda text: json.loads(text)["cells"][0]["outputs"])
        assert "run-0" in "".join(outputs[0]["data"]["text/html"])  # for whoever opens the file without a kernel
        page.get_by_role("tab", name="Notebooks").click()
        page.get_by_role("link", name="Digits-DigitsNet/train/ddp/run-2").click()
        page.get_by_text("Trained 2").first.wait_for(state="attached")


def test_a_card_moves_in_jupyterlab_and_stays_in_the_file(folder, page, tmp_path):
    code = "from dlnb.views.training_card import TrainingCard\nTrainingCard('../runs/trains', every=0.5)"
    notebook, run = write_page(folder / "nbs" / "page.ipynb", code), folder / "runs" / "trains"
    with lab(page, folder, notebook):
        page.get_by_text("10 of 100").wait_for()
        lines = [f"{step},1,{2 / (step + 1)}" for step in range(60)]
        (run / "metrics.csv").write_text("\n".join(["step,train_loss,val_loss", *lines, ""]))
        page.get_by_text("60 of 100").wait_for()
        page.get_by_text("steps/s").wait_for()
        page.screenshot(path=tmp_path / "card.png")
        record = RunRecord.read(run)
        record.status, record.ended, record.step = "finished", now(), 100
        record.write()
        page.get_by_text("100 of 100").wait_for()
        save(page, notebook, lambda text: "100 of 100" in text)


def test_a_search_is_watched_and_given_a_trial_by_voila(tmp_path, page):
    write = """
import optuna
from dlnb.config import RunConfig
from dlnb.search.plan import open_study, plan_search
from dlnb.search.report import write_best
from dlnb.search.study import StudyConfig
from dlnb.tracking.record import RunRecord
from dlnb.tracking.environment import now
config = RunConfig(model="dlnb.examples:DigitsNet", data="dlnb.examples:Digits", accelerator="cpu", devices=1)
plan = plan_search(config, StudyConfig(search_space={"lr": {"low": 1e-4, "high": 1e-1, "log": True}, "model_args.width": [8, 16]}, n_trials=9))
queue = open_study(plan)
study = optuna.load_study(study_name=plan.name, storage=queue.storage)
study.optimize(lambda trial: trial.suggest_float("lr", 1e-4, 1e-1, log=True) + 1 / trial.suggest_categorical("model_args.width", [8, 16]), 8)
write_best(plan, queue.all())
record = RunRecord(folder=plan.folder, mode="tune", status="stopped", started=now(), settings=config.model_dump())
record.resolved = {"study": plan.name, "n_trials": 9}
record.write()
"""
    subprocess.run([sys.executable, "-c", write], cwd=tmp_path, check=True, timeout=300)
    notebook = write_page(tmp_path / "nbs" / "page.ipynb", "from dlnb.widgets.study import Studies\nStudies('../runs')")
    with serving("voila", str(notebook), f"--token={TOKEN}", cwd=tmp_path) as address:
        page.goto(f"{address}/?token={TOKEN}")
        page.get_by_text("8 of 9").wait_for()
        picture = page.locator("img.widget-image:visible").first
        before = picture.get_attribute("src")
        page.get_by_role("button", name="parallel coordinates").click()
        page.wait_for_function("([image, before]) => image.src != before", arg=[picture.element_handle(), before])
        page.screenshot(path=tmp_path / "study.png", full_page=True)
        page.get_by_role("tab", name="Your own trial").click()
        field = page.get_by_placeholder("0.0001 to 0.1")
        field.fill("7")
        page.get_by_role("button", name="Add this trial").click()
        page.get_by_text("must be from 0.0001 to 0.1").wait_for()
        field.fill("0.02")
        page.get_by_role("button", name="Add this trial").click()
        page.get_by_text("Trial 8 waits").wait_for()
        page.get_by_role("tab", name="Trials").click()
        page.get_by_role("cell", name="WAITING", exact=True).wait_for()


@pytest.fixture
def jobs_end(tmp_path, monkeypatch):
    "Jobs outlive the page that has started them, not the test."
    monkeypatch.chdir(tmp_path)
    yield
    for job in jobs():
        if job.process.is_running:
            os.kill(job.process.pid, signal.SIGKILL)


def field(page, name: str):
    return page.locator(".widget-text", has=page.locator("label", has_text=name)).locator("input").first


def button(page, name: str):
    return page.locator("button.widget-button:visible", has_text=name)


def test_two_ranks_are_launched_from_the_form_watched_stopped_and_resumed(jobs_end, page, tmp_path):
    shutil.copy(TRAIN, tmp_path)
    code = "from dlnb.widgets.launcher import Launcher\nLauncher('train.ipynb', accelerator='cpu', devices=2, strategy='ddp')"
    notebook = write_page(tmp_path / "page.ipynb", code)
    with lab(page, tmp_path, notebook):
        button(page, "Run").wait_for()
        field(page, "max_epochs").fill("many")
        page.locator("[role=alert]", has_text="integer").wait_for()
        assert button(page, "Run").is_disabled()
        field(page, "max_epochs").fill("60")
        field(page, "batch_size").fill("16")
        page.locator("button.widget-button:not([disabled])", has_text="Run").wait_for()
        assert "papermill train.ipynb" in page.locator("pre", has_text="papermill").inner_text()
        button(page, "Run").click()
        page.locator("img.widget-image:visible").wait_for()
        first = page.locator("img.widget-image:visible").get_attribute("src")
        page.wait_for_function("src => document.querySelector('img.widget-image').src !== src", arg=first)
        page.screenshot(path=tmp_path / "launcher.png", full_page=True)
        button(page, "Stop").click()
        page.locator("pre", has_text="· preempted ·").wait_for()
        button(page, "Resume").click()
        page.locator("pre", has_text="· running ·").wait_for()
    (job,) = jobs()
    assert job.status == "running"  # JupyterLab has ended with its kernels, the job has not
    with lab(page, tmp_path, write_page(tmp_path / "page.ipynb", code)):
        chosen = page.locator(".widget-dropdown", has=page.locator("label", has_text="job")).locator("select").last
        chosen.select_option(label=job.id)
        assert job.wait(timeout=400) == "finished"
        page.locator("pre", has_text="· finished ·").wait_for()
        page.locator("pre", has_text="val_acc").wait_for()


def test_a_foreign_notebook_cannot_act_through_the_page(jobs_end, page, tmp_path):
    hostile = HOSTILE.replace("alert(1)", "window.acted=1")
    notebook = write_page(
        tmp_path / "theirs.ipynb", f"n = 1  # {hostile}\n# {hostile}\ntext = {hostile!r}", f"print({hostile!r})\n{hostile!r}"
    )
    theirs = nbformat.read(notebook, 4)
    theirs.cells[0].metadata["tags"] = ["parameters"]
    theirs.cells.append(nbformat.v4.new_code_cell(f"raise ValueError({hostile!r})"))
    nbformat.write(theirs, notebook)
    own = write_page(tmp_path / "page.ipynb", "from dlnb.widgets.launcher import Launcher\nLauncher('theirs.ipynb')")
    with lab(page, tmp_path, own):
        button(page, "Run").click()
        shown = page.locator("pre", has_text="· failed ·")
        shown.wait_for()
        assert "onerror" in shown.inner_text()
        assert page.evaluate("window.acted") is None
