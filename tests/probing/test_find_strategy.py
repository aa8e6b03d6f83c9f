"""The fastest strategy, found by short trainings: what fits, how fast it is, and what is left when it is killed."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from conftest import HELPERS, REPOSITORY, TRAIN
from warm import warm_python

from dlnb.config import RunConfig
from dlnb.errors import TuningError
from dlnb.find_strategy import ProbingConfig, find_strategy
from dlnb.probing.candidates import Candidate, divisors
from dlnb.probing.memory import ModelSize, Setting, bytes_per_parameter, computed_memory, model_states
from dlnb.probing.probe import Probe
from dlnb.probing.report import strategies_table
from dlnb.probing.search import Machine, State, budget_for, fastest, next_candidate
from dlnb.track import RunRecord, runs

SETTINGS = dict(model=f"{HELPERS / 'probed.py'}:ProbedNet", data="dlnb.examples:Digits", data_args={"num_workers": 0}, accelerator="cpu")
SETTINGS |= dict(devices=2, batch_size=64)
SHORT = dict(n_steps=4, strategies=["ddp", "deepspeed_stage_1"], batch_sizes=[4, 16, 64])


@pytest.fixture
def find(tmp_path, monkeypatch):
    "Runs a search below the test's folder; nothing of it is left running."
    monkeypatch.setenv("TRACE", str(tmp_path))
    monkeypatch.setattr("multiprocessing.spawn._python_exe", os.fsencode(warm_python()))  # the server that ranks are forked from

    def run(settings: dict | None = None, **probing):
        config = RunConfig(**SETTINGS | {"root": str(tmp_path / "runs")} | (settings or {}))
        return find_strategy(config, ProbingConfig(**SHORT | probing))

    yield run
    assert alive(tmp_path) == []


def alive(root: Path, within: float = 30) -> list[int]:
    "Ranks of a search below this folder that still run after that time."
    deadline = time.monotonic() + within
    while (found := [pid for pid in ranks_of(root) if psutil.pid_exists(pid)]) and time.monotonic() < deadline:
        time.sleep(0.2)
    return found


def ranks_of(root: Path) -> list[int]:
    "The processes of all ranks that have begun to train."
    path = root / "probes.txt"
    return [int(line.split()[0]) for line in path.read_text().splitlines()] if path.exists() else []


def test_what_does_not_fit_is_in_the_table_and_train_takes_the_best(find, launch, tmp_path):
    settings = {"model_args": {"depth": 1000}}  # 16 MB per sample: with 64 of them a rank needs a gigabyte
    compared = find(settings, memory_limit=1.3e9)
    table = strategies_table(compared).set_index(["strategy", "batch_size"])
    large = table.xs(64, level="batch_size")["verdict"]
    assert all(verdict.startswith(("out of memory", "not tried")) for verdict in large) and "out of memory" in set(large)
    assert compared.best.batch_size < 64 and table["verdict"].tolist()[0] == "fastest"
    assert {round(probe.moments, 2) for probe in compared.probes if probe.state == "measured"} == {2}  # AdamW's
    measured = table.dropna(subset=["samples_per_second"])
    assert (measured["peak_memory"] <= 1.3).all() and table["predicted_memory"].notna().sum() >= 4

    folder, begun = compared.plan.folder, len(ranks_of(tmp_path))
    assert sorted(path.name for path in folder.iterdir()) == ["best_params.json", "probes.json"]
    assert len(find(settings, memory_limit=1.3e9).probes) == len(compared.probes) and len(ranks_of(tmp_path)) == begun
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TRACE")
        _, run = launch(TRAIN, None, **SETTINGS, max_steps=1, root=str(tmp_path / "runs"), best_params=str(folder / "best_params.json"))
    record = RunRecord.read(run)
    assert record.resolved["strategy"] == compared.best.strategy and record.resolved["global_batch_size"] == 128
    assert runs(tmp_path / "runs")["mode"].tolist() == ["train"], "a probe is nobody's run"


def test_an_error_of_the_model_ends_the_search_with_its_traceback(find):
    with pytest.raises(TuningError, match="(?s)No strategy can train this.*rank.*the model is at fault"):
        find({"model_args": {"fails_under": "Strategy"}})


@pytest.mark.soak
def test_a_strategy_that_fails_is_told_from_one_without_memory_and_tried_again_next_time(find, tmp_path):
    compared = find({"model_args": {"fails_under": "DDP"}})
    verdicts = strategies_table(compared).set_index("strategy").loc["ddp", "verdict"]
    assert "failed: RuntimeError: the model is at fault" in set(verdicts) and compared.best.strategy == "deepspeed_stage_1"
    begun = len(ranks_of(tmp_path))
    assert find({"model_args": {"fails_under": "DDP"}}).best.strategy == "deepspeed_stage_1"
    assert len(ranks_of(tmp_path)) > begun


@pytest.mark.soak
@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch 2.9 and newer have Muon")
def test_what_another_optimizer_keeps_is_counted(find):
    "Muon keeps one momentum of a matrix, AdamW two of what is left to it, under every strategy."
    compared = find({"optimizer": "Muon"}, strategies=["ddp", "deepspeed_stage_1", "deepspeed_stage_2"], batch_sizes=[16])
    assert [probe.state for probe in compared.probes] == ["measured"] * 3
    assert {round(probe.moments, 2) for probe in compared.probes} == {1.15}


@pytest.mark.soak
def test_an_optimizer_of_the_model_that_keeps_nothing_is_not_taken_for_adam(find):
    compared = find({"model_args": {"plain_sgd": True}}, batch_sizes=[16])
    assert [(probe.state, probe.moments) for probe in compared.probes] == [("measured", 0)] * 2


@pytest.mark.soak
def test_where_nothing_fits_there_are_no_parameters(find):
    compared = find(memory_limit=50e6)
    assert compared.best is None and not (compared.plan.folder / "best_params.json").exists()
    assert {probe.state for probe in compared.probes} == {"out of memory"}


def test_the_largest_batch_fits_and_one_that_is_a_twentieth_larger_does_not(find):
    settings = {"model_args": {"depth": 1000}, "batch_size": 16}
    compared = find(settings, strategies=["ddp"], batch_sizes=[4, 16], memory_limit=1.6e9, largest_batch=True)
    found = compared.largest_batch_size
    new = compared.batch_sizes.keys() - {4, 16}
    too_large = min(size for size, peak in compared.batch_sizes.items() if peak is None)
    assert len(new) <= 6 and 16 < found < too_large <= found / 0.95 + 1
    assert json.loads((compared.plan.folder / "best_params.json").read_text())["largest_batch_size"] == found


COMMAND = """
import sys
from dlnb.config import RunConfig
from dlnb.find_strategy import ProbingConfig, find_strategy

if __name__ == "__main__":
    find_strategy(RunConfig(**eval(sys.argv[1])), ProbingConfig(**eval(sys.argv[2])))
"""


def start(root: Path, settings: dict, probing: dict) -> subprocess.Popen:
    (root / "search.py").write_text(COMMAND)
    command = [warm_python(), str(root / "search.py"), repr(SETTINGS | {"root": str(root / "runs")} | settings), repr(probing)]
    environment = os.environ | {"TRACE": str(root), "PYTHONPATH": f"{REPOSITORY}:{HELPERS}"}
    with (root / "output.txt").open("a") as output:
        return subprocess.Popen(command, env=environment, stdout=output, stderr=output)


@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGINT, marks=pytest.mark.soak)])
def test_a_search_that_is_killed_leaves_no_process_and_resumes(tmp_path, number):
    probing = SHORT | {"strategies": ["ddp"]}
    process, deadline = start(tmp_path, {"model_args": {"waits": 2.0}}, probing), time.monotonic() + 90
    try:
        while len(ranks_of(tmp_path)) < 4 and time.monotonic() < deadline:  # the second probe trains
            time.sleep(0.05)
        process.send_signal(number)
        assert process.wait(30) != 0 and alive(tmp_path, within=15) == []
        kept = json.loads(next(tmp_path.rglob("probes.json")).read_text())["probes"]
        assert len(kept) == 1 and not list(tmp_path.rglob("best_params.json"))
        process = start(tmp_path, {"model_args": {"waits": 2.0}}, probing)
        assert process.wait(120) == 0, (tmp_path / "output.txt").read_text()[-3000:]
    finally:
        process.kill()
    probes = json.loads(next(tmp_path.rglob("probes.json")).read_text())["probes"]
    assert len(probes) == 2 and probes[0] == kept[0] and list(tmp_path.rglob("best_params.json"))
    assert sorted(path.name for path in next(tmp_path.rglob("probes.json")).parent.iterdir()) == ["best_params.json", "probes.json"]


@pytest.mark.soak
def test_the_notebook_shows_the_table_and_lies_in_the_search_s_folder(launch, tmp_path):
    settings = SETTINGS | SHORT | {"strategies": ["ddp"], "root": str(tmp_path / "runs"), "batch_sizes": [32, 64]}
    notebook, folder = launch(TRAIN.with_name("find_strategy.ipynb"), tmp_path / "out.ipynb", **settings)
    assert {path.name for path in folder.iterdir()} == {"best_params.json", "probes.json", "find_strategy.ipynb"}
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert any("fastest" in output.get("data", {}).get("text/html", "") for output in outputs)


MISTAKES = {
    "unknown strategy": (dict(strategies=["deepspeed_stage3"]), {}, "Did you mean 'deepspeed_stage_3'"),
    "no strategy of its own": (dict(strategies=["auto"]), {}, "'auto' is not a strategy"),
    "a batch that changes the global one": (dict(batch_sizes=[48]), {}, "48 does not divide the 64 samples"),
    "no memory": (dict(memory_limit=0), {}, "memory_limit"),
    "too few steps": (dict(n_steps=1), {}, "n_steps"),
    "no probes": (dict(max_probes=0), {}, "max_probes"),
    "unknown setting": (dict(strategy=["ddp"]), {}, "Did you mean 'strategies'"),
    "none that runs here": (dict(strategies=["fsdp", "deepspeed_stage_3_offload_nvme"]), {}, "none of them can train this"),
    "several nodes": ({}, dict(num_nodes=2), "num_nodes=2"),
    "a run to resume": ({}, dict(resume="."), "a search resumes by itself"),
    "a model that cannot be trained": ({}, dict(model="lightning.pytorch:LightningModule"), "no training_step"),
}


@pytest.mark.parametrize("probing, settings, told", MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_told_before_a_process_starts_or_a_file_is_written(find, tmp_path, probing, settings, told):
    with pytest.raises(ValueError) as error:
        find(settings, **probing)
    assert told in str(error.value)
    assert not (tmp_path / "runs").exists() and not ranks_of(tmp_path)


MILLION = ModelSize(1_000_000, 1_000_000)
BY_HAND = [  # MB of 1 million parameters on 4 ranks, in fp32: parameters + gradients + what the optimizer holds
    ("ddp", 4 + 4 + 8, 0),
    ("deepspeed_stage_1", 4 + 4 + 12 / 4, 0),
    ("deepspeed_stage_2", 4 + 4 / 4 + 12 / 4, 0),
    ("deepspeed_stage_3", 4 / 4 + 4 / 4 + 12 / 4, 0),
    ("deepspeed_stage_2_offload", 4, 4 / 4 + 12 / 4),
    ("deepspeed_stage_3_offload", 0, 4 / 4 + 4 / 4 + 12 / 4),
]


@pytest.mark.parametrize("strategy, device, host", BY_HAND)
def test_the_memory_of_model_states_is_that_of_hand_arithmetic(strategy, device, host):
    per_parameter = bytes_per_parameter("32-true", strategy != "ddp")
    assert model_states(MILLION, strategy, 4, per_parameter) == (device * 1e6, host * 1e6)
    on_cpu = computed_memory(Setting(MILLION, "32-true", 4, True), strategy)
    assert on_cpu == ((device + host + 4) * 1e6, 0), "on a CPU all is in one memory, with buckets of the gradients"


# Every candidate of a model of 4.9 million parameters, on two CPU ranks of a busy machine: with base memory, peak and speed.
TABLE = {probe.candidate: probe for probe in (Probe(**row) for row in json.loads(Path(__file__).with_name("strategies.json").read_text()))}


def replayed(table: dict[Candidate, Probe], machine: Machine, limit: float | None) -> list[Probe]:
    "The probes of a search whose trainings are taken from a table."
    candidates, probes = list(table), []
    while candidate := next_candidate(state := State(candidates, probes, machine, limit), budget_for(candidates)):
        found = table[candidate].model_copy(update={"predicted": state.memory.predict(candidate)})
        fits = not limit or found.memory <= limit
        probes.append(found if fits else Probe(**candidate.params, state="out of memory", predicted=found.predicted))
    return probes


def share_of_best(table: dict[Candidate, Probe], probes: list[Probe], limit: float | None) -> float:
    best = max(probe.samples_per_second for probe in table.values() if not limit or probe.memory <= limit)
    found = fastest(probes)
    return found.samples_per_second / best if found else 0.0


@pytest.mark.parametrize("limit", [None, 0.95e9, 0.92e9, 0.9e9, 0.88e9, 0.86e9, 0.84e9])
def test_a_third_of_an_exhaustive_search_finds_what_is_within_five_percent_of_its_best(limit):
    probes = replayed(TABLE, Machine("32-true", 2, True), limit)
    assert len(TABLE) == 42 and len(probes) <= len(TABLE) / 3
    assert share_of_best(TABLE, probes, limit) >= 0.95


STRATEGIES = sorted({candidate.strategy for candidate in TABLE})


def made_up(seed: int) -> tuple[dict[Candidate, Probe], Machine, float | None]:
    "Another model and machine: costs per call, per step and per sample, caches that end somewhere, memory that scatters, and a limit."
    chance = random.Random(seed)
    samples, ranks, on_cpu = chance.choice([32, 48, 64, 96, 128, 240, 256]), chance.choice([2, 4, 8]), chance.random() < 0.5
    size, machine = ModelSize(*[int(10 ** chance.uniform(6.5, 9.5))] * 2), Machine("32-true", ranks, on_cpu)
    activations, call, step = 10 ** chance.uniform(5.5, 8), 10 ** chance.uniform(-1, 1), 10 ** chance.uniform(-1, 1.5)
    knee, slower = chance.choice([1e9, 8, 16, 32]), chance.uniform(0, 0.3)
    table = {}
    for strategy in STRATEGIES:
        own_call, own_step, more = call * chance.uniform(0.8, 3), step * chance.uniform(0.7, 3), chance.uniform(0, 2) * activations
        for batch in divisors(samples):
            seconds = samples / batch * own_call + samples * (1 + slower * (batch > knee)) + own_step * (3 if "offload" in strategy else 1)
            peak = computed_memory(Setting(size, *machine), strategy).device + more + activations * batch * chance.uniform(0.97, 1.03)
            peaks = {"host_memory": [peak + 5e8], "base_memory": 5e8} if on_cpu else {"device_memory": [peak]}
            rate = {"samples_per_second": samples / seconds * chance.uniform(0.985, 1.015), "state": "measured"}
            candidate = Candidate(strategy, batch, samples // batch)
            table[candidate] = Probe(**candidate.params, **rate, **peaks, parameters=size.parameters, trainable_parameters=size.trainable)
    peaks = sorted(probe.memory for probe in table.values())
    return table, machine, chance.choice([None, peaks[int(len(peaks) * chance.uniform(0.3, 0.95))]])


def test_on_other_models_and_machines_too():
    shares = []
    for seed in range(200):
        table, machine, limit = made_up(seed)
        probes = replayed(table, machine, limit)
        assert len(probes) <= len(table) / 3
        shares.append(share_of_best(table, probes, limit))
    assert sum(share >= 0.95 for share in shares) >= 0.97 * len(shares) and min(shares) > 0.75, sorted(shares)[:10]


def test_importing_is_light(tmp_path):
    code = "import sys, dlnb.find_strategy; print([name for name in ('deepspeed', 'pandas', 'wandb') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[]", done.stderr
