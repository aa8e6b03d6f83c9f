"""Where a run begins, and which run a folder of runs means, after trainings that have failed or that ask for less."""

import pytest
from lightning.pytorch import Callback

from dlnb.checkpoint.weights import inference_config, one_run
from dlnb.config import RunConfig
from dlnb.examples import DigitsNet
from dlnb.tracking.record import RunRecord
from dlnb.trainer import fit

pytestmark = pytest.mark.timeout(300)
TASK = dict(model="dlnb.examples:DigitsNet", data="dlnb.examples:Digits", data_args={"num_workers": 0}, accelerator="cpu", devices=1)
TASK |= dict(batch_size=256, trainer_args={"enable_progress_bar": False})


class Stops(Callback):
    def on_train_batch_end(self, *_):
        raise RuntimeError("stops here")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return str(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def finished(root):
    return fit(RunConfig(**TASK, max_epochs=-1, max_steps=12, root=root))


def test_a_folder_of_runs_means_the_newest_that_has_weights(root, finished):
    with pytest.raises(Exception, match="stops here"):
        fit(RunConfig(**TASK, max_epochs=1, seed=1, root=root), callbacks=[Stops()])
    assert {record.status for record in map(RunRecord.read, finished.folder.parent.iterdir())} == {"finished", "failed"}
    assert one_run(finished.folder.parents[3]) == finished.folder


def test_a_finished_run_that_is_asked_for_less_stays_as_it_is(root, finished):
    before = (finished.folder / "run.json").read_bytes()
    with pytest.raises(ValueError, match="ask for less. Raise them"):
        fit(RunConfig(**TASK, max_epochs=1, max_steps=-1, root=root))
    assert (finished.folder / "run.json").read_bytes() == before


def test_inference_says_that_an_object_is_made_again_from_arguments_that_it_does_not_know(tmp_path, caplog):
    folder = fit(RunConfig(**TASK, max_steps=1, root=str(tmp_path)), DigitsNet(dropout=0.25)).folder
    inference_config(folder, model_args={"dropout": 0.25})
    assert "fit was given another model" not in caplog.text
    inference_config(folder)
    assert "fit was given another model than" in caplog.text and "give model_args" in caplog.text
