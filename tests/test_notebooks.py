"""Every notebook runs from top to bottom, and the README's commands give what they promise."""

import json
import re
import shutil
import sys

import nbformat
import pandas
import pytest
from conftest import REPOSITORY, TRAIN
from test_project import CHAPTERS, INDEX, run
from warm import warm_python

# As `nbdev_test` does: IPython without a kernel, which would take longer to start than most chapters to run.
EXECUTE = """
import sys
from execnb.nbio import read_nb
from execnb.shell import CaptureShell

CaptureShell(sys.argv[1]).run_all(read_nb(sys.argv[1]), exc_stop=True)
"""
IN_KERNEL = "from nbclient.cli import main; main()"
OF_CELLS = ("02_sources", "03_fingerprint", "10_kept_source")  # they look at what a kernel's cells define
LONG = "11_examples 10_tuner 04_strategy 05_trial index 07_trainer 04_launcher 02_study 01_processes 06_session 13_ranks".split()
LONG += (
    "14_find_strategy 03_probe 14_partition 04_trial_ranks 09_scheduler 05_on_ranks 17_supervisor".split()
)  # all of them 20 seconds, and more
NEEDED = {"05_schedule_free": "schedulefree", "17_schedule_free": "schedulefree", "06_eight_bit": "torchao"}
# They look at what a process imports, know processes by their ids, or need a signal to be there when what they send next is:
# a warm process gets it from another one.
COLD = ("04_strategy", "06_lock", "07_progress", "00_place", "17_supervisor", "04_serve")


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=[pytest.mark.soak] if path.stem in LONG else []) for path in [*CHAPTERS, INDEX]],
    ids=lambda path: path.relative_to(REPOSITORY / "nbs").with_suffix("").as_posix(),
)
def test_a_notebook_runs_from_top_to_bottom(path, tmp_path):
    pytest.importorskip(NEEDED.get(path.stem, "torch"))
    folder = tmp_path / path.parent.name
    folder.mkdir()
    shutil.copy(path, folder)
    (tmp_path / "workflows").symlink_to(REPOSITORY / "nbs" / "workflows")
    python = sys.executable if path.stem in COLD else warm_python()
    done = run(python, "-c", IN_KERNEL if path.stem in OF_CELLS else EXECUTE, path.name, cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.soak
def test_the_workflow_runs_by_hand_cell_by_cell(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", warm_python())
    from nbclient import NotebookClient

    notebook = nbformat.read(TRAIN, 4)
    (parameters,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    parameters.source += "\nmax_epochs = 1"
    NotebookClient(notebook, timeout=240, resources={"metadata": {"path": str(tmp_path)}}).execute()
    (record,) = tmp_path.rglob("run.json")
    assert '"finished"' in record.read_text() and '"epoch": 1' in record.read_text()


@pytest.mark.soak
def test_the_first_commands_of_the_readme_give_what_they_promise(tmp_path):
    readme = (REPOSITORY / "README.md").read_text()
    (command,) = re.findall(r"^    pip install -e \. && (papermill .*)$", readme, flags=re.MULTILINE)
    (tmp_path / "nbs").symlink_to(REPOSITORY / "nbs")
    done = run("bash", "-c", command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (record,) = (tmp_path / "runs").rglob("run.json")
    accuracy = float(re.search(r'"val_acc": ([\d.]+)', record.read_text())[1])
    assert accuracy >= 0.97
    outputs = [output for cell in nbformat.read(tmp_path / "out.ipynb", 4).cells for output in cell.get("outputs", [])]
    kinds = {kind for output in outputs for kind in output.get("data", {})}
    assert {"image/png", "text/html"} <= kinds

    (second,) = re.findall(r"^    (papermill nbs/workflows/infer.ipynb .*)$", readme, flags=re.MULTILINE)
    done = run("bash", "-c", second, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (metrics,) = (tmp_path / "runs").rglob("metrics.json")
    assert json.loads(metrics.read_text())["test_acc"] >= 0.97 and metrics.with_name("predictions.parquet").is_file()


@pytest.mark.soak
@pytest.mark.timeout(420)
def test_the_benchmark_of_a_gpu_runs_to_its_end_on_a_cpu(tmp_path):
    tiny = {"num_layers": 1, "num_heads": 2, "embed_dim": 256, "context_length": 32}  # with which a few layers more fill the memory
    settings = {"tables": str(tmp_path / "tables"), "model_args": tiny, "resumed": tiny | {"dropout": 0.1}, "batch_size": 2}
    settings |= {
        "strategies": ["single_device", "deepspeed_stage_2"],
        "warmup": 1,
        "steps": 2,
        "between": 0.0,
        "seconds": 15.0,
        "memory": 0.9,
    }
    notebook = REPOSITORY / "nbs" / "benchmarks" / "gpu.ipynb"
    done = run(sys.executable, "-m", "papermill", notebook, "out.ipynb", "-y", json.dumps(settings), cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    tables = {path.stem: pandas.read_csv(path) for path in (tmp_path / "tables").glob("*.csv")}
    assert sorted(tables) == ["exact", "kernel", "largest", "limits", "pauses", "steps", "trials"]
    assert tables["exact"]["resumed the same"].all() and (tables["exact"]["attempts"] == 2).all()
    assert len(tables["steps"]) > 3 and tables["steps"]["step, ms"].notna().all()
    assert tables["kernel"]["is"].iloc[0] == "finished" and tables["trials"]["trials"].iloc[-1] == 4


@pytest.mark.timeout(120)
def test_the_benchmark_of_the_optimizers_runs_to_its_end(tmp_path):
    settings = {"sizes": [0.01], "muon_sizes": [0.01], "rounds": 1, "tables": str(tmp_path / "tables")}
    notebook = REPOSITORY / "nbs" / "benchmarks" / "optim.ipynb"
    done = run(sys.executable, "-m", "papermill", notebook, "out.ipynb", "-y", json.dumps(settings), cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    table = pandas.read_csv(tmp_path / "tables" / "adamw.csv")
    assert list(table["tensors"]) == ["many small", "few large", "flat", "flat"]
    assert table[["AdamW, loop", "AdamW, foreach", "AdamW_fused", "of the fastest"]].notna().all(axis=None)
