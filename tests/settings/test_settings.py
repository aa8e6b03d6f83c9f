"""Settings that nobody can mean, by hand and by the thousand: each gives a sentence, or a run whose folder can be made and found again."""

import json
import os
import random
import re
import string
from collections import Counter

import pytest

from dlnb.config import RunConfig, apply_params
from dlnb.search.space import check_params, read_space
from dlnb.search.study import StudyConfig

DIGITS = {"model": "dlnb.examples:DigitsNet", "data": "dlnb.examples:Digits", "accelerator": "cpu", "devices": 1}
LONG = "x" * 300

MEANINGLESS = {  # name: (settings, what the sentence says)
    "more devices than there are": ({"devices": 10**30}, "devices"),
    "a device beyond all": ({"devices": [0, 10**6]}, "devices=[0, 1000000] must be"),
    "a truth value for devices": ({"devices": True}, "devices=True must not be a truth value"),
    "devices as a dictionary": ({"devices": {"gpu": 2}}, "devices"),
    "half a device": ({"devices": 0.5}, "devices"),
    "negative devices": ({"devices": -2}, "devices=-2 must be"),
    "no device in a list": ({"devices": []}, "devices=[] must be"),
    "devices in words": ({"devices": "0,a"}, "devices='0,a' must be"),
    "more nodes than there are": ({"num_nodes": 10**9}, "num_nodes"),
    "a truth value for nodes": ({"num_nodes": True}, "num_nodes=True must not be a truth value"),
    "a truth value for epochs": ({"max_epochs": True}, "max_epochs=True must not be"),
    "epochs beyond use": ({"max_epochs": 10**30}, "max_epochs is a number beyond 2**53"),
    "steps of five thousand digits": ({"max_steps": 10**5000}, "max_steps is a number beyond 2**53"),
    "epochs below all": ({"max_epochs": -5}, "max_epochs"),
    "half an epoch": ({"max_epochs": 1.5}, "max_epochs"),
    "a truth value for the batch": ({"batch_size": False}, "batch_size=False must not be"),
    "a batch beyond use": ({"batch_size": 2**60}, "batch_size is a number beyond 2**53"),
    "a text for the batch": ({"batch_size": "all"}, "batch_size"),
    "a truth value for the rate": ({"lr": True}, "lr=True must not be"),
    "an infinite rate": ({"lr": float("inf")}, "lr"),
    "a rate of nothing": ({"lr": None}, "lr"),
    "a negative clip": ({"gradient_clip_val": -1.0}, "gradient_clip_val"),
    "a seed beyond 32 bits": ({"seed": 2**32}, "seed"),
    "a truth value for a seed": ({"seed": True}, "seed=True must not be"),
    "a patience of nothing whole": ({"patience": 0.5}, "patience"),
    "no log": ({"log_every_n_steps": 0}, "log_every_n_steps"),
    "a save at no step": ({"save_every_n_steps": 0}, "save_every_n_steps"),
    "a top of minus two": ({"save_top_k": -2}, "save_top_k"),
    "a number for terminate_on_nan": ({"terminate_on_nan": 7}, "terminate_on_nan"),
    "a root of nothing": ({"root": ""}, "root='' must be a folder"),
    "a root of blanks": ({"root": "  "}, "root='  ' must be a folder"),
    "a root that is a device": ({"root": "/dev/null"}, "'/dev/null' is not a folder"),
    "a root below a device": ({"root": "/dev/null/runs"}, "'/dev/null' is not a folder"),
    "a root below a file": ({"root": f"{__file__}/runs"}, "is not a folder"),
    "a root with a long name": ({"root": LONG}, "is too long"),
    "a root with a long path": ({"root": "/".join(["x" * 200] * 30)}, "is too long"),
    "a root with a NUL": ({"root": "ru\0ns"}, "which no file's name and no text can hold"),
    "a root with half a character": ({"root": "ru\ud800ns"}, "which no file's name and no text can hold"),
    "a root of an unknown user": ({"root": "~nobody-of-this-name/runs"}, "nobody-of-this-name"),
    "a number for the root": ({"root": 7}, "root"),
    "a name of a path": ({"name": "../run"}, "must be of letters"),
    "a hidden name": ({"name": ".run"}, "must be of letters"),
    "a long name": ({"name": LONG}, "must be of letters"),
    "a name of long letters": ({"name": "你" * 90}, "must be of letters"),
    "no name": ({"name": ""}, "must be of letters"),
    "a name of two lines": ({"name": "a\nb"}, "must be of letters"),
    "a model with a NUL": ({"model": "dlnb.\0:Net"}, "can hold"),
    "a model of no place": ({"model": ":Net"}, "must be 'package.module:Class'"),
    "a model of no name": ({"model": "dlnb.examples:"}, "must be 'package.module:Class'"),
    "a model of a call": ({"model": "os:system('true')"}, "must be 'package.module:Class'"),
    "a function for a model": ({"model": "os:system"}, "model='os:system'"),
    "an attribute of a class": ({"model": "dlnb.examples:DigitsNet.forward"}, "must be 'package.module:Class'"),
    "a relative module": ({"model": ".examples:DigitsNet"}, "model"),
    "data of numbers": ({"data": 7}, "data"),
    "a list for model_args": ({"model_args": [1, 2]}, "must be a dictionary"),
    "model_args of numbers": ({"model_args": {1: 2}}, "must be of numbers, text"),
    "a NaN among model_args": ({"model_args": {"width": float("nan")}}, "so that run.json can hold it"),
    "YAML that refers to itself": ({"model_args": "&a {width: *a}"}, "model_args"),
    "YAML that runs": ({"model_args": "{width: !!python/object/apply:os.system ['true']}"}, "neither JSON nor YAML"),
    "split among data_args": ({"data_args": {"split": "test"}}, "set split itself"),
    "an empty strategy": ({"strategy": ""}, "strategy='' is not known"),
    "a strategy of a path": ({"strategy": "../ddp"}, "strategy='../ddp' is not known"),
    "a truth value for the strategy": ({"strategy": True}, "strategy=True must not be"),
    "an accelerator in capitals": ({"accelerator": "CPU"}, "Did you mean 'cpu'?"),
    "a precision in bits": ({"precision": 8}, "precision='8' is not known"),
    "an optimizer as a path": ({"optimizer": "torch.optim:AdamW"}, "is not known"),
    "a warm-up of all steps": ({"warmup_ratio": 1}, "warmup_ratio"),
    "a mode of nothing": ({"monitor_mode": None}, "monitor_mode"),
    "a monitor with a NUL": ({"monitor": "val\0loss"}, "can hold"),
    "a resume with a NUL": ({"resume": "a\0b"}, "can hold"),
    "a resume of a long name": ({"resume": LONG}, "folder or checkpoint that exists"),
    "a resume of nothing": ({"resume": ""}, "folder or checkpoint that exists"),
    "best_params of a long name": ({"best_params": LONG}, "best_params"),
    "best_params with a NUL": ({"best_params": "a\0b"}, "best_params"),
    "best_params of a folder": ({"best_params": "/"}, "best_params"),
    "tags of numbers": ({"tags": [1]}, "tags"),
    "tags of a dictionary": ({"tags": {"a": 1}}, "tags"),
    "a logger of two": ({"logger": "csv,tensorboard"}, "logger"),
    "callbacks for the Trainer": ({"trainer_args": {"callbacks": []}}, "'callbacks' is set by dlnb"),
    "a Trainer that keeps nothing": ({"trainer_args": {"fast_dev_run": True}}, "keeps no run"),
    "a setting in capitals": ({"LR": 1}, "LR"),
    "a setting of no name": ({"": 1}, "is not known"),
    "a setting of blanks": ({" lr": 1}, "Did you mean 'lr'?"),
    "two faults": ({"lr": -1, "batch_size": 0}, "batch_size"),
}
SPACES = {  # name: (search_space, what the sentence says)
    "nothing": ({}, "search_space"),
    "a number": (7, "search_space"),
    "a list": ([1, 2], "search_space"),
    "an unknown setting": ({"learning_rate": [1]}, "learning_rate"),
    "no choice": ({"lr": []}, "must have one choice or more"),
    "a choice of a list": ({"lr": [[1]]}, "must have one choice or more"),
    "a text": ({"lr": "high"}, "must be a list of choices"),
    "a bound alone": ({"lr": {"low": 1}}, "needs high"),
    "bounds the wrong way round": ({"lr": {"low": 2, "high": 1}}, "lr"),
    "bounds of NaN": ({"lr": {"low": float("nan"), "high": 1}}, "must be finite numbers"),
    "bounds of truth values": ({"lr": {"low": False, "high": True}}, "must be finite numbers"),
    "a logarithm of zero": ({"lr": {"low": 0, "high": 1, "log": True}}, "lr"),
    "a step of nothing": ({"batch_size": {"low": 1, "high": 9, "step": 0}}, "batch_size"),
    "a logarithm with steps": ({"batch_size": {"low": 1, "high": 9, "step": 2, "log": True}}, "batch_size"),
    "an unknown key": ({"lr": {"low": 1, "high": 2, "logarithm": True}}, "Did you mean 'log'?"),
    "a delta without patience": ({"min_delta": {"low": 0.0, "high": 0.1}}, "0.1 is impossible. 1 validation error"),
    "a way to clip without a bound": ({"gradient_clip_algorithm": ["norm", "value"]}, "without gradient_clip_val"),
    "the root": ({"root": ["a", "b"]}, "root"),
    "the model": ({"model": ["a:B"]}, "model"),
    "the devices": ({"devices": [1, 2]}, "devices"),
    "all arguments": ({"model_args": [{"width": 8}]}, "model_args"),
}
RAW = re.compile(r"codec can't|embedded null|surrogates not allowed|Traceback|object at 0x|int_max_str_digits|\[Errno")


@pytest.mark.parametrize("settings, told", MEANINGLESS.values(), ids=MEANINGLESS)
def test_what_nobody_can_mean_is_refused_in_a_sentence(settings, told, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError) as caught:
        RunConfig(**DIGITS | settings)
    assert told in str(caught.value) and not RAW.search(str(caught.value)), caught.value
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("space, told", SPACES.values(), ids=SPACES)
def test_a_space_that_nobody_can_search_is_refused_in_a_sentence(space, told):
    with pytest.raises(ValueError) as caught:
        read_space(StudyConfig(search_space=space).search_space, RunConfig(**DIGITS))
    assert told in str(caught.value) and not RAW.search(str(caught.value)), caught.value


def test_a_setting_and_the_one_that_it_needs_are_searched_together():
    config = RunConfig(**DIGITS)
    space = read_space({"gradient_clip_val": [None, 1.0], "gradient_clip_algorithm": ["norm", "value"]}, config)
    for params, clipped in [((None, "value"), (None, "norm")), ((1.0, "value"), (1.0, "value"))]:
        trial = apply_params(config.model_dump(), dict(zip(space, params)))
        assert (RunConfig(**trial).gradient_clip_val, RunConfig(**trial).gradient_clip_algorithm) == clipped
    assert check_params(space, {"gradient_clip_algorithm": "value"}) == {"gradient_clip_val": 1.0, "gradient_clip_algorithm": "value"}


def test_a_home_folder_is_the_users(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert RunConfig(**DIGITS, root="~/runs").folder().is_relative_to(tmp_path / "runs")


ODD = [None, True, False, 0, 1, -1, 2, 3, 10**30, -(10**30), 2**31, 2**32, 2**63, 0.0, 0.5, 1.0, -0.0, 1e308, float("nan"), float("inf")]
ODD += ["", "~", "auto", LONG, "../x", "a/b", "x\0y", "\ud800", "{}", "[]", "{", "1e3", "None", "'", '"', "\n", " ", "😀", "ZeRO"]
ODD += [[], [0], [1, 1], [-1], [0, 10**9], [[1]], {}, {"a": 1}, {"a": float("nan")}, {1: 2}, {"a": {"b": {"c": 1}}}, (1, 2), b"x"]
ODD += ["ddp", "cpu", "gpu", "32-true", "bf16", "norm", "min", "csv", "online", "os:system", "nope:Nope", "nope.py:Nope", ":", "a:b:c"]
FIT = {  # values that a field may have, so that some of the drawn settings are runs
    "model_args": lambda draw: {"width": draw.randrange(1, 10**6), "dropout": draw.random()},
    "data_args": lambda draw: {"num_workers": draw.randrange(8)},
    "devices": lambda draw: draw.choice([1, 2, 8, "auto", -1, "2", "0,1", [0, 3]]),
    "strategy": lambda draw: draw.choice(["auto", "ddp", "deepspeed_stage_3", "deepspeed_stage_2_offload"]),
    "max_epochs": lambda draw: draw.randrange(1, 10**6),
    "lr": lambda draw: 10 ** draw.uniform(-12, 3),
    "seed": lambda draw: draw.randrange(2**32),
    "name": lambda draw: "".join(draw.choices(string.ascii_letters + "üß你=_", k=draw.randrange(1, 60))),
    "tags": lambda draw: draw.choice(["a,b", ["a"], "['a', 'b']", ""]),
    "root": lambda draw: draw.choice(["runs", "a/b/../c", "~", "./runs", "r ü n s"]),
}


def test_three_thousand_drawn_settings_each_give_a_sentence_or_a_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    draw, ends, hashes = random.Random(3000), Counter(), {}
    for _ in range(3000):
        fields = draw.sample(list(RunConfig.model_fields), draw.choice([1, 1, 2, 3]))
        odd = {field: draw.choice(ODD) if field not in FIT or draw.random() < 0.4 else FIT[field](draw) for field in fields}
        try:
            config = RunConfig(**DIGITS | odd)
            os.makedirs(config.folder(), exist_ok=True)
        except ValueError as error:
            assert not RAW.search(str(error)), (odd, error)
            ends["a sentence"] += 1
            continue
        again = RunConfig(**json.loads(json.dumps(config.model_dump())))  # as from run.json
        assert (again.folder(), again.hash) == (config.folder(), config.hash), odd
        assert hashes.setdefault(config.hash, config.identity) == config.identity
        ends["a run"] += 1
    print(dict(ends))
    assert ends.total() == 3000 and min(ends["a sentence"], ends["a run"]) > 300
