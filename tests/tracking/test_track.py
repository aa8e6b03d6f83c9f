"""Runs are found again: records that are damaged, old, or written by many; the catalogue; what W&B gets."""

import json
import os
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from conftest import HELPERS
from wandb_files import wandb_runs

from dlnb.config import RunConfig
from dlnb.track import RunRecord, best, compare, plot_runs, prune, runs
from dlnb.tracking.catalogue import find_records
from dlnb.trainer import fit

TASK = dict(model="dlnb.examples:DigitsNet", data="dlnb.examples:Digits", model_args={"width": 8}, data_args={"num_workers": 0})
TASK |= dict(accelerator="cpu", devices=1, batch_size=64, trainer_args={"enable_progress_bar": False})


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    "Three short trainings: two that finish, one that fails."
    root = tmp_path_factory.mktemp("runs")
    for lr in (1e-3, 3e-3):
        fit(RunConfig(**TASK, lr=lr, max_epochs=2, save_top_k=2, root=str(root)))
    with pytest.raises(ValueError):
        fit(RunConfig(**TASK, lr=1e-2, monitor="val_lss", root=str(root)))
    return root


def spoiled(root: Path, text: str) -> Path:
    folder = root / "broken"
    folder.mkdir()
    (folder / "run.json").write_text(text)
    return folder


def test_the_record_tells_what_a_run_was(root):
    (record,) = [record for record, _ in find_records(root) if record.settings["lr"] == 1e-3]
    assert record.hardware["cpu_count"] == os.cpu_count() and record.versions["torch"]
    assert record.best_metrics["val_loss"] == pytest.approx(record.best_score)
    assert record.state == "finished" and record.started <= record.ended


def test_the_code_version_is_that_of_the_folder_one_is_in(tmp_path, monkeypatch):
    from dlnb.tracking.environment import code_version

    monkeypatch.chdir(tmp_path)
    assert code_version() == {}
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    (tmp_path / "a.py").write_text("1")
    for words in (["init", "-q"], ["add", "a.py"], ["commit", "-qm", "first"]):
        subprocess.run([*git, *words], check=True)
    clean = code_version()
    (tmp_path / "a.py").write_text("2")
    assert len(clean["commit"]) == 40 and clean["dirty"] is False and code_version() == clean | {"dirty": True}


def test_the_catalogue_is_searched_by_what_a_person_remembers(root):
    assert list(runs(root)["status"]).count("finished") == 2
    table = runs(root, where="task == 'Digits-DigitsNet' and width == 8 and lr < 2e-3 and started > '2020-01-01'")
    assert [Path(run).name for run in table["run"]] == [Path(table["run"][0]).name] and table["lr"].tolist() == [1e-3]
    assert runs(root, where="status == 'finished'", sort="-lr")["lr"].tolist() == [3e-3, 1e-3]
    assert runs(root, where="lr > 1").empty


def test_compare_shows_only_what_differs(root):
    table = compare(*runs(root, where="status == 'finished'")["run"])
    assert {"lr", "val_loss"} <= set(table.index) and not {"model", "width", "batch_size", "mode"} & set(table.index)


def test_the_best_run_is_found_and_can_be_used(root, tmp_path):
    from dlnb.infer import evaluate

    folder = best(root)
    scores = runs(root, where="status == 'finished'").set_index("run")["best_score"]
    assert str(folder) == scores.idxmin()
    assert evaluate(folder, accelerator="cpu", root=str(tmp_path)).metrics["test_acc"] > 0.3


def test_prune_lists_and_deletes_only_on_a_second_word_and_never_a_best_one(root, tmp_path):
    import shutil

    copy = shutil.copytree(root, tmp_path / "copy")
    listed = prune(copy)
    assert len(listed) == 4 and all(Path(run, "checkpoints", name).exists() for run, name, _ in listed.values)
    deleted = prune(copy, delete=True)
    assert deleted.equals(listed) and prune(copy).empty
    for record, _ in find_records(copy):
        if record.status == "finished":
            assert (record.folder / record.best_checkpoint).exists()
            assert fit(RunConfig(**record.settings | {"root": str(copy)})).folder == record.folder  # it is still shown
            left = record.folder / "checkpoints" / "last.ckpt.removed.unfinished"  # by a deletion that was killed
            left.mkdir()
    assert set(prune(copy, delete=True)["checkpoint"]) == {left.name} and not left.exists()


def test_prune_leaves_a_run_alone_whose_record_does_not_say_which_checkpoint_is_the_best(tmp_path):
    spoiled(tmp_path, '{"mode": "train", "status": "finished"}')
    (tmp_path / "broken" / "checkpoints").mkdir()
    (tmp_path / "broken" / "checkpoints" / "last.ckpt").write_text("weights")
    assert prune(tmp_path, delete=True).empty and (tmp_path / "broken" / "checkpoints" / "last.ckpt").exists()


def test_curves_of_several_runs_lie_over_one_another(root):
    figure = plot_runs(*runs(root, where="status == 'finished'")["run"], metric="val_acc", smoothing=0.5)
    assert len(figure.axes[0].lines) == 2


def wrong(do):
    return lambda root: do(root, *runs(root, where="status == 'finished'")["run"])


MISTAKES = {
    "unknown column": (wrong(lambda root, *_: runs(root, where="vall_loss < 1")), "Did you mean 'val_loss'?"),
    "no expression": (wrong(lambda root, *_: runs(root, where="lr <")), "is not an expression"),
    "an assignment": (wrong(lambda root, *_: runs(root, where="lr = 1")), "is not an expression"),
    "no condition": (wrong(lambda root, *_: runs(root, where="lr + 1")), "does not work"),
    "text with a number": (wrong(lambda root, *_: runs(root, where="task < 3")), "does not work"),
    "unknown sort": (wrong(lambda root, *_: runs(root, sort="-started_at")), "Did you mean 'started'?"),
    "no folder": (wrong(lambda root, *_: runs(root / "nowhere")), "is not a folder"),
    "one to compare": (wrong(lambda root, one, *_: compare(one)), "needs two runs or more"),
    "no run": (wrong(lambda root, one, *_: compare(one, root / "nowhere")), "is not a run's folder"),
    "none is best": (wrong(lambda root, *_: best(root, where="lr > 1")), "has a best score where lr > 1"),
    "unknown metric": (wrong(lambda root, one, *_: plot_runs(one, metric="val_los")), "Did you mean 'val_loss'?"),
    "smoothing": (wrong(lambda root, one, *_: plot_runs(one, smoothing=1.5)), "smoothing=1.5"),
}


@pytest.mark.parametrize("do, told", MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_told_with_what_there_is(root, do, told):
    with pytest.raises(ValueError) as error:
        do(root)
    assert told in str(error.value)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"status": "asleep"}', '{"epoch": "many"}', "\0" * 100])
def test_a_broken_record_is_reported_and_the_others_are_shown(root, tmp_path, text):
    import shutil

    copy = shutil.copytree(root, tmp_path / "copy")
    folder = spoiled(copy, text)
    with pytest.warns(UserWarning, match=f"{folder.name}"):
        assert len(runs(copy)) == len(runs(root))


def test_a_record_of_an_older_and_of_a_newer_version_is_read(tmp_path):
    spoiled(tmp_path, '{"mode": "train", "status": "finished", "settings": {"lr": 1}, "invented_later": 3}')
    assert runs(tmp_path)["lr"].tolist() == [1]


WRITER = """
import sys
from dlnb.track import RunRecord
record = RunRecord(folder=sys.argv[1], step=int(sys.argv[2]), settings={"filler": "x" * 100_000})
for _ in range(50):
    record.write()
"""


def test_ten_writers_at_once_leave_a_whole_record(tmp_path):
    command = [sys.executable, "-c", WRITER, str(tmp_path)]
    writers = [subprocess.Popen([*command, str(number)]) for number in range(10)]
    seen = set()
    while any(writer.poll() is None for writer in writers):
        if (tmp_path / "run.json").exists():
            seen.add(RunRecord.read(tmp_path).step)
    assert [writer.returncode for writer in writers] == [0] * 10
    assert seen <= set(range(10)) and [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_a_record_that_begins_takes_away_what_a_kill_left_and_nothing_that_another_writes(tmp_path):
    left, being_written = tmp_path / ".run.json.1-1.new", tmp_path / ".run.json.2-2.new"
    for path in (left, being_written):
        path.touch()
    os.utime(left, (time.time() - 100,) * 2)
    RunRecord(folder=tmp_path).begin()
    assert list(tmp_path.glob(".run.json.*.new")) == [being_written]


def test_a_run_on_another_machine_that_is_no_longer_touched_is_interrupted(tmp_path):
    record = RunRecord(folder=tmp_path, host="elsewhere")
    record.write()
    assert RunRecord.read(tmp_path).state == "running"
    os.utime(record.path, (time.time() - 60, time.time() - 60))
    assert RunRecord.read(tmp_path).state == "interrupted" and runs(tmp_path)["status"].tolist() == ["interrupted"]
    with record.heartbeat(every=0.05):
        time.sleep(0.5)
    assert RunRecord.read(tmp_path).state == "running"


def test_every_training_is_one_finished_run_of_wandb_in_its_project(tmp_path):
    records = [fit(RunConfig(**TASK, lr=lr, max_epochs=1, wandb="offline", root=str(tmp_path))) for lr in (1e-3, 2e-3, 3e-3)]
    found = wandb_runs(tmp_path)
    assert len(found) == 3 and {one["run"].run_id for one in found} == {record.wandb["id"] for record in records}
    for one in found:
        assert one["exits"] == [0] and one["alerts"] == ["train finished"]
        assert (one["run"].project, one["run"].job_type) == ("Digits-DigitsNet-train", "train")
        record = next(record for record in records if record.wandb["id"] == one["run"].run_id)
        assert one["run"].run_group == RunConfig(**record.settings).hash and one["run"].display_name == record.folder.name
        assert one["config"]["checkpoint"].endswith(record.best_checkpoint) and Path(one["config"]["checkpoint"]).exists()
        assert any(ref.endswith("model.safetensors") for ref in one["files"])


def test_the_parameters_of_a_study_are_an_artifact_wherever_they_lie(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("best_params.json").write_text('{"params": {"lr": 0.002}}')
    fit(RunConfig(**TASK, max_epochs=1, wandb="offline", best_params="best_params.json", root="runs"))
    (one,) = wandb_runs(tmp_path)
    assert (tmp_path / "best_params.json").as_uri() in one["files"] and one["alerts"] == ["train finished"]


def test_a_test_follows_its_training_to_wandb_in_a_project_of_its_own(tmp_path):
    from dlnb.infer import evaluate

    trained = fit(RunConfig(**TASK, max_epochs=1, wandb="offline", root=str(tmp_path)))
    for _ in range(2):  # into the same folder
        tested = evaluate(trained.folder, accelerator="cpu")
    there = wandb_runs(tmp_path)
    assert sorted(one["run"].project for one in there) == ["Digits-DigitsNet-test"] * 2 + ["Digits-DigitsNet-train"]
    found = next(one for one in there if one["run"].run_id == tested.wandb["id"])
    assert found["config"]["run"] == str(trained.folder)
    assert found["steps"] and found["alerts"] == ["test finished"]


def test_the_run_that_a_notebook_has_of_its_own_is_left_alone(tmp_path):
    import wandb

    own = wandb.init(mode="offline", dir=tmp_path, project="mine")
    record = fit(RunConfig(**TASK, max_epochs=1, wandb="offline", root=str(tmp_path)))
    own.log({"mine": 1})
    assert wandb.run is own and own.id != record.wandb["id"]
    own.finish()
    assert {one["run"].project for one in wandb_runs(tmp_path)} == {"mine", "Digits-DigitsNet-train"}


def test_a_crashed_training_goes_on_as_the_same_run_of_wandb_with_rising_steps(tmp_path, monkeypatch):
    traced = HELPERS / "traced.py"
    settings = TASK | dict(model=f"{traced}:TracedNet", data=f"{traced}:TracedDigits", max_epochs=3, save_every_n_steps=7)
    config = RunConfig(**settings, wandb="offline", log_every_n_steps=2, root=str(tmp_path / "runs"))
    monkeypatch.setenv("TRACE", str(tmp_path))
    monkeypatch.setenv("STOP_AT", "33")
    with pytest.raises(RuntimeError, match="STOP_AT"):
        fit(config)
    monkeypatch.delenv("STOP_AT")
    assert fit(config).status == "finished"
    first, second = wandb_runs(tmp_path)
    assert first["run"].run_id == second["run"].run_id and (first["exits"], second["exits"]) == ([1], [0])
    steps = first["steps"] + second["steps"]
    assert steps == sorted(steps) and first["steps"][-1] < second["steps"][0] and steps[-1] == 56


def test_wandb_that_fails_does_not_stop_a_training(tmp_path, monkeypatch):
    import wandb

    def fail(*_, **__):
        raise ConnectionError("no W&B today")

    monkeypatch.setattr(wandb, "init", fail)
    with pytest.warns(UserWarning, match="W&B has failed, and the training continues without it: no W&B today"):
        record = fit(RunConfig(**TASK, max_epochs=1, wandb="offline", root=str(tmp_path)))
    assert record.status == "finished" and record.epoch == 1


UNREACHABLE = """
import sys
from dlnb.config import RunConfig
from dlnb.trainer import fit

record = fit(RunConfig(**eval(sys.argv[1]), max_epochs=5, wandb="auto", root=sys.argv[2]))
assert record.status == "finished" and record.epoch == 5
"""

ANSWERS = {
    "Viewer": {"viewer": {"id": "1", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}}},
    "UpsertBucket": {"upsertBucket": {"bucket": {"id": "1", "name": "x", "project": {"name": "p", "entity": {"name": "me"}}}}},
}


class DyingServer(BaseHTTPRequestHandler):
    "As much of W&B's API as a run needs to begin; from when it gets a run's data on, it answers no more."

    def do_POST(self):
        request = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.asked.append(self.path)
        if any("file_stream" in path for path in self.server.asked):
            time.sleep(300)
        name = json.loads(request).get("operationName") if self.path == "/graphql" else None
        answer = json.dumps({"data": ANSWERS.get(name, {})}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_):
        pass


def unreachable(tmp_path, address: str) -> tuple[str, dict]:
    "What a training with W&B's server there wrote, and its record's entry of W&B."
    environment = os.environ | {"WANDB_API_KEY": "a" * 40, "WANDB_BASE_URL": address}
    del environment["WANDB_MODE"]
    command = [sys.executable, "-c", UNREACHABLE, repr(TASK), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout + done.stderr, find_records(tmp_path)[0][0].wandb


@pytest.mark.soak
def test_a_server_that_cannot_be_reached_leaves_the_run_offline(tmp_path):
    written, wandb = unreachable(tmp_path, "http://127.0.0.1:9")
    assert "W&B is offline for this run: Failed to authenticate" in written and "To send this run: wandb sync" in written
    assert wandb["mode"] == "offline" and [one["exits"] for one in wandb_runs(tmp_path)] == [[0]]


@pytest.mark.soak
def test_a_server_that_dies_under_a_run_does_not_hold_it_up(tmp_path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), DyingServer)
    server.daemon_threads, server.asked = True, []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    try:
        written, wandb = unreachable(tmp_path, address)
    finally:
        server.shutdown()
    assert f"W&B: {address}/me/p/runs/" in written and "W&B has failed" in written and wandb["mode"] == "online"


def test_tensorboard_gets_the_metrics_too(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    record = fit(RunConfig(**TASK, max_epochs=2, logger="tensorboard", root=str(tmp_path)))
    events = EventAccumulator(str(record.folder / "tensorboard")).Reload()
    assert len(events.Scalars("val_loss")) == 2 and (record.folder / "metrics.csv").exists()


def test_a_thousand_runs_are_listed_in_about_a_second(root, tmp_path):
    text = next(root.rglob("run.json")).read_text()
    for number in range(1000):
        (tmp_path / f"Data-Net/train/ddp/{number}/checkpoints").mkdir(parents=True)
        (tmp_path / f"Data-Net/train/ddp/{number}/run.json").write_text(text)
    assert len(runs(tmp_path)) == 1000
