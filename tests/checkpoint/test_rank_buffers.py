"""Buffers that differ between ranks are those of an uninterrupted training after a resume."""

import pytest
from safetensors.torch import load_file
from trainings import TRACED, Training


@pytest.mark.timeout(400)
def test_a_module_that_steps_itself_on_two_ranks_resumes_to_the_same_bytes(tmp_path):
    settings = dict(model=f"{TRACED}:SteppedByHand", optimizer="auto", lr=1e-3, max_epochs=2, save_every_n_steps=5)
    whole = Training(tmp_path / "whole", "ddp", 2, **settings)
    assert whole.done.returncode == 0, whole.done.stderr[-3000:]
    stopped = Training(tmp_path / "stopped", "ddp", 2, {"STOP_AT": "96"}, **settings)
    again = Training(tmp_path / "again", "ddp", 2, resume=str(stopped.folder), **settings)
    assert again.record["status"] == "finished", again.done.stderr[-3000:]
    found, expected = (load_file(training.folder / "model.safetensors") for training in (again, whole))
    assert all(found[name].numpy().tobytes() == expected[name].numpy().tobytes() for name in expected)
