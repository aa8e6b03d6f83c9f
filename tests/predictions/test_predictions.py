"""Predictions of real ranks, killed ones among them, and merges of whatever the ranks may have written."""

import os
import re
import resource
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import reduce
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import REPOSITORY
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, IterableDataset
from warm import warm_python

from dlnb.predictions import arrow_file, merge, plots
from dlnb.predictions.arrow_file import part_file
from dlnb.predictions.columns import batch_table
from dlnb.predictions.merge import merge_predictions
from dlnb.predictions.types import common_type, list_type, variable
from dlnb.predictions.writer import PredictionWriter

pytestmark = [pytest.mark.timeout(500), pytest.mark.filterwarnings("ignore")]
QUIET = dict(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
LENGTH = 29  # divided neither by two ranks nor by three

SCRIPT = """
import sys, time
from collections import namedtuple
from pathlib import Path
import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset
from dlnb.data import DataModule
from dlnb.loading.stream import Share, StreamLoader
from dlnb.predictions.merge import merge_predictions
from dlnb.predictions.writer import PredictionWriter

devices, folder, is_first_attempt = int(sys.argv[1]), Path(sys.argv[2]), len(sys.argv) > 3

class Line(Dataset):
    def __init__(self, split="predict"): pass
    def __len__(self): return %(length)d
    def __getitem__(self, index): return torch.tensor([index, index / 4]), index %% 3

class Lines(IterableDataset):
    def __init__(self, length=%(length)d): self.length = length
    def __iter__(self): return (torch.tensor([index, index / 4]) for index in range(self.length))

Named = namedtuple("Named", "score halves")
RETURNS = {
    "tensor": lambda x: x,
    "bfloat16": lambda x: x[:, 1].bfloat16(),
    "nested": lambda x: x[:, :, None].expand(-1, 2, 3).half(),
    "dict": lambda x: {"score": x[:, 1], "name": [f"sample {int(i)}" for i in x[:, 0]]},
    "named": lambda x: Named(x[:, 1], x.half()),
    "tuple": lambda x: (x[:, 0].long(), [float(i) for i in x[:, 1]]),
    "text": lambda x: ["x" * int(i) for i in x[:, 0]],
    "detections": lambda x: [None if i %% 5 == 4 else {"boxes": x[:1].new_full((int(i) %% 4, 2), i), "file": f"{int(i)}.png"} for i in x[:, 0]],
    "ragged": lambda x: {"tags": {"all": [["a"] * (int(i) %% 3) for i in x[:, 0]], "none": None}, "flag": x[:, 0] > 3},
}
GATHERS = {
    "gathered": lambda model, x: model.all_gather(x),
    "gathered dict": lambda model, x: {"score": model.all_gather({"a": x[:, 1], "b": [x]}), "own": x[:, 1]},
    "gathered and joined": lambda model, x: model.all_gather(x).reshape(-1, 2).softmax(1),
}

class Model(pl.LightningModule):
    def __init__(self, returns): super().__init__(); self.returns = returns
    def predict_step(self, batch, batch_idx):
        if is_first_attempt and batch_idx == 2:
            (folder / f"waits-{self.global_rank}").touch()
            time.sleep(100)
        x = batch[0] if isinstance(batch, list) else batch
        return self.returns(self, x) if self.returns in GATHERS.values() else self.returns(x)

class OfTwo(Model):
    def predict_step(self, batch, batch_idx, dataloader_idx): return self.returns(batch[0]) * (1 + dataloader_idx)

class Streams(pl.LightningDataModule):
    def __init__(self, length=%(length)d): super().__init__(); self.length = length
    def predict_dataloader(self):
        ranks = dict(num_replicas=self.trainer.world_size, rank=self.trainer.global_rank)
        return StreamLoader(Share(Lines(self.length), 4 * ranks["num_replicas"], **ranks, drop_last=False), batch_size=4)

def predict(name, data, returns, num_samples, model=Model):
    trainer = pl.Trainer(accelerator="cpu", devices=devices, strategy="ddp" if devices > 1 else "auto", logger=False,
                         enable_progress_bar=False, callbacks=PredictionWriter(folder / name))
    trainer.predict(model(returns), data, return_predictions=False)
    trainer.strategy.barrier()
    if trainer.is_global_zero:
        merge_predictions(folder / name, num_samples)

for name, returns in {**RETURNS, **GATHERS}.items():
    workers = 2 if name == "tensor" else 0
    predict(name, DataModule(Line, batch_size=4, num_workers=workers), returns, %(length)d)
predict("lightning", DataLoader(Line(), batch_size=4, num_workers=1), RETURNS["tensor"], %(length)d)
predict("loaders", [DataLoader(Line(), batch_size=4), DataLoader(Line(), batch_size=3)], RETURNS["tensor"], [%(length)d] * 2, OfTwo)
predict("stream", Streams(), RETURNS["detections"], %(length)d)
predict("short end", Streams(25), GATHERS["gathered"], 25)  # one sample more than whole blocks of one, two or three ranks
try:
    predict("iterable", DataLoader(Lines(), batch_size=4), RETURNS["tensor"], %(length)d)
except ValueError as error:
    Path(folder, "refused").write_text(str(error))
"""


def start(python: str, folder: Path, *arguments) -> subprocess.Popen:
    "SCRIPT in processes of its own, which Lightning starts as it does for any script."
    script = folder / "script.py"
    script.write_text(SCRIPT % dict(length=LENGTH))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    return subprocess.Popen(
        [python, script, *map(str, arguments)],
        env=environment,
        cwd=folder,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def run_ranks(folder: Path, devices: int) -> Path:
    "The folder with a table of each prediction."
    process = start(warm_python(), folder, devices, folder)
    try:
        output, _ = process.communicate(timeout=100)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        pytest.fail(f"it hangs:\n{process.communicate()[0]}")
    assert process.returncode == 0, output
    return folder


def kill_amidst(folder: Path, devices: int) -> None:
    "Kill all ranks when each has predicted two batches."
    process = start(sys.executable, folder, devices, folder, "first attempt")
    try:
        deadline = time.monotonic() + 100
        while len(list(folder.glob("waits-*"))) < devices:
            assert process.poll() is None and time.monotonic() < deadline, "it did not come to predict"
            time.sleep(0.05)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate(timeout=20)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    "One rank, two, and three in the folder where two were killed, with what the killed had left there."
    one, two, three = (tmp_path_factory.mktemp(name) for name in ("one", "two", "three"))

    def after_a_kill():
        kill_amidst(three, 2)
        left = [path.relative_to(three).as_posix() for path in (three / "tensor").rglob("*") if path.is_file()]
        return run_ranks(three, 3), sorted(left)

    with ThreadPoolExecutor(2) as pool, pytest.MonkeyPatch.context() as patch:  # starting takes most of the time
        second, third = pool.submit(run_ranks, two, 2), pool.submit(after_a_kill)
        patch.setattr(sys, "argv", ["script.py", "1", str(one)])
        exec(SCRIPT % dict(length=LENGTH), {"__name__": "__main__"})
    return dict(one=one, two=second.result(), three=third.result()[0], left=third.result()[1])


EXPECTED = {
    "tensor": {"prediction": [[index, index / 4] for index in range(LENGTH)]},
    "bfloat16": {"prediction": [index / 4 for index in range(LENGTH)]},
    "nested": {"prediction": [[[index] * 3, [index / 4] * 3] for index in range(LENGTH)]},
    "dict": {"score": [i / 4 for i in range(LENGTH)], "name": [f"sample {i}" for i in range(LENGTH)]},
    "named": {"score": [i / 4 for i in range(LENGTH)], "halves": [[i, i / 4] for i in range(LENGTH)]},
    "tuple": {"prediction_0": list(range(LENGTH)), "prediction_1": [i / 4 for i in range(LENGTH)]},
    "text": {"prediction": ["x" * index for index in range(LENGTH)]},
    "detections": {
        "boxes": [None if i % 5 == 4 else [[i, i]] * (i % 4) for i in range(LENGTH)],
        "file": [None if i % 5 == 4 else f"{i}.png" for i in range(LENGTH)],
    },
    "ragged": {
        "tags.all": [["a"] * (i % 3) for i in range(LENGTH)],
        "tags.none": [None] * LENGTH,
        "flag": [i > 3 for i in range(LENGTH)],
    },
    "gathered": {"prediction": [[index, index / 4] for index in range(LENGTH)]},
    "gathered dict": {
        "score.a": [i / 4 for i in range(LENGTH)],
        "score.b_0": [[i, i / 4] for i in range(LENGTH)],
        "own": [i / 4 for i in range(LENGTH)],
    },
    "gathered and joined": {"prediction": [torch.tensor([i, i / 4]).softmax(0).tolist() for i in range(LENGTH)]},
}


@pytest.mark.parametrize("name", EXPECTED)
def test_any_number_of_ranks_makes_the_same_table_to_the_byte(name, runs):
    tables = [(runs[ranks] / name / "predictions.parquet").read_bytes() for ranks in ("one", "two", "three")]
    assert tables[0] == tables[1] == tables[2]
    expected = {"sample": list(range(LENGTH)), "target": [index % 3 for index in range(LENGTH)], **EXPECTED[name]}
    table = pq.read_table(runs["one"] / name / "predictions.parquet")
    assert table.to_pydict() == expected and table.column_names == list(expected)


def test_columns_have_the_types_that_the_model_returned(runs):
    def types(name):
        return [str(kind) for kind in pq.read_schema(runs["one"] / name / "predictions.parquet").types]

    assert types("tensor") == ["int64", "int64", "fixed_size_list<element: float>[2]"]
    assert types("bfloat16")[2] == "float"
    assert types("nested")[2] == "fixed_size_list<element: fixed_size_list<element: halffloat>[3]>[2]"
    assert types("named")[2:] == ["float", "fixed_size_list<element: halffloat>[2]"]


def test_loaders_that_lightning_shares_among_the_ranks_do_as_well(runs):
    expected = (runs["one"] / "tensor" / "predictions.parquet").read_bytes()
    for ranks in ("one", "two", "three"):
        assert (runs[ranks] / "lightning" / "predictions.parquet").read_bytes() == expected


def test_a_stream_whose_last_block_has_fewer_samples_than_ranks_has_equally_many_batches_on_each(runs):
    for ranks in ("one", "two", "three"):  # which gather each batch, and would wait for one that has none
        table = pq.read_table(runs[ranks] / "short end" / "predictions.parquet")
        assert table["prediction"].to_pylist() == [[index, index / 4] for index in range(25)]


def test_a_stream_that_is_shared_makes_the_same_table_on_any_number_of_ranks(runs):
    tables = [(runs[ranks] / "stream" / "predictions.parquet").read_bytes() for ranks in ("one", "two", "three")]
    assert tables[0] == tables[1] == tables[2]
    table = pq.read_table(runs["one"] / "stream" / "predictions.parquet")
    assert table.to_pydict() == {"sample": list(range(LENGTH)), **EXPECTED["detections"]}


def test_several_loaders_are_one_table_with_the_samples_of_each(runs):
    tables = [(runs[ranks] / "loaders" / "predictions.parquet").read_bytes() for ranks in ("one", "two", "three")]
    assert tables[0] == tables[1] == tables[2]
    table = pq.read_table(runs["one"] / "loaders" / "predictions.parquet").to_pydict()
    assert list(table) == ["dataloader_idx", "sample", "target", "prediction"]
    assert table["dataloader_idx"] == [0] * LENGTH + [1] * LENGTH
    assert table["sample"] == [*range(LENGTH)] * 2
    assert table["prediction"] == [[index * k, index / 4 * k] for k in (1, 2) for index in range(LENGTH)]


def test_samples_without_numbers_are_counted_on_one_rank_and_refused_on_several(runs):
    table = pq.read_table(runs["one"] / "iterable" / "predictions.parquet")
    assert table.to_pydict() == {"sample": list(range(LENGTH)), **EXPECTED["tensor"]}
    for folder, ranks in ((runs["two"], 2), (runs["three"], 3)):
        error = (folder / "refused").read_text()
        assert f"{ranks} ranks cannot know" in error and "or predict on one device" in error
        assert not (folder / "iterable" / "predictions.parquet").exists()


def test_ranks_killed_before_the_merge_leave_no_table_and_no_rows(runs):
    assert runs["left"] == [f"tensor/.predictions/rank-{rank}-of-2.unfinished" for rank in range(2)]
    assert [path.name for path in (runs["three"] / "tensor").iterdir()] == ["predictions.parquet"]


VALUES = {
    "prediction": lambda samples: samples / 2,
    "text": lambda samples: ["t" * (sample % 7) for sample in samples.tolist()],
    "flags": lambda samples: torch.from_numpy(samples[:, None] % [2, 3] == 0),
    "nested": lambda samples: torch.from_numpy(samples[:, None, None] * [[1, 2, 3], [4, 5, 6]]).half(),
    "ragged": lambda samples: [torch.full((sample % 3, 2), sample) for sample in samples.tolist()],
    "maybe": lambda samples: [None if sample % 4 else [sample, 0.5] for sample in samples.tolist()],
    "found": lambda samples: [[{"box": [sample] * (sample % 3), "label": f"{sample}"}] * (sample % 2) for sample in samples.tolist()],
}


def as_python(values):
    return values.tolist() if hasattr(values, "tolist") else [value.tolist() if hasattr(value, "tolist") else value for value in values]


def write_parts(folder: Path, shares: list[list[list[int]]]) -> None:
    "The files of ranks that predicted these batches of samples."
    (folder / ".predictions").mkdir(parents=True, exist_ok=True)
    for rank, batches in enumerate(shares):
        part = part_file(folder, rank, len(shares))
        for batch in batches:
            samples = np.array(batch, np.int64)
            values = {name: values(samples) for name, values in VALUES.items()}
            part.write(batch_table(samples, None, values))
        part.finish()


@st.composite
def shares(draw, samples):
    "Samples dealt out to ranks, in each rank in some order, in batches."
    order = draw(st.permutations(samples))
    ranks = draw(st.integers(1, 5))
    parts = [order[rank::ranks] for rank in range(ranks)]
    in_order = draw(st.lists(st.booleans(), min_size=ranks, max_size=ranks))
    size = draw(st.integers(1, 7))
    parts = [sorted(part) if is_sorted else part for part, is_sorted in zip(parts, in_order)]
    return [[part[start : start + size] for start in range(0, len(part), size)] for part in parts]


@pytest.fixture
def small_sizes(monkeypatch):
    "So that a few rows make several pieces, sorted runs, row groups and merges of merges."
    sizes = dict(PIECE_BYTES=100, RUN_BYTES=400, GROUP_BYTES=700, FILES_AT_ONCE=3)
    for name, size in sizes.items():
        for module in (arrow_file, merge):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, size)


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    "A new folder each time."
    return lambda: tmp_path_factory.mktemp("merge")


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), length=st.integers(1, 80))
def test_merging_is_sorting_and_row_groups_do_not_depend_on_the_ranks(data, length, small_sizes, places):
    folder, single = places(), places()
    write_parts(folder, data.draw(shares(range(length))))
    write_parts(single, [[list(range(length))]])
    table = merge_predictions(folder, length)
    rows = pq.read_table(table).to_pydict()
    expected = {name: values(np.arange(length)) for name, values in VALUES.items()}
    expected = {name: as_python(values) for name, values in expected.items()}
    assert rows == {"sample": list(range(length)), **expected}
    assert table.read_bytes() == merge_predictions(single, length).read_bytes()
    assert [path.name for path in folder.iterdir()] == ["predictions.parquet"]


SCALARS = st.sampled_from([pa.null(), pa.int64(), pa.float64(), pa.string(), pa.float32()])
KINDS = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.builds(list_type, inner, st.integers(0, 2)),
        st.dictionaries(st.sampled_from("abc"), inner.map(variable), min_size=1).map(lambda fields: pa.struct(list(fields.items()))),
    ),
    max_leaves=4,
)


def joined(kinds):
    try:
        return reduce(common_type, kinds)
    except TypeError:
        return None


@settings(max_examples=500, deadline=None)
@given(kinds=st.lists(KINDS, min_size=2, max_size=4), data=st.data())
def test_the_common_type_does_not_depend_on_the_order_or_the_groups_in_which_types_come(kinds, data):
    other = data.draw(st.permutations(kinds))
    place = data.draw(st.integers(1, len(kinds) - 1))
    groups = [joined(kinds[:place]), joined(kinds[place:])]
    assert joined(kinds) == joined(other) == (None if None in groups else joined(groups))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), length=st.integers(2, 40))
def test_repeated_and_missing_samples_are_counted_and_the_first_is_named(data, length, small_sizes, places):
    within = st.integers(0, length - 2)  # the last one stays, for it tells how many there are
    missing = data.draw(st.sets(within, max_size=4))
    kept = sorted(set(range(length)) - missing)
    repeated = data.draw(st.lists(st.sampled_from(kept), min_size=not missing, max_size=4))
    folder = places()
    write_parts(folder, data.draw(shares(kept + repeated)))
    with pytest.raises(ValueError) as error:
        merge_predictions(folder, data.draw(st.sampled_from([None, length])))
    for name, samples in {"Not predicted": missing, "Predicted again": repeated}.items():
        count = f"{len(samples)} (the first is sample {min(samples)})" if samples else "none"
        assert f"{name}: {count}." in str(error.value)
    assert not (folder / "predictions.parquet").exists()


def test_too_few_and_too_many_samples_are_refused_and_an_earlier_table_stays(tmp_path):
    write_parts(tmp_path, [[[0, 1, 2]]])
    earlier = merge_predictions(tmp_path).read_bytes()
    for expected, message in ((5, "Not predicted: 2 \\(the first is sample 3\\)"), (2, "there should be 2 samples")):
        write_parts(tmp_path, [[[0, 1, 2]]])
        with pytest.raises(ValueError, match=message):
            merge_predictions(tmp_path, expected)
        assert (tmp_path / "predictions.parquet").read_bytes() == earlier


def test_a_full_disk_leaves_no_table_and_the_parts_for_another_try(tmp_path):
    (tmp_path / ".predictions").mkdir()
    part, scores = part_file(tmp_path, 0, 1), torch.rand(50_000)
    part.write(batch_table(np.arange(50_000), None, {"prediction": scores}))
    part.finish()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            merge_predictions(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not (tmp_path / "predictions.parquet").exists()
    assert pq.read_table(merge_predictions(tmp_path))["prediction"].to_numpy().tolist() == scores.tolist()


def test_a_rank_that_is_missing_or_unfinished_is_named(tmp_path):
    write_parts(tmp_path, [[[0, 2]], [[1, 3]]])
    part = tmp_path / ".predictions" / "rank-1-of-2.arrow"
    part.rename(part.with_suffix(".unfinished"))
    with pytest.raises(FileNotFoundError, match="rank-1-of-2.arrow.*in a folder that all ranks share"):
        merge_predictions(tmp_path)


def test_a_rank_without_rows_does_no_harm_but_no_row_at_all_is_refused(tmp_path):
    write_parts(tmp_path, [[[0, 1]], []])
    assert pq.read_table(merge_predictions(tmp_path))["sample"].to_pylist() == [0, 1]
    write_parts(tmp_path / "empty", [[], []])
    with pytest.raises(ValueError, match="No sample was predicted"):
        merge_predictions(tmp_path / "empty")


class Echo(pl.LightningModule):
    "Predicts what it gets; fails at a given batch."

    def __init__(self, fails_at=None):
        super().__init__()
        self.fails_at = fails_at

    def predict_step(self, batch, batch_idx):
        if batch_idx == self.fails_at:
            raise RuntimeError("no more")
        return batch * 2


def predict(folder, loader, model=None, *callbacks, **options):
    trainer = pl.Trainer(**QUIET | options, devices=1, callbacks=[PredictionWriter(folder), *callbacks])
    trainer.predict(model or Echo(), loader, return_predictions=False)
    return trainer


def test_a_failed_prediction_leaves_nothing_that_counts_and_the_next_one_succeeds(tmp_path):
    loader = DataLoader(torch.arange(10), batch_size=2)
    with pytest.raises(RuntimeError, match="no more"):
        predict(tmp_path, loader, Echo(fails_at=3))
    with pytest.raises(FileNotFoundError, match="There is no complete"):
        merge_predictions(tmp_path)
    predict(tmp_path, loader)
    assert pq.read_table(merge_predictions(tmp_path, 10))["prediction"].to_pylist() == list(range(0, 20, 2))


class OfTwo(pl.LightningModule):
    "Its loaders have columns of their own; the target is its own, too. One batch may have a name that is misspelt."

    def __init__(self, wrong=""):
        super().__init__()
        self.wrong = wrong

    def predict_step(self, batch, batch_idx, dataloader_idx=0):
        if dataloader_idx:
            return {"words": [f"w{int(number)}" for number in batch]}
        return {self.wrong or "score" if batch_idx else "score": batch / 2, "target": batch + 1}


def test_loaders_may_have_columns_of_their_own_and_a_loader_always_the_same(tmp_path):
    loaders = [DataLoader(torch.arange(4), batch_size=2), DataLoader(torch.arange(3))]
    predict(tmp_path, loaders, OfTwo())
    rows = pq.read_table(merge_predictions(tmp_path, [4, 3])).to_pydict()
    assert rows["score"] == [0, 0.5, 1, 1.5] + [None] * 3 and rows["target"] == [1, 2, 3, 4] + [None] * 3
    assert rows["words"] == [None] * 4 + ["w0", "w1", "w2"]
    with pytest.raises(ValueError, match="Return the same columns for every batch"):
        predict(tmp_path, loaders, OfTwo(wrong="scoer"))


def test_parts_of_an_attempt_that_was_not_merged_do_not_get_into_the_next_table(tmp_path):
    write_parts(tmp_path, [[[0, 3]], [[1, 4]], [[2, 5]]])
    predict(tmp_path, DataLoader(torch.arange(2)))
    assert pq.read_table(merge_predictions(tmp_path)).to_pydict() == {"sample": [0, 1], "prediction": [0, 2]}


def test_batches_in_another_order_end_in_the_datasets(tmp_path):
    class ByLength:
        def __iter__(self):
            return iter([[7, 2], [0, 5], [6, 1], [4, 3]])

        def __len__(self):
            return 4

    predict(tmp_path, DataLoader(torch.arange(8), batch_sampler=ByLength(), num_workers=2))
    rows = pq.read_table(merge_predictions(tmp_path, 8)).to_pydict()
    assert rows == {"sample": list(range(8)), "prediction": list(range(0, 16, 2))}


def test_numbers_are_kept_only_of_batches_that_were_fetched_ahead(tmp_path):
    kept = []

    class Watch(pl.Callback):
        def on_predict_batch_end(self, trainer, *_):
            sampler = trainer.predict_dataloaders.batch_sampler
            kept.append((len(sampler.seen_batch_indices), sampler.seen_batch_indices.num_fetched))

    predict(tmp_path, DataLoader(torch.arange(200), batch_size=2, num_workers=2, prefetch_factor=3), None, Watch())
    assert len(kept) == 100 and kept[-1] == (0, 100)
    assert 0 < max(number for number, _ in kept) <= 2 * 3 + 1  # of both workers, and the one that Lightning holds


def test_numbers_of_an_earlier_loader_are_not_used_for_one_without(tmp_path):
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(range(100, 106))

    trainer = predict(tmp_path, DataLoader(torch.arange(8), batch_size=4))
    trainer.predict(Echo(), DataLoader(Stream(), batch_size=4), return_predictions=False)
    rows = pq.read_table(merge_predictions(tmp_path)).to_pydict()
    assert rows == {"sample": list(range(6)), "prediction": list(range(200, 212, 2))}


def test_a_part_of_the_batches_is_a_table_but_not_of_all_samples(tmp_path):
    loader = DataLoader(torch.arange(10), batch_size=2)
    predict(tmp_path, loader, limit_predict_batches=2)
    with pytest.raises(ValueError, match="Not predicted: 6"):
        merge_predictions(tmp_path, 10)
    assert pq.read_table(merge_predictions(tmp_path))["sample"].to_pylist() == [0, 1, 2, 3]
    predict(tmp_path, loader, limit_predict_batches=0)
    with pytest.raises(ValueError, match="the predict loader had no batch"):
        merge_predictions(tmp_path)


def test_targets_that_no_score_belongs_to_have_no_confusion_matrix(tmp_path):
    table = pa.table({"target": [0, 1, 3], "prediction": pa.array([[0.0, 1.0]] * 3, pa.list_(pa.float32(), 2))})
    pq.write_table(table, tmp_path / "wrong.parquet")
    pq.write_table(table.slice(0, 2), tmp_path / "right.parquet", row_group_size=1)
    assert plots.confusion_matrix(tmp_path / "wrong.parquet") is None
    assert plots.confusion_matrix(tmp_path / "right.parquet").tolist() == [[0, 1], [0, 1]]
    assert plots.plot_predictions(tmp_path / "wrong.parquet") is None


MEMORY = """
import resource, sys
import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader
from dlnb.predictions.merge import merge_predictions
from dlnb.predictions.writer import PredictionWriter

class Numbers:
    def __init__(self, length): self.length = length
    def __len__(self): return self.length
    def __getitems__(self, indices): return torch.tensor(indices)

class Strided:  # batches, each from all over the samples
    def __init__(self, length): self.step = length // 500
    def __len__(self): return self.step
    def __iter__(self): return (list(range(start, 500 * self.step, self.step)) for start in range(self.step))

class Model(pl.LightningModule):
    def predict_step(self, batch, batch_idx): return batch[:, None].expand(-1, 100).float()

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024  # MB

def predict_and_merge(length, order):
    options = dict(batch_size=500) if order == "ascending" else dict(batch_sampler=Strided(length))
    loader = DataLoader(Numbers(length), collate_fn=lambda batch: batch, **options)
    trainer = pl.Trainer(accelerator="cpu", devices=1, logger=False, enable_progress_bar=False,
                         callbacks=PredictionWriter(sys.argv[1]))
    trainer.predict(Model(), loader, return_predictions=False)
    predicted = peak()
    merge_predictions(sys.argv[1], length)
    return predicted, peak()

for order in ("ascending", "another"):
    few, many = predict_and_merge(100_000, order), predict_and_merge(1_000_000, order)
    print("growth", many[0] - few[1], many[1] - many[0])
"""


@pytest.mark.soak
def test_memory_does_not_grow_with_the_number_of_samples(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-W", "ignore", "-c", MEMORY, str(tmp_path)]
    done = subprocess.run(command, env=environment, text=True, capture_output=True, timeout=400)
    assert done.returncode == 0, done.stderr
    growth = [int(number) for pair in re.findall(r"growth (-?\d+) (-?\d+)", done.stdout) for number in pair]
    assert len(growth) == 4 and max(growth) < 64, growth  # MB, of 360 MB that there are more
