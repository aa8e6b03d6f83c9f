"""A model that takes `PACE` seconds more for each step: a scheduler looks at its jobs every half minute."""

import os
import time

from dlnb.examples import DigitsNet


class PacedNet(DigitsNet):
    def on_train_batch_start(self, batch, batch_idx):
        time.sleep(float(os.environ.get("PACE", 0)))
