"""Widgets driven from Python as a page drives them: fields set, buttons clicked, what they show read."""

import os
import time
from functools import cache
from html.parser import HTMLParser
from pathlib import Path

import ipywidgets
import optuna
import pytest
from conftest import write_notebook
from kernels import Kernel

from dlnb.config import RunConfig
from dlnb.search.plan import open_study, plan_search
from dlnb.search.report import write_best
from dlnb.search.space import draw
from dlnb.search.study import StudyConfig
from dlnb.system.lock import find_holder, hold
from dlnb.system.processes import Process
from dlnb.tracking.environment import now
from dlnb.tracking.record import RunRecord
from dlnb.views.training_card import TrainingCard
from dlnb.widgets.runs import Runs
from dlnb.widgets.study import Studies, Study, training_settings

TASK = dict(model="dlnb.examples:DigitsNet", data="dlnb.examples:Digits", model_args={"width": 8}, data_args={"num_workers": 0})
TASK |= dict(accelerator="cpu", devices=1, batch_size=64, trainer_args={"enable_progress_bar": False})
HOSTILE = "\"'><img src=x onerror=alert(1)><script>alert(1)</script>$\\frac{"


@cache
def settings_of_a_run() -> dict:
    return RunConfig(**TASK).model_dump()


def write_run(folder: Path, rows: int = 5, status: str = "finished", **fields) -> RunRecord:
    "A run's folder as a training leaves it, with two checkpoints."
    record = RunRecord(folder=folder, status=status, started=now(), ended=None if status == "running" else now())
    record.settings = settings_of_a_run() | fields.pop("settings", {})
    record.metrics, record.best_score, record.best_checkpoint = {"val_loss": 0.5}, 0.5, "checkpoints/epoch=0.ckpt"
    if status == "running":
        fields |= dict(host=Process.this().host, machine=Process.this().machine, pid=os.getpid(), pid_began=Process.this().began)
    for name, value in fields.items():
        setattr(record, name, value)
    record.write()
    (folder / "checkpoints").mkdir()
    for name in ("epoch=0.ckpt", "last.ckpt"):
        (folder / "checkpoints" / name).write_bytes(bytes(1000))
    lines = [f"{step},{1 / (step + 1)},{2 / (step + 1)}" for step in range(rows)]
    (folder / "metrics.csv").write_text("\n".join(["step,train_loss,val_loss", *lines, ""]))
    return record


def written(root: Path, count: int) -> Path:
    for number in range(count):
        write_run(root / "Digits-DigitsNet" / "train" / "ddp" / f"run-{number:02d}", settings={"lr": 1e-3 * (number + 1)})
    write_run(root / "Digits-DigitsNet" / "train" / "ddp" / "trains", status="running", settings={"lr": 1.0})
    return root


@pytest.fixture
def root(tmp_path):
    "Four finished runs, and one that trains."
    return written(tmp_path / "runs", 4)


@pytest.fixture
def many(tmp_path):
    "More than a page of them."
    return written(tmp_path / "runs", 30)


def children(widget) -> list:
    "A widget and all that are in it."
    return [widget, *(inner for child in getattr(widget, "children", ()) for inner in children(child))]


def shown(view) -> str:
    "All HTML of a view, as a page gets it."
    texts = [widget.value for widget in children(view.panel) if isinstance(widget, ipywidgets.HTML)]
    outputs = [output for widget in children(view.panel) for output in getattr(widget, "outputs", ())]
    return "\n".join([*texts, *(output["data"]["text/html"] for output in outputs), view.static()])


def names(runs: Runs) -> list[str]:
    return [Path(run).name for run in runs.table.page.shown]


def tick(runs: Runs, *names: str) -> None:
    for name in names:
        (number,) = [number for number, run in enumerate(runs.table.page.shown) if Path(run).name == name]
        runs.table.page.boxes[number].value = True


def test_runs_are_filtered_sorted_and_paged(many):
    runs = Runs(many)
    choice = runs.table.choice
    choice.sort.value, choice.falling.value = "lr", False
    assert names(runs) == [f"run-{number:02d}" for number in range(20)]
    choice.page.value = 2
    assert names(runs) == [*(f"run-{number:02d}" for number in range(20, 30)), "trains"]
    choice.where.control.value = "lr < 4e-3 and status == 'finished'"
    assert (names(runs), choice.page.value, choice.page.max) == (["run-00", "run-01", "run-02"], 1, 1)
    choice.falling.value = True
    assert names(runs) == ["run-02", "run-01", "run-00"] and "3 of 31 runs" in choice.count.value


def test_a_wrong_filter_is_reported_at_its_field_and_changes_nothing(root):
    runs = Runs(root, where="lr < 4e-3")
    before, field = names(runs), runs.table.choice.where
    for wrong, told in [
        ("lrr < 1", "Did you mean &#x27;lr&#x27;?"),
        ("lr <", "is not an expression"),
        ("__import__('os')", "nothing is run here"),
    ]:
        field.control.value = wrong
        assert told in field.message.value and names(runs) == before
    field.control.value = "lr < 2e-3"
    assert field.message.value == "" and names(runs) == ["run-00"]


def test_ticks_last_from_page_to_page_and_overlay_curves(many):
    runs = Runs(many)
    runs.table.choice.sort.value, runs.table.choice.falling.value = "lr", False
    tick(runs, "run-00")
    one = runs.curves.picture.value
    runs.table.choice.page.value = 2
    assert not any(box.value for box in runs.table.page.boxes)
    tick(runs, "run-25")
    assert one[:4] == b"\x89PNG" and runs.curves.picture.value not in (one, b"")
    assert "0.026" in runs.differences.value and "batch_size" not in runs.differences.value
    runs.curves.metric.control.value = "train_loss"
    runs.table.choice.page.value = 1
    assert [box.value for box in runs.table.page.boxes].index(True) == 0
    (many / "Digits-DigitsNet" / "train" / "ddp" / "run-25" / "metrics.csv").unlink()
    tick(runs, "run-01")
    assert "run-25 has no metrics.csv" in runs.curves.note.value and runs.curves.picture.value


def test_differences_of_source_are_those_that_the_runs_have_kept(root):
    folder = root / "Digits-DigitsNet" / "train" / "ddp"
    for name, value in (("run-00", "a" * 12), ("run-01", "b" * 12)):
        record = RunRecord.read(folder / name)
        record.sources = {"nets.py:Net": value, "nets.py:Data": "c" * 12}
        record.write()
    text = Runs(root, ticked=[folder / "run-00", folder / "run-01"]).differences.value
    assert "nets.py:Net" in text and "a" * 12 in text and "b" * 12 in text and "nets.py:Data" not in text


def test_a_ticked_run_leads_to_its_notebook(root):
    folder = root / "Digits-DigitsNet" / "train" / "ddp" / "run-00"
    write_notebook(folder / "train.ipynb", "lr = 1")
    record = RunRecord.read(folder)
    record.notebook = "train.ipynb"
    record.write()
    (output,) = Runs(root, ticked=[folder]).notebooks.outputs
    assert f'href="{os.path.relpath(folder)}/train.ipynb"' in output["data"]["text/html"]


def test_a_ticked_run_lies_below_the_root(root, tmp_path):
    write_run(tmp_path / "other")
    with pytest.raises(ValueError, match="leads out of"):
        Runs(root, ticked=[tmp_path / "other"])


def checkpoints(root: Path) -> list[str]:
    return sorted(path.name for path in root.rglob("*.ckpt"))


def test_checkpoints_are_deleted_after_a_question_and_only_those_asked_about(root):
    runs = Runs(root)
    runs.table.choice.sort.value, runs.table.choice.falling.value = "lr", False
    tick(runs, "run-00", "run-01")
    everything, deletion = checkpoints(root), runs.deletion
    deletion.yes.click()
    assert checkpoints(root) == everything  # nothing was asked
    deletion.button.click()
    assert "Delete these 2 checkpoints" in deletion.question.control.value and checkpoints(root) == everything
    tick(runs, "run-02")
    assert deletion.question.control.value == "" and deletion.asked is None  # the question was about others
    deletion.button.click()
    deletion.no.click()
    deletion.yes.click()
    assert checkpoints(root) == everything
    deletion.button.click()
    deletion.yes.click()
    assert len(checkpoints(root)) == len(everything) - 3 and "3 checkpoints are deleted" in deletion.question.control.value
    assert all((Path(run) / "checkpoints" / "epoch=0.ckpt").exists() for run in runs.table.page.shown)


def test_a_run_that_trains_or_is_in_use_keeps_its_checkpoints(root):
    folder = root / "Digits-DigitsNet" / "train" / "ddp"
    runs = Runs(root, ticked=[folder / "trains"])
    runs.deletion.button.click()
    assert "Nothing to delete" in runs.deletion.question.control.value
    runs = Runs(root, ticked=[folder / "run-03"])
    runs.deletion.button.click()
    with hold(folder / "run-03", "It is used", "Wait."):  # which is about to continue it
        assert find_holder(folder / "run-03")
        runs.deletion.yes.click()
        assert "is in use by" in runs.deletion.question.control.value
    assert len(list((folder / "run-03").rglob("*.ckpt"))) == 2


def test_nothing_outside_the_root_is_deleted_or_linked(root, tmp_path):
    outside = tmp_path / "outside"
    write_run(outside, notebook="secret.ipynb")
    (outside / "secret.ipynb").write_text("{}")
    folder = root / "Digits-DigitsNet" / "train" / "ddp"
    (folder / "link").symlink_to(outside)  # a run by a link
    linked = write_run(folder / "with-link", notebook="../../../../../outside/secret.ipynb")
    for path in (linked.folder / "checkpoints").iterdir():
        path.unlink()
    (linked.folder / "checkpoints").rmdir()
    (linked.folder / "checkpoints").symlink_to(outside / "checkpoints")
    runs = Runs(root, where="lr == 1e-3", ticked=[linked.folder])
    assert "link" not in names(runs) and "secret" not in shown(runs)
    runs.deletion.button.click()
    assert "a link leads there" in runs.deletion.question.control.value
    runs.deletion.yes.click()
    assert len(checkpoints(outside)) == 2


class Tags(HTMLParser):
    "What a page would make of HTML."

    def __init__(self, text: str):
        super().__init__()
        self.found = set()
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.found |= {(tag, name) for name, _ in attributes} | {(tag, "")}
        for name, value in attributes:
            assert name != "src" or value.startswith("data:image/png;base64,")
            assert name != "href" or ":" not in value


HARMLESS = {"table", "tr", "th", "td", "div", "b", "br", "code", "a", "img"}
ATTRIBUTES = {"", "style", "scope", "role", "href", "target", "rel", "alt", "src"}


def assert_harmless(text: str) -> None:
    found = Tags(text).found
    assert {tag for tag, _ in found} <= HARMLESS and {name for _, name in found} <= ATTRIBUTES, found
    assert "alert(1)" in text  # it is there, as text


def test_what_others_have_written_is_text(tmp_path):
    root = tmp_path / "runs"
    name = HOSTILE.replace("/", "")
    settings = {"tags": [HOSTILE], "name": HOSTILE, HOSTILE: HOSTILE, "model_args": {HOSTILE: HOSTILE}}
    for number in range(2):
        record = write_run(root / f"{number}{name}", notebook=f"{name}.ipynb", error=HOSTILE, settings=settings | {"lr": number + 1.0})
        (record.folder / record.notebook).write_text("{}")
        record.sources = {HOSTILE: f"{number}{HOSTILE}"}
        record.metrics = {HOSTILE: 0.5}
        record.write()
        (record.folder / "metrics.csv").write_text(f'step,"{HOSTILE.replace(chr(34), chr(34) * 2)}"\n0,1\n1,2\n')
    (root / f"broken{name}").mkdir()
    (root / f"broken{name}" / "run.json").write_text(HOSTILE)
    runs = Runs(root, columns=["status", "tags", "name", HOSTILE])
    for box in runs.table.page.boxes[:2]:
        box.value = True
    runs.deletion.button.click()
    assert runs.curves.picture.value and HOSTILE in runs.curves.metric.control.options
    runs.table.choice.where.control.value = HOSTILE
    assert_harmless(shown(runs))
    card = TrainingCard(root / f"0{name}")
    assert card.curves.value
    assert_harmless(shown(card))


@pytest.mark.timeout(300)
def test_five_hundred_runs_answer_in_a_second(tmp_path):
    settings, root = settings_of_a_run(), tmp_path / "runs"
    record = RunRecord(folder=root, status="finished", started=now(), settings=settings, metrics={"val_loss": 0.5})
    for number in range(500):
        record.settings["lr"], folder = 1e-4 * (number + 1), root / "Digits-DigitsNet" / "train" / "ddp" / f"run-{number}"
        folder.mkdir(parents=True)
        (folder / "run.json").write_text(record.model_dump_json(exclude={"folder"}))
    Runs(root)  # pandas is imported
    times = {}

    def timed(name: str, do) -> None:
        began = time.process_time()  # of this process: what else the machine does is not its matter
        do()
        times[name] = time.process_time() - began

    timed("open", lambda: Runs(root))
    runs = Runs(root)
    choice = runs.table.choice
    timed("filter", lambda: setattr(choice.where.control, "value", "lr < 0.03 and status == 'finished'"))
    timed("sort", lambda: setattr(choice.sort, "value", "lr"))
    timed("page", lambda: setattr(choice.page, "value", 9))
    timed("tick", lambda: setattr(runs.table.page.boxes[0], "value", True))
    assert len(runs.table.runs.table) == 299 and all(seconds < 1 for seconds in times.values()), times
    assert max(times["filter"], times["sort"], times["page"]) < times["open"], times


@pytest.fixture
def search(tmp_path):
    "A search whose trials are of a function, and its record."
    config = RunConfig(**TASK, root=str(tmp_path / "runs"))
    plan = plan_search(config, StudyConfig(search_space={"lr": {"low": 1e-4, "high": 1e-1, "log": True}, "seed": [0, 1]}, n_trials=5))
    queue = open_study(plan)
    study = optuna.load_study(study_name=plan.name, storage=queue.storage)
    study.optimize(lambda trial: draw(plan.space, trial)["lr"], n_trials=3)
    write_best(plan, queue.all())
    record = RunRecord(folder=plan.folder, mode="tune", status="stopped", started=now(), settings=config.model_dump())
    record.resolved = {"study": plan.name, "n_trials": 5}
    record.write()
    return plan, queue, study, record


def test_a_study_is_followed_while_it_runs(search):
    plan, queue, study, record = search
    view = Study(plan.folder)
    assert "3 of 5" in view.summary.value and not view.look()
    for name in ("status", "host", "machine", "pid", "pid_began"):
        values = {"status": "running", "pid_began": Process.this().began} | {
            name: getattr(Process.this(), name, None) for name in ("host", "machine", "pid")
        }
        setattr(record, name, values[name])
    record.write()
    trial, before = study.ask(plan.space), view.pictures.picture.value
    assert view.look() and "1 running" in view.summary.value and "RUNNING" in view.trials.rows.value
    trial.report(0.5, 1)
    study.tell(trial, 1e-5)
    assert view.look() and "4 of 5" in view.summary.value and view.pictures.picture.value != before


def test_a_trial_of_ones_own_is_the_next_that_a_worker_takes(search):
    plan, queue, study, _ = search
    view = Study(plan.folder)
    fields, button, result = view.enqueue.form.fields, view.enqueue.button.control, view.enqueue.result
    for wrong, told in [("1", "must be from 0.0001 to 0.1"), ("fast", "must be a number"), ("[", "neither JSON nor YAML")]:
        fields["lr"].control.value = wrong
        button.click()
        assert told in fields["lr"].message.value and result.value == "" and len(study.trials) == 3
    fields["lr"].control.value, fields["seed"].control.value = "0.02", (1,)
    button.click()
    assert fields["lr"].message.value == "" and "Trial 3 waits" in result.value and "WAITING" in view.trials.rows.value
    row = queue.claim()
    taken = optuna.trial.Trial(optuna.load_study(study_name=plan.name, storage=queue.storage), row._trial_id)
    assert draw(plan.space, taken) == {"lr": 0.02, "seed": 1}
    for number in (4, 5):
        button.click()
    assert "-p n_trials 6" in result.value


def test_the_best_parameters_become_a_command(search):
    plan, _, study, _ = search
    view = Studies(plan.config.root).study
    assert f"-p best_params {plan.folder / 'best_params.json'}" in view.training.command.value
    assert "-p model dlnb.examples:DigitsNet" in view.training.command.value and not view.training.button.disabled
    (plan.folder / "best_params.json").unlink()
    view.again.click()
    assert view.training.button.disabled and "no best parameters" in view.training.command.value


def test_train_here_uses_the_root_of_the_search_from_any_directory(tmp_path, monkeypatch):
    "The search was started beside the root, which it has recorded as `runs`; the page is in nbs."
    monkeypatch.chdir(tmp_path)
    plan = plan_search(RunConfig(**TASK), StudyConfig(search_space={"lr": {"low": 1e-4, "high": 1e-1}}, n_trials=1))
    queue = open_study(plan)
    optuna.load_study(study_name=plan.name, storage=queue.storage).optimize(lambda trial: draw(plan.space, trial)["lr"], n_trials=1)
    write_best(plan, queue.all())
    record = RunRecord(folder=plan.folder, mode="tune", status="finished", started=now(), settings=plan.config.model_dump())
    record.resolved = {"study": plan.name, "n_trials": 1}
    record.write()
    workflow = tmp_path / "nbs" / "workflows" / "train.ipynb"
    workflow.parent.mkdir(parents=True)
    workflow.touch()
    assert "papermill nbs/workflows/train.ipynb out.ipynb" in Study(plan.folder).training.command.value
    assert "root" not in Study(plan.folder).training.command.value
    monkeypatch.chdir(tmp_path / "nbs")
    view = Studies("../runs").study
    assert "papermill workflows/train.ipynb out.ipynb" in view.training.command.value
    settings = training_settings(view.search)
    assert Path(settings["root"]).resolve() == tmp_path / "runs" and Path(settings["best_params"]).is_file()


def test_a_study_of_hostile_names_is_text(tmp_path):
    folder = tmp_path / "runs" / "study"
    record = RunRecord(
        folder=folder, mode="tune", status="failed", error=HOSTILE, settings={"monitor": HOSTILE}, resolved={"study": HOSTILE}
    )
    record.write()
    from dlnb.search.storage import open_storage

    study = optuna.create_study(study_name=HOSTILE, storage=open_storage(None, folder))
    study.set_user_attr("dlnb", {"space": {HOSTILE: [HOSTILE, 1]}})
    for number in range(3):
        trial = study.ask({HOSTILE: optuna.distributions.CategoricalDistribution([HOSTILE, 1])})
        study.tell(trial, float(number))
    view = Study(folder)
    for name in view.pictures.choice.control.options:
        view.pictures.choice.control.value = name
        assert view.pictures.picture.value or "cannot be drawn" in view.pictures.choice.message.value
    view.enqueue.button.control.click()
    assert_harmless(shown(view))


def test_a_card_follows_a_training(tmp_path):
    record = write_run(tmp_path / "run", rows=10, status="running", resolved={"total_steps": 40, "global_batch_size": 64})
    card = TrainingCard(record.folder)
    began, first = (record.folder / "metrics.csv").stat().st_mtime, card.curves.value
    lines = [f"{step},1,2" for step in range(30)]
    (record.folder / "metrics.csv").write_text("\n".join(["step,train_loss,val_loss", *lines, ""]))
    os.utime(record.folder / "metrics.csv", (began + 10, began + 10))
    assert card.look() and card.curves.value != first and card.bar.value == 0.75
    for text in ("30 of 40", "2 steps/s, 128 samples/s", "ends in", "5 s", "rank 0", "val_loss 0.5", "checkpoints/epoch=0.ckpt"):
        assert text in card.table.value, text
    record.status, record.ended = "finished", now()
    record.write()
    assert not card.look() and "ends in" not in card.table.value and card.bar.bar_style == "success"


class AskedKernel(Kernel):
    "A kernel, asked as a front end asks, or as papermill does."

    def displayed(self, code: str, stdin: bool, wait_for: str = "display_data") -> dict:
        "The data of the first message of a type."
        self.start(code, allow_stdin=stdin)
        return self.message(wait_for)["content"]["data"]

    def message(self, kind: str, within: float = 60) -> dict:
        deadline = time.monotonic() + within
        while time.monotonic() < deadline:
            message = self.client.get_iopub_msg(timeout=within)
            assert message["msg_type"] != "error", message["content"]
            if message["msg_type"] == kind:
                return message
        raise AssertionError(f"no {kind} in {within} s")


@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    kernel = AskedKernel(tmp_path_factory.mktemp("kernel"))
    yield kernel
    kernel.kill()


WIDGET = "application/vnd.jupyter.widget-view+json"


@pytest.mark.timeout(300)
def test_papermill_gets_pictures_and_tables_and_a_page_the_widget_beside_them(kernel, root):
    code = f"from dlnb.widgets.runs import Runs; Runs({str(root)!r}, where='lr < 3e-3')"
    for stdin in (False, True):
        data = kernel.displayed(code, stdin)
        assert (WIDGET in data) == stdin and "2 of 5 runs" in data["text/html"] and "run-01" in data["text/html"]


@pytest.mark.timeout(300)
def test_a_card_is_brought_up_to_date_in_the_file_when_the_training_ends(kernel, tmp_path):
    record = write_run(tmp_path / "run", status="running")
    code = f"from dlnb.views.training_card import TrainingCard; TrainingCard({str(record.folder)!r}, every=0.2)"
    data = kernel.displayed(code, stdin=True)
    assert WIDGET in data and "running" in data["text/html"]
    record.status, record.ended = "failed", now()
    record.write()
    assert "failed" in kernel.message("update_display_data")["content"]["data"]["text/html"]


@pytest.mark.soak
@pytest.mark.timeout(300)
def test_a_real_run_is_trained_tested_and_searched_from_the_page(tmp_path):
    from dlnb.trainer import fit
    from dlnb.tuner import tune

    root = str(tmp_path / "runs")
    record = fit(RunConfig(**TASK, max_epochs=1, root=root))
    runs = Runs(root, ticked=[record.folder])
    runs.test.button.click()
    assert "test_acc" in runs.test.result.value, runs.test.result.value
    assert len(runs.table.page.shown) == 2
    study = StudyConfig(search_space={"lr": {"low": 1e-4, "high": 1e-2, "log": True}}, n_trials=1)
    config = RunConfig(**TASK, max_epochs=1, root=root)
    tune(config, study)
    view = Studies(root).study
    view.enqueue.form.fields["lr"].control.value = "0.005"
    view.enqueue.button.control.click()
    assert "-p n_trials 2" in view.enqueue.result.value
    assert tune(config, study.model_copy(update={"n_trials": 2})).trials[1].params == {"lr": 0.005}
    view.again.click()
    assert "2 of 2" in view.summary.value
    view.training.button.click()
    assert "val_acc" in view.training.result.value, view.training.result.value


def test_the_test_button_reports_what_is_wrong(root):
    runs = Runs(root)
    runs.test.button.click()
    assert "Tick the one run" in runs.test.result.value
    folder = root / "Digits-DigitsNet" / "train" / "ddp" / "run-00"
    (folder / "checkpoints" / "epoch=0.ckpt").unlink()
    runs = Runs(root, ticked=[folder])
    runs.test.button.click()
    assert 'role="alert"' in runs.test.result.value and not runs.test.button.disabled
