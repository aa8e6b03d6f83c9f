"""One bad record, folder or metrics.csv is a sentence with its path; all the others are listed, compared and pruned."""

import json
import os
import shutil
import tempfile
import threading
import warnings
from contextlib import contextmanager
from pathlib import Path

import pytest

from dlnb.track import RunRecord, best, compare, plot_metrics, plot_runs, prune, read_metrics, runs
from dlnb.tracking.catalogue import _record_folders, find_records

SETTINGS = {"model": "nets:Net", "data": "nets:Data", "lr": 0.1, "monitor": "val_loss", "monitor_mode": "min", "tags": ["a"]}
SETTINGS |= {"strategy": "auto", "model_args": {"width": 8}, "data_args": {}}


def good(root: Path, name: str = "good", score: float = 0.5, **more) -> RunRecord:
    "A finished training with its best checkpoint and another."
    made = dict(settings=SETTINGS, status="finished", metrics={"val_loss": score}, best_score=score) | more
    record = RunRecord(folder=root / name, **{"best_checkpoint": "checkpoints/best.ckpt", "started": "2026-11-24T10:00:00+00:00"} | made)
    record.write()
    (record.folder / "checkpoints").mkdir()
    for file in ("best.ckpt", "last.ckpt"):
        (record.folder / "checkpoints" / file).write_text("weights")
    return record


def with_settings(**settings) -> str:
    return json.dumps({"mode": "train", "status": "finished", "settings": SETTINGS | settings})


RECORDS = {  # name: (what run.json holds, what the warning says)
    "nothing": ("", "is damaged"),
    "half a record": ('{"status": "fini', "is damaged"),
    "a list": ("[]", "is damaged"),
    "a number": ("3", "is damaged"),
    "null": ("null", "is damaged"),
    "a text": ('"finished"', "is damaged"),
    "NUL bytes": ("\0" * 100, "is damaged"),
    "another encoding": ('{"error": "Schlüssel"}'.encode("latin-1"), "utf-8"),
    "UTF-16": ('{"status": "finished"}'.encode("utf-16"), "utf-8"),
    "a pickle": (b"\x80\x04\x95\x0b\x00\x00\x00", "utf-8"),
    "deep lists": ('{"settings": {"a": ' + "[" * 100_000 + "]" * 100_000 + "}}", "nested too deep"),
    "deep dictionaries": ('{"a": ' * 50_000 + "1" + "}" * 50_000, "nested too deep"),
    "34 MB": ('{"error": "' + "x" * 34_000_000 + '"}', "more than 33,554,432 bytes"),
    "a number of many digits": ('{"step": ' + "9" * 5000 + "}", "is damaged"),
    "two records": ("{}{}", "is damaged"),
    "its own folder": ('{"folder": "/etc"}', "is damaged"),
    "an unknown status": ('{"status": "asleep"}', "status"),
    "an unknown mode": ('{"mode": "dance"}', "mode"),
    "status null": ('{"status": null}', "status"),
    "settings null": ('{"settings": null}', "settings: Input should be a valid dictionary"),
    "settings a list": ('{"settings": []}', "settings: Input should be a valid dictionary"),
    "resolved null": ('{"resolved": null}', "resolved: Input should be a valid dictionary"),
    "metrics null": ('{"metrics": null}', "metrics: Input should be a valid dictionary"),
    "a metric that is text": ('{"metrics": {"val_loss": "low"}}', "metrics.val_loss"),
    "a metric that is a list": ('{"metrics": {"val_loss": [1]}}', "metrics.val_loss"),
    "a score that is text": ('{"best_score": "good"}', "best_score"),
    "epoch a text": ('{"epoch": "many"}', "epoch"),
    "epoch infinite": ('{"epoch": 1e999}', "epoch"),
    "earlier a number": ('{"earlier": 3}', "earlier"),
    "wandb a text": ('{"wandb": "on"}', "wandb"),
    "half a surrogate in a setting": (with_settings(note="\ud800"), "surrogates not allowed"),
    "half a surrogate in a name": (with_settings(**{"\ud800": 1}), "surrogates not allowed"),
    "tags null": (with_settings(tags=None), "settings.tags is None"),
    "tags a text": (with_settings(tags="a,b"), "settings.tags is a,b"),
    "tags of numbers": (with_settings(tags=[1]), "sequence item 0"),
    "model a number": (with_settings(model=5), "settings.model is 5"),
    "data null": (with_settings(data=None), "settings.data is None"),
    "model_args a list": (with_settings(model_args=[1]), "settings.model_args is [1]"),
    "model_args null": (with_settings(model_args=None), "settings.model_args is None"),
    "data_args a text": (with_settings(data_args="x"), "settings.data_args is x"),
}


def a_folder(path: Path):
    path.mkdir()


def a_pipe(path: Path):
    os.mkfifo(path)


def a_link_to_itself(path: Path):
    path.symlink_to(path)


def a_link_to_nothing(path: Path):
    path.symlink_to(path.with_name("nothing"))


def a_link_to_a_device(path: Path):
    path.symlink_to("/dev/zero")


def a_link_to_a_pipe(path: Path):
    os.mkfifo(path.with_name("pipe"))
    path.symlink_to("pipe")


# Whatever Python frees meanwhile may be an open file that an earlier test has left.
UNWARNED = pytest.mark.filterwarnings("error", "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
PLACES = {
    a_folder: "Is a directory", a_pipe: "is not a regular file", a_link_to_itself: "cannot be read", a_link_to_nothing: "has no run.json",
    a_link_to_a_device: "is not a regular file", a_link_to_a_pipe: "is not a regular file",
}  # fmt: skip


def check_that_the_others_are_served(root: Path, bad: Path, told: str) -> None:
    "One warning that names the bad one, by each of what reads all."
    for search in (runs, best, prune, find_records):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            found = search(root)
        (message,) = [str(one.message) for one in caught]
        assert str(bad) in message and told in message and len(message) < 500, message
        if search is best:
            assert found == root / "good"
        elif search is prune:
            assert found["checkpoint"].tolist() == ["last.ckpt"]
        else:
            assert len(found) == 1


@pytest.mark.parametrize("content, told", RECORDS.values(), ids=RECORDS)
def test_a_bad_record_is_one_warning_and_the_others_are_served(tmp_path, content, told):
    good(tmp_path)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "run.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    check_that_the_others_are_served(tmp_path, tmp_path / "bad", told)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("make, told", PLACES.items(), ids=lambda value: getattr(value, "__name__", ""))
def test_a_record_that_is_no_file_is_one_warning_and_holds_nothing_up(tmp_path, make, told):
    good(tmp_path)
    (tmp_path / "bad").mkdir()
    make(tmp_path / "bad" / "run.json")
    check_that_the_others_are_served(tmp_path, tmp_path / "bad", told)


@contextmanager
def as_nobody():
    "Without the right to read everything, which root has."
    if os.geteuid():
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def open_root():
    "A folder that everybody may read, and write."
    root = Path(tempfile.mkdtemp())
    good(root)
    yield root
    for folder, *_ in os.walk(root):
        os.chmod(folder, 0o755)
    shutil.rmtree(root)


def open_to_all(root: Path) -> None:
    for folder, _, files in os.walk(root):
        os.chmod(folder, 0o777)
        for file in files:
            os.chmod(Path(folder) / file, 0o666)


@pytest.mark.parametrize("closed, told", [("bad", "Permission denied"), ("bad/run.json", "Permission denied")])
def test_what_may_not_be_read_is_one_warning(open_root, closed, told):
    good(open_root, "bad")
    open_to_all(open_root)
    os.chmod(open_root / closed, 0)
    with as_nobody():
        check_that_the_others_are_served(open_root, open_root / "bad", told)


def test_a_checkpoint_that_cannot_be_deleted_does_not_stop_the_others(open_root):
    good(open_root, "bad", score=0.6)
    open_to_all(open_root)
    os.chmod(open_root / "bad" / "checkpoints", 0o555)
    with as_nobody(), pytest.warns(UserWarning, match="bad/checkpoints/last.ckpt is not deleted"):
        assert prune(open_root, delete=True)["run"].tolist() == [str(open_root / "good")]
    assert sorted(path.name for path in open_root.rglob("*.ckpt")) == ["best.ckpt", "best.ckpt", "last.ckpt"]


def test_a_folder_that_vanishes_while_it_is_looked_at_is_left_out(tmp_path):
    for name in "abc":
        good(tmp_path, name)
    folders = _record_folders(tmp_path)
    assert next(folders) == tmp_path / "a"
    shutil.rmtree(tmp_path / "b")
    with pytest.warns(UserWarning, match="b is left out of the catalogue: No such file"):
        assert list(folders) == [tmp_path / "c"]


@pytest.mark.filterwarnings("ignore:.*left out of the catalogue")
def test_runs_that_come_and_go_leave_the_others_listed(tmp_path):
    good(tmp_path)
    stop = threading.Event()

    def come_and_go():
        while not stop.is_set():
            good(tmp_path, "passing/deep", mode="test")
            shutil.rmtree(tmp_path / "passing")

    thread = threading.Thread(target=come_and_go)
    thread.start()
    try:
        for _ in range(30):
            assert str(tmp_path / "good") in runs(tmp_path)["run"].tolist() and best(tmp_path) == tmp_path / "good"
    finally:
        stop.set()
        thread.join()


@UNWARNED
def test_files_links_and_deep_folders_beside_the_runs_are_passed_over(tmp_path):
    good(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "itself").symlink_to("itself")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "run.json").touch()
    (tmp_path / ("n" * 255)).mkdir()
    assert runs(tmp_path)["run"].tolist() == [str(tmp_path / "good")]


def test_folders_without_an_end_are_one_warning(tmp_path):
    good(tmp_path)
    (tmp_path / "/".join(["deep"] * 300)).mkdir(parents=True)
    check_that_the_others_are_served(tmp_path, tmp_path / "deep", "40 folders are nested")


def test_a_folder_whose_name_is_no_unicode_is_one_warning(tmp_path):
    good(tmp_path)
    bad = Path(os.fsdecode(os.fsencode(tmp_path / "bad") + b"\xff"))
    shutil.copytree(tmp_path / "good", bad)
    check_that_the_others_are_served(tmp_path, bad, "surrogates not allowed")


@pytest.mark.parametrize("content", ["{}", "", "[]", json.dumps({"status": "finished", "settings": SETTINGS, "best_score": 0.1})])
@pytest.mark.parametrize("place", [".", "Data-Net", "Data-Net/train/ddp"])
def test_a_stray_record_hides_no_run_below_it(tmp_path, place, content):
    good(tmp_path / "Data-Net/train/ddp")
    (tmp_path / place / "run.json").write_text(content)
    with pytest.warns(UserWarning) as caught:
        assert best(tmp_path) == tmp_path / "Data-Net/train/ddp/good"
        assert len(runs(tmp_path)) == 1
    assert all(str(tmp_path / place / "run.json") in str(one.message) for one in caught) and len(caught) == 2


def test_a_run_that_another_was_trained_in_is_listed_with_it(tmp_path):
    good(tmp_path, "outer")
    good(tmp_path / "outer" / "runs", "inner")
    good(tmp_path / "outer" / "trials", "of-a-study")
    assert [Path(run).name for run in runs(tmp_path)["run"]] == ["outer", "inner"]


def test_names_of_the_catalogue_stay_its_own(tmp_path):
    named = ["run", "task", "mode", "status", "started", "ended", "epoch", "step", "best_score", "tags", "monitor", "strategy", "lr"]
    metrics = {name: float(number) for number, name in enumerate(named)}
    settings = SETTINGS | {"model_args": {name: -1 for name in [*named, "val_loss", "width"]}, "status": "asleep", "step": 99}
    good(tmp_path, "odd", step=7, epoch=2, settings=settings, metrics=metrics | {"val_loss": 0.3}, best_score=0.3)
    good(tmp_path, "plain", step=8)
    table = runs(tmp_path)
    assert table["status"].tolist() == ["finished"] * 2 and table["step"].tolist() == [7, 8] and table["lr"].tolist() == [0.1, 0.1]
    for number, name in enumerate(named):
        assert table[f"metrics.{name}"].tolist()[0] == number and table[f"model_args.{name}"].tolist()[0] == -1
    assert (table["settings.status"][0], table["settings.step"][0], table["model_args.val_loss"][0]) == ("asleep", 99, -1)
    assert len(runs(tmp_path, where="metrics.step == 7 and step == 7 and status == 'finished'")) == 1
    assert best(tmp_path) == tmp_path / "odd" and len(prune(tmp_path)) == 2


def test_a_full_name_leads_to_a_column_whatever_the_other_runs_log(tmp_path):
    good(tmp_path, "a")
    assert len(runs(tmp_path, where="model_args.width == 8 and metrics.val_loss < 1", sort="-model_args.width")) == 1
    good(tmp_path, "b", metrics={"width": 3.0})
    assert len(runs(tmp_path, where="model_args.width == 8")) == 2 and runs(tmp_path, where="width == 3")["run"].size == 1


@UNWARNED
def test_records_that_are_odd_and_right_are_listed(tmp_path):
    good(tmp_path, "good")
    for name, more in {
        "null": dict(metrics={"val_loss": None}, best_score=None),
        "nan": dict(metrics={"val_loss": float("nan")}, best_score=float("nan")),
        "infinite": dict(best_score=float("-inf")),
        "unmonitored": dict(settings=SETTINGS | {"monitor": None}),
        "sideways": dict(settings=SETTINGS | {"monitor_mode": "sideways"}),
        "bare": dict(settings={}, best_score=0.1),
        "huge": dict(settings=SETTINGS | {"lr": 10**400, "model_args": {"width": "wide"}}),
        "a day": dict(started="2026-11-24"),
        "no date": dict(started="yesterday" * 100),
    }.items():
        good(tmp_path, name, **{"best_score": 0.9} | more)
    table = runs(tmp_path).assign(name=lambda table: table["run"].map(lambda run: Path(run).name)).set_index("name")
    assert len(table) == 10 and best(tmp_path).name == "good"
    assert table["started"].notna().sum() == 9 and str(table["started"]["good"]) == "2026-11-24 10:00:00"
    assert len(runs(tmp_path, where="val_loss == None")) == 2 and len(runs(tmp_path, where="lr > 1")) == 1
    assert len(compare(*table["run"]).columns) == 10 and len(runs(tmp_path, sort="lr")) == 10


def test_no_run_with_a_score_is_a_sentence(tmp_path):
    good(tmp_path, "bare", settings={})
    with pytest.raises(ValueError, match="has a best score"):
        best(tmp_path)


def test_compare_names_the_bad_one(tmp_path):
    good(tmp_path)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "run.json").write_text(with_settings(tags=None))
    with pytest.raises(ValueError, match="bad/run.json is damaged: settings.tags is None"):
        compare(tmp_path / "good", tmp_path / "bad")


KEPT = {  # what a record names as its best checkpoint
    "one outside": "../precious.ckpt",
    "one outside by a way inside": "checkpoints/../../precious.ckpt",
    "an absolute one": "/etc/passwd",
    "the folder itself": "checkpoints",
    "the folder above": "checkpoints/..",
    "one that is gone": "checkpoints/gone.ckpt",
    "one below": "checkpoints/best.ckpt/inner.ckpt",
    "nothing": ".",
    "no checkpoint": "run.json",
    "a NUL byte": "checkpoints/\0.ckpt",
}


@pytest.mark.parametrize("name", KEPT.values(), ids=KEPT)
def test_prune_leaves_a_run_alone_whose_best_checkpoint_is_not_there(tmp_path, name):
    good(tmp_path)
    odd = good(tmp_path, "odd", best_checkpoint=name)
    (tmp_path / "precious.ckpt").touch()
    with pytest.warns(UserWarning, match="odd is not pruned: its record names"):
        assert prune(tmp_path, delete=True)["run"].tolist() == [str(tmp_path / "good")]
    assert len(list((odd.folder / "checkpoints").iterdir())) == 2 and (tmp_path / "precious.ckpt").exists()


def test_prune_deletes_nothing_to_which_a_link_leads(tmp_path):
    outside = tmp_path / "outside"
    (outside / "a.ckpt").mkdir(parents=True)
    (outside / "a.ckpt" / "shard").write_text("weights")
    one, other = good(tmp_path / "runs", "one"), good(tmp_path / "runs", "other")
    (one.folder / "checkpoints" / "link.ckpt").symlink_to(outside / "a.ckpt")
    shutil.rmtree(other.folder / "checkpoints")
    (outside / "best.ckpt").touch()
    (other.folder / "checkpoints").symlink_to(outside)
    with pytest.warns(UserWarning, match="other is not pruned: its checkpoints are in another place"):
        assert prune(tmp_path / "runs", delete=True)["checkpoint"].tolist() == ["last.ckpt", "link.ckpt"]
    assert (outside / "a.ckpt" / "shard").exists() and (outside / "best.ckpt").exists()
    assert [path.name for path in (one.folder / "checkpoints").iterdir()] == ["best.ckpt"]


def test_prune_keeps_what_the_best_checkpoint_is_a_link_to(tmp_path):
    record = good(tmp_path)
    (record.folder / "checkpoints" / "best.ckpt").unlink()
    (record.folder / "checkpoints" / "best.ckpt").symlink_to("last.ckpt")
    assert prune(tmp_path, delete=True).empty and (record.folder / "checkpoints" / "best.ckpt").read_text() == "weights"


CURVES = {  # what metrics.csv holds, and what is said
    "nothing": (b"", "is damaged"),
    "blank lines": (b"\n\n\n", "is damaged"),
    "NUL bytes": (b"epoch,step,val_loss\n0,1,0.5\n" + b"\0" * 64, "NUL bytes"),
    "no step": (b"epoch,val_loss\n0,1\n", "no column step, but epoch, val_loss"),
    "steps of text": (b"step,val_loss\n1,0.5\nstep,val_loss\n", "is damaged"),
    "a longer line": (b"step,val_loss\n1,0.5\n2,0.4,0.3,9\n", "is damaged"),
    "another encoding": (b"step,val_loss\n1,\xff\n", "is damaged"),
    "metrics of text": (b"step,val_loss\n1,low\n", "holds what is not a number"),
}


@pytest.mark.parametrize("content, told", CURVES.values(), ids=CURVES)
@pytest.mark.parametrize("look", [read_metrics, plot_metrics, plot_runs], ids=lambda look: look.__name__)
def test_a_damaged_metrics_file_is_a_sentence(tmp_path, look, content, told):
    record = good(tmp_path)
    (record.folder / "metrics.csv").write_bytes(content)
    if look is read_metrics and told == "holds what is not a number":
        assert look(record.folder)["val_loss"].tolist() == ["low"]
        return
    with pytest.raises(ValueError, match="metrics.csv is damaged") as error:
        look(record.folder)
    assert told in str(error.value) and len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("cut", ["2", "2,", "2,0.", "2,0.4,", "2,0.4,0.1", ""])
def test_a_line_that_a_kill_has_cut_is_left_out(tmp_path, cut):
    record = good(tmp_path)
    (record.folder / "metrics.csv").write_text("step,val_loss,val_acc\n1,0.5,0.6\n" + cut)
    assert len(read_metrics(record.folder)) == (2 if cut.count(",") == 2 else 1)
    assert len(plot_metrics(record.folder).axes) == 2


def test_curves_of_nothing_are_a_sentence(tmp_path):
    record = good(tmp_path)
    (record.folder / "metrics.csv").write_text("epoch,step\n0,1\n")
    for look, told in ((plot_metrics, "holds no metric"), (plot_runs, "is not known"), (lambda _: plot_runs(), "got none")):
        with pytest.raises(ValueError, match=told):
            look(record.folder)
