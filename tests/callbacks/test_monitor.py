"""What is monitored when it is logged late, seldom, or by the module itself; and code of users that could not be trained."""

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import RichProgressBar

from dlnb.config import RunConfig
from dlnb.errors import TuningError, UntrainableError
from dlnb.examples import DigitsNet
from dlnb.search.study import StudyConfig
from dlnb.trainer import fit
from dlnb.tuner import tune

pytestmark = pytest.mark.timeout(300)
SETTINGS = dict(model=f"{__file__}:Scored", data="dlnb.examples:Digits", data_args={"num_workers": 0}, accelerator="cpu", devices=1)
SETTINGS |= dict(batch_size=256, max_epochs=4)


class Scored(DigitsNet):
    "It logs a score at the end of each epoch of training, after its callbacks."

    def on_train_epoch_end(self):
        self.log("score", float(self.current_epoch))


class Two(DigitsNet):
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1), torch.optim.SGD(self.parameters(), lr=0.1)


class Frozen(LightningModule):
    "It can be loaded, and not trained."

    def __init__(self):
        super().__init__()
        self.net = torch.nn.Linear(64, 10)


class Silent(DigitsNet):
    "It validates, and logs nothing of it."

    def validation_step(self, batch, index):
        pass


class Own(DigitsNet):
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def make_own():
    return Own()


@pytest.mark.parametrize(
    "more, best",
    [
        (dict(trainer_args={"check_val_every_n_epoch": 2}), "epoch=3"),
        (dict(monitor="score", monitor_mode="max"), "epoch=3"),
        (dict(monitor="score", monitor_mode="min"), "epoch=0"),
    ],
    ids=["every second epoch", "greatest at the end", "least at the beginning"],
)
def test_a_metric_that_is_logged_late_is_monitored_to_the_end(tmp_path, capsys, more, best):
    record = fit(RunConfig(**SETTINGS | more, root=str(tmp_path)))
    assert record.best_score is not None and best in record.best_checkpoint
    assert "is not logged" not in capsys.readouterr().out


def test_a_metric_that_is_never_logged_is_reported_and_the_training_ends_well(tmp_path, capsys):
    record = fit(RunConfig(**SETTINGS, monitor="scores", root=str(tmp_path)))
    assert record.status == "finished" and record.best_checkpoint
    assert "scores is not logged" in capsys.readouterr().out


def test_trials_report_a_metric_of_every_second_epoch(tmp_path):
    search = StudyConfig(search_space={"lr": {"low": 1e-3, "high": 1e-2}}, n_trials=2)
    study = tune(RunConfig(**SETTINGS, trainer_args={"check_val_every_n_epoch": 2}, root=str(tmp_path)), search)
    assert [trial.state.name for trial in study.trials] == ["COMPLETE"] * 2


def test_two_optimizers_are_refused_in_whatever_form_before_a_file_is_written(tmp_path):
    with pytest.raises(ValueError, match="has 2 optimizers"):
        fit(RunConfig(**SETTINGS | dict(model=f"{__file__}:Two", strategy="deepspeed_stage_2"), root=str(tmp_path)))
    assert not list(tmp_path.rglob("*.ckpt"))


@pytest.mark.parametrize("more", [{}, {"devices": 2}], ids=["one rank", "two"])
def test_a_class_without_a_training_step_is_refused_before_a_file_is_written(tmp_path, more):
    config = RunConfig(**SETTINGS | dict(model=f"{__file__}:Frozen") | more, root=str(tmp_path))
    for train in (
        fit,
        lambda config: fit(config, Frozen()),
        lambda config: tune(config, StudyConfig(search_space={"batch_size": [8, 16]})),
    ):
        with pytest.raises(UntrainableError, match="has no training_step"):
            train(config)
    assert not list(tmp_path.iterdir())


def test_a_search_of_a_model_that_no_trial_can_train_ends_with_the_first_one(tmp_path):
    config = RunConfig(**SETTINGS | dict(model=f"{__file__}:Two", strategy="deepspeed_stage_2"), root=str(tmp_path))
    with pytest.raises(TuningError, match="^No trial can be trained. strategy='deepspeed_stage_2': Two has 2 optimizers"):
        tune(config, StudyConfig(search_space={"batch_size": [8, 16]}, n_trials=4))
    assert len(list(tmp_path.rglob("rank-0.log"))) == 1


def test_a_progress_bar_of_ones_own_takes_the_place_of_dlnbs(tmp_path):
    assert fit(RunConfig(**SETTINGS | dict(max_epochs=1), root=str(tmp_path)), callbacks=[RichProgressBar()]).status == "finished"


def test_trials_leave_out_what_saves_checkpoints_and_the_search_says_so(tmp_path, capsys):
    settings = SETTINGS | dict(max_epochs=1, callbacks="lightning.pytorch.callbacks.ModelCheckpoint", root=str(tmp_path))
    study = tune(RunConfig(**settings), StudyConfig(search_space={"lr": [1e-3]}, n_trials=1))
    assert [trial.state.name for trial in study.trials] == ["COMPLETE"] and not list(tmp_path.rglob("*.ckpt"))
    assert "leave out ModelCheckpoint. To have them, set keep_checkpoints=True." in capsys.readouterr().out


def test_a_class_in_the_place_of_a_model_is_the_settings_own(tmp_path):
    config = RunConfig(**SETTINGS | dict(max_epochs=1), root=str(tmp_path))
    assert fit(config, Scored).folder == fit(config).folder
    with pytest.raises(ValueError, match="is not the class of the model that was passed, Silent"):
        fit(config, Silent)
    with pytest.raises(ValueError, match="make_own' is a function, and Silent a class"):
        fit(RunConfig(**SETTINGS | dict(model=f"{__file__}:make_own"), root=str(tmp_path)), Silent)


def test_a_function_that_draws_what_the_model_does_not_read_is_refused_before_a_trial(tmp_path):
    config = RunConfig(**SETTINGS | dict(model=f"{__file__}:Own"), root=str(tmp_path))
    with pytest.raises(ValueError, match="search_space=draws_a_rate: lr would change nothing: Own has its own optimizer"):
        tune(config, StudyConfig(search_space=draws_a_rate))
    assert not list(tmp_path.iterdir())


def draws_a_rate(trial) -> dict:
    return {"lr": trial.suggest_float("lr", 1e-3, 1e-2)}


def test_a_search_over_a_rate_that_a_functions_model_does_not_read_ends_with_that_sentence(tmp_path):
    search = StudyConfig(search_space={"lr": {"low": 1e-3, "high": 1e-2}}, n_trials=3, max_failures=1)
    with pytest.raises(TuningError, match="would change nothing: Own, which model="):
        tune(RunConfig(**SETTINGS | dict(model=f"{__file__}:make_own"), root=str(tmp_path)), search)


def test_a_validation_that_logs_nothing_leaves_no_default_monitor_and_trains(tmp_path, capsys):
    record = fit(RunConfig(**SETTINGS | dict(model=f"{__file__}:Silent", max_epochs=1), root=str(tmp_path)))
    assert record.status == "finished" and record.last_checkpoint
    assert "val_loss is not logged. Nothing is monitored" in capsys.readouterr().out
