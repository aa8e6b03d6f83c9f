"""A model that is made in `configure_model` starts as under ddp, and under ZeRO 3 no rank ever holds all of it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY


def started(folder: Path, strategy: str) -> list[dict]:
    "What each of two ranks has measured."
    folder.mkdir()
    # glibc keeps freed memory of a layer's size for later, unless it is mapped: what a rank holds is what is asked here
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "1000000", "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, str(REPOSITORY / "tests" / "sharded_start.py"), strategy]
    subprocess.run(command, check=True, cwd=folder, env=environment, timeout=300, capture_output=True)
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.timeout(700)
def test_under_zero_3_each_rank_makes_its_part_of_the_same_model(tmp_path):
    full, sharded = started(tmp_path / "ddp", "ddp"), started(tmp_path / "zero", "deepspeed_stage_3")
    assert full[0]["sum"] == full[1]["sum"] == pytest.approx(sum(rank["sum"] for rank in sharded), rel=1e-12)
    assert all(rank["grown"] > 0.95 * rank["whole"] for rank in full)
    assert all(rank["grown"] < 0.65 * rank["whole"] for rank in sharded)  # half of it, and one layer of twelve at a time
