"""A model that is defined in the cells of the notebook that trains it is found again: by a search, by infer, by a resume."""

import json

import pytest
from conftest import TRAIN, write_notebook
from projects import HERE

from dlnb.settings.import_path import load_class

pytestmark = pytest.mark.timeout(300)
CELLS = json.loads((HERE / "notebook" / "mine.ipynb").read_text())["cells"][1:7]  # imports, constants, a function, data, model
PARAMETERS = "devices = 1\nstrategy = 'auto'\naccelerator = 'cpu'\nmax_epochs = 2\nbatch_size = 8\nroot = 'runs'"
CONFIG = "from dlnb.config import RunConfig\nconfig = RunConfig.from_namespace(globals() | {'model': Net, 'data': Toy})"
FIT = "from dlnb.trainer import fit\nrecord = fit(config)\nprint('TRAINED', record.attempts, record.epoch)"
TUNE = """
from dlnb.search.study import StudyConfig
from dlnb.tuner import tune
study = tune(config, StudyConfig(search_space={"model_args.width": [4, 8]}, n_trials=2))
"""


def notebook(path, *more: str):
    return write_notebook(path, PARAMETERS, *("".join(cell["source"]) for cell in CELLS), CONFIG, *more)


@pytest.mark.parametrize(
    "strategy, devices", [("auto", 1), pytest.param("deepspeed_stage_3", 2, marks=pytest.mark.soak)], ids=["one rank", "ZeRO-3"]
)
def test_infer_and_a_resume_find_it(launch, tmp_path, monkeypatch, strategy, devices):
    monkeypatch.chdir(tmp_path)
    own = notebook(tmp_path / "own.ipynb", FIT)
    _, folder = launch(own, "out.ipynb", strategy=strategy, devices=devices)
    source = (folder / "source.py").read_text()
    assert "class Net" in source and "class Toy" in source and "SystemError" not in source
    out, again = launch(own, "longer.ipynb", strategy=strategy, devices=devices, max_epochs=3)
    assert again == folder and "TRAINED 2 3" in str(out)
    _, tested = launch(TRAIN.with_name("infer.ipynb"), "infer.ipynb", run=str(folder), accelerator="cpu")
    assert (tested / "predictions.parquet").is_file()


@pytest.mark.soak
def test_a_search_gives_it_to_its_trials(launch, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    launch(notebook(tmp_path / "own.ipynb", TUNE), "out.ipynb", devices=2)
    (best,) = tmp_path.rglob("best_params.json")
    assert best.with_name("source.py").is_file() and "model_args.width" in json.loads(best.read_text())["params"]


# How a table is made, and how a class gets into it: by an argument, an object that is called, a method, inheritance.
REGISTERED = {
    "argument": ("def register(into):\n    def add(cls):\n        into[cls.__name__] = cls\n        return cls\n    return add\n\nNETS = {}", "@register(into=NETS)"),
    "object": ("class Table(dict):\n    def __call__(self, cls):\n        self[cls.__name__] = cls\n        return cls\n\nNETS = Table()", "@NETS"),
    "method": ("class Table(dict):\n    def component(self, name):\n        return lambda cls: self.setdefault(name, cls)\n\nNETS = Table()", "@NETS.component('Small')"),
}  # fmt: skip


@pytest.mark.parametrize("way", REGISTERED)
def test_what_is_registered_in_its_notebook_comes_along(tmp_path, way):
    table, decorator = REGISTERED[way]
    build = "class Net:\n    def __init__(self):\n        self.net = NETS['Small']()"
    path = write_notebook(tmp_path / "own.ipynb", table, f"{decorator}\nclass Small: ...", build, "raise SystemError('training')")
    assert type(load_class(f"{path}:Net")().net).__name__ == "Small"


def test_what_a_base_class_registers_comes_along(tmp_path):
    base = "class Base:\n    nets = {}\n    def __init_subclass__(cls):\n        Base.nets[cls.__name__] = cls"
    build = "class Net:\n    def __init__(self):\n        self.net = Base.nets['Small']()"
    path = write_notebook(tmp_path / "own.ipynb", base, "class Middle(Base): ...", "class Small(Middle): ...", build)
    assert type(load_class(f"{path}:Net")().net).__name__ == "Small"
