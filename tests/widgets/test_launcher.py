"""The launcher: a form of any notebook's parameters, driven as a person would, in a real kernel; and what is left of it without a front end."""

import json
import shutil
import time
from contextlib import chdir
from pathlib import Path

import nbformat
import pytest
from conftest import REPOSITORY, TRAIN, write_notebook
from IPython.core.interactiveshell import InteractiveShell
from ipywidgets import HTML
from kernels import Kernel

from dlnb.engine import jobs
from dlnb.widgets.form import Form
from dlnb.widgets.launcher import Launcher

pytestmark = [pytest.mark.timeout(500), pytest.mark.usefixtures("place")]
EVIL = "<script>alert(1)</script><img src=x onerror=alert(2)>"
COUNT = "import time\nfor i in range(n):\n    print('epoch', f'{i}/{n}', flush=True)\n    time.sleep(0.05)"
TRAINED = """
from pathlib import Path
import os, time
folder = Path("runs/mine")
folder.mkdir(parents=True, exist_ok=True)
(Path(os.environ["DLNB_JOB"]) / "run").write_text(str(folder.resolve()))
for step in range(n):
    with (folder / "metrics.csv").open("a") as file:
        file.write("step,loss\\n" * (step == 0) + f"{step},{1 / (step + 1)}\\n")
    print(f"epoch {step + 1}/{n} $x_{{ <b>loss</b>", flush=True)
    time.sleep(0.1)
"""


def inside(widget):
    "A widget, and all that are in it."
    yield widget
    for child in getattr(widget, "children", ()):
        yield from inside(child)


def workflow(name: str):
    return nbformat.read(TRAIN.with_name(f"{name}.ipynb"), 4)


@pytest.mark.parametrize("name", ["train", "tune", "infer"])
def test_the_form_of_a_workflow_gives_nothing_until_something_is_entered(name):
    form = Form(workflow(name))
    assert form.faults == {} and form.given == {} and len(form.fields) > 20


def test_a_bad_value_stands_at_its_field_and_run_is_disabled():
    launcher = Launcher(TRAIN)
    assert not launcher.run.disabled and "papermill" in launcher.command.value
    bad = {
        "lr": "fast",
        "devices": "0",
        "model_args": "{'width': ",
        "max_epochs": "-7",
        "trainer_args": "{'acelerator': 1}",
        "gradient_clip_val": "x",
    }
    for name, text in bad.items():
        control = launcher.form.fields[name].control
        good, control.value = control.value, text
        assert launcher.run.disabled, name
        assert launcher.form.fields[name].message.value or launcher.form.note.value, name
        launcher.run.click()
        control.value = good
        assert not launcher.run.disabled and launcher.form.faults == {}
    launcher.form.set(strategy="deepspeed_stage_2", gradient_clip_algorithm="value", gradient_clip_val=1.0)
    assert launcher.run.disabled and "not possible under DeepSpeed" in launcher.form.note.value
    assert jobs() == []


def test_what_a_foreign_notebook_says_is_text(place):
    cells = [f"n = 1  # {EVIL}\n# {EVIL}\nsecret = {EVIL!r}", f"print({EVIL!r})\n{EVIL!r}"]
    launcher = Launcher(write_notebook(place / "theirs.ipynb", *cells))
    launcher.form.set(n="x")
    launcher.form.set(n=2)
    launcher.run.click()
    launcher.job.job.wait(timeout=60)
    launcher.job.look()
    assert EVIL in launcher.job.job.describe()
    html = [widget.value for widget in inside(launcher.panel) if isinstance(widget, HTML)]
    assert len(html) > 5
    for text in [*html, launcher.static()]:
        assert "<script" not in text and "<img src=x" not in text


def test_a_file_that_is_no_notebook_with_parameters_is_told(place):
    (place / "text.ipynb").write_text("no json")
    (place / "other.ipynb").write_text('{"a": 1}')
    write_notebook(place / "broken.ipynb", "n = (1")
    write_notebook(place / "in.ipynb", "n = 1")
    launcher = Launcher("in.ipynb")
    assert [*launcher.notebook.control.options] == ["broken.ipynb", "in.ipynb"]
    for name in ("text.ipynb", "other.ipynb", "broken.ipynb", "none.ipynb"):
        launcher.notebook.control.value = name
        assert launcher.run.disabled and launcher.notebook.message.value and launcher.form is None, name
    launcher.notebook.control.value = "in.ipynb"
    assert not launcher.run.disabled and launcher.notebook.message.value == ""


def test_a_page_opens_no_notebook_of_another_folder(place):
    folder, other = place / "project", place / "other"
    folder.mkdir()
    for path in (folder / "in.ipynb", other / "out.ipynb"):
        path.parent.mkdir(exist_ok=True)
        write_notebook(path, "n = 1")
    (folder / "link.ipynb").symlink_to(other / "out.ipynb")
    with chdir(folder):
        launcher, wider = Launcher(), Launcher(within=[other])
        for name in ("../other/out.ipynb", str(other / "out.ipynb"), "link.ipynb"):
            launcher.notebook.control.value = wider.notebook.control.value = name
            assert launcher.run.disabled and "is outside of" in launcher.notebook.message.value, name
            launcher.run.click()
            assert not wider.run.disabled, name
        launcher.notebook.control.value = str(TRAIN)
        assert not launcher.run.disabled and jobs() == []


def test_the_dashboard_lists_what_it_has_launched(place):
    "Its working directory is its own folder, and the runs are beside that."
    shutil.copytree(TRAIN.parent, place / "nbs" / "workflows")
    cells = [cell.source for cell in nbformat.read(REPOSITORY / "nbs" / "dashboard.ipynb", 4).cells if cell.cell_type == "code"]
    shell = InteractiveShell()
    with chdir(place / "nbs"):
        _, launcher, *_ = [shell.run_cell(cell).result for cell in cells]
        assert launcher.notebook.control.value == "workflows/train.ipynb" and launcher.form.given == {"root": "../runs"}
        launcher.form.set(accelerator="cpu", devices=1, max_epochs=1)
        launcher.run.click()
        job = launcher.job.job
        assert job.wait(timeout=300) == "finished", job.describe()
        _, launcher, runs, _ = [shell.run_cell(cell).result for cell in cells]
        assert [*launcher.known] == [job.id]
        assert [Path(parts[""]["run"]).resolve() for parts in runs.table.runs.parts] == [job.run]
    assert job.folder.resolve().parent == place / "runs" / ".jobs" and job.run.is_relative_to(place / "runs")
    assert not (place / "nbs" / "runs").exists()


def test_a_job_is_launched_watched_stopped_and_resumed_in_a_kernel(place):
    write_notebook(place / "train.ipynb", "n = 1", TRAINED)
    kernel = Kernel(place)
    try:
        kernel.run("from dlnb.widgets.launcher import Launcher\nlauncher = Launcher('train.ipynb', n=400)\nlauncher")
        kernel.run("launcher.run.click()")
        look = "import json; job = launcher.job\nprint(json.dumps([job.bar.value, job.bar.max, len(job.curves.content), job.stop.disabled, job.text.value]))"

        def until(condition):  # nothing is executed meanwhile but these looks: the widget follows the job by itself
            deadline = time.monotonic() + 60
            while not condition(seen := json.loads(kernel.run(look).strip())):
                assert time.monotonic() < deadline, seen
                time.sleep(0.2)
            return seen

        seen = until(lambda seen: seen[0] > 3 and seen[2])
        assert seen[1] == 400 and not seen[3] and "&lt;b&gt;" in seen[4]
        kernel.run("launcher.job.stop.click()")
        assert "stopped" in until(lambda seen: seen[3])[4]
        kernel.run("launcher.job.resume.click()")
        until(lambda seen: "running" in seen[4] and not seen[3])
        kernel.run("launcher.job.stop.click()")
        until(lambda seen: seen[3])
    finally:
        kernel.kill()


@pytest.mark.soak
def test_without_a_front_end_it_leaves_a_table_and_a_picture(place, launch):
    write_notebook(place / "count.ipynb", "n = 3  # how often", TRAINED)
    driven = "launcher = Launcher('count.ipynb', n=2)\nlauncher.run.click()\nlauncher.job.job.wait()\nlauncher.job.look()\nlauncher"
    executed, _ = launch(write_notebook(place / "page.ipynb", "a = 1", "from dlnb.widgets.launcher import Launcher", driven), None)
    (output,) = executed.cells[-1].outputs
    assert "application/vnd.jupyter.widget-view+json" not in output.data
    html = output.data["text/html"]
    assert "how often" in html and "papermill count.ipynb" in html and "finished" in html and 'src="data:image/png;base64,' in html
    assert "<b>loss" not in html
    assert "widgets" not in executed.metadata


@pytest.mark.soak
def test_train_on_two_ranks_from_the_form(place):
    launcher = Launcher(TRAIN, accelerator="cpu", devices=2, strategy="ddp", max_epochs=40, root="runs")
    launcher.run.click()
    job, deadline = launcher.job.job, time.monotonic() + 200
    while not launcher.job.curves.content or launcher.job.bar.max != 40:  # epochs
        launcher.job.look()
        assert time.monotonic() < deadline
        time.sleep(0.2)
    launcher.job.stop.click()
    assert job.wait(timeout=60) == "preempted"
    launcher.job.resume.click()
    assert job.wait(timeout=200) == "finished"
    assert json.loads((job.run / "run.json").read_text())["attempts"] == 2
