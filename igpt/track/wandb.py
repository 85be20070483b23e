"""Weights & Biases. Its settings come from its own environment variables, such as WANDB_PROJECT and WANDB_MODE=offline.

WORKDIR/wandb/ has its files. If the network fails, `wandb sync` uploads them later.
"""

import os
from pathlib import Path

import wandb

PROJECT = "igpt"  # unless WANDB_PROJECT names another
SECONDS = 120.0  # that a start or an end waits for the network
SETTINGS = {
    "console": "off",  # the bar is no text to keep
    **dict.fromkeys(("init_timeout", "login_timeout", "finish_timeout"), SECONDS),
    "x_transaction_log_flush_interval": 1.0,  # seconds of records that a kill may lose; W&B's default is 15
}


class WeightsAndBiases:
    """One run of W&B. A resumed run has the id of its first start, and therefore continues the same record."""

    def __init__(self, folder: Path, config: dict, kind: str, identity: str, name: str = ""):
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            id=identity,
            name=name or str(folder),
            job_type=kind,
            dir=str(folder),
            config=config,
            resume="allow",
            allow_val_change=True,  # a resumed run may train for more steps, for example
            settings=wandb.Settings(**{x: SETTINGS[x] for x in SETTINGS if x in wandb.Settings.model_fields}),
        )
        self.known = self.run.step  # steps before this one are there already: W&B's steps never go back

    def scalars(self, step: int, values: dict) -> None:
        if step >= self.known:
            self.run.log(values, step=step)

    def picture(self, step: int, name: str, picture) -> None:
        self.scalars(step, {name: wandb.Image(picture)})

    def summary(self, step: int, values: dict[str, float]) -> None:
        self.scalars(step, values)
        self.run.summary.update(values)

    def flush(self) -> None:
        """Does nothing: W&B's own process writes every second all steps but the last, which may still grow."""

    def close(self, failed: bool) -> None:
        self.run.finish(exit_code=int(failed))
