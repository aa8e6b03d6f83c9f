"""A callback under which all ranks fail in the same step, and rank 0 takes a while to complete what it writes."""

import time
from pathlib import Path

from lightning.pytorch import Callback

SECONDS = 5  # longer than anyone waits for a rank that does not say that it completes something


class Fails(Callback):
    def on_train_batch_end(self, trainer, *rest):
        raise ValueError("on all ranks")

    def on_exception(self, trainer, *rest):
        if trainer.is_global_zero:
            time.sleep(SECONDS)
            Path(trainer.default_root_dir, "completed").touch()
