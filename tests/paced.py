"""A model that takes `PACE` seconds more for each step, as a scheduler looks at its jobs every half minute; the first step makes `STARTED`."""

import os
import time
from pathlib import Path

from dlnb.examples import DigitsNet


class PacedNet(DigitsNet):
    def on_train_batch_start(self, batch, batch_idx):
        if "STARTED" in os.environ:
            Path(os.environ["STARTED"]).touch()
        time.sleep(float(os.environ.get("PACE", 0)))
