"""TensorBoard, Weights & Biases and MLflow: they take the figures of metrics.jsonl, and fail as they like.

A run that goes on is the same one there. What it had told them of later steps is not told again.
"""

from __future__ import annotations

import os
import pathlib
import secrets
import sys
import time
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

from fasttrain.system.durable import read_json, write_json
from fasttrain.system.errors import UserError

FINISH_SECONDS = 15.0  # of W&B, for what is not sent when a run ends
PARAMETERS, CHARACTERS = 100, 500  # of MLflow: in a call, and in the value of one


class Attempt(NamedTuple):
    """What a service is told of a run. step: it goes on from. reached: what the attempt before had come to."""

    run: pathlib.Path
    step: int
    reached: int
    settings: Mapping[str, Any]


class Service(Protocol):
    """Any exception ends its use."""

    def write(self, step: int, figures: dict[str, float]) -> None:
        """Take finite figures of a step."""

    def close(self) -> None: ...


class Kept(NamedTuple):
    """What is kept in a file of the run folder. id: the run's at the service, "" for one that is new there. until: the
    step up to which attempts before have told it, where they went beyond the step that this one goes on from."""

    id: str
    step: int
    until: int

    @classmethod
    def read(cls, path: pathlib.Path, attempt: Attempt) -> Kept:
        """Raises UserError for a damaged file."""
        if not path.exists():
            return cls("", attempt.step, attempt.step)
        try:
            content = read_json(path)
            return cls(str(content["id"]), attempt.step, max(int(content["until"]), attempt.reached))
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(f"{path} is damaged: without it the run is a new one there") from error

    def write(self, path: pathlib.Path) -> None:
        write_json(path, {"id": self.id, "until": self.until})

    def lacks(self, step: int) -> bool:
        return not self.step < step <= self.until


class TensorBoard:
    """A curve for every figure, in RUN/tensorboard."""

    def __init__(self, attempt: Attempt) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # which has the figures of later steps hidden
        purge = attempt.step + 1 if attempt.step else None
        self._writer = SummaryWriter(str(attempt.run / "tensorboard"), purge_step=purge)

    def write(self, step: int, figures: dict[str, float]) -> None:
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WandB:
    """Weights & Biases. Its own variables say which project, and whether it goes there at once (WANDB_MODE)."""

    def __init__(self, attempt: Attempt) -> None:
        import wandb

        run, path = attempt.run, attempt.run / "wandb-run.json"
        kept = Kept.read(path, attempt)
        self._kept = kept._replace(id=kept.id or secrets.token_hex(4))
        self._kept.write(path)
        settings = wandb.Settings(console="off", silent=True)
        if hasattr(settings, "finish_timeout"):
            settings.finish_timeout = FINISH_SECONDS
        self._run = wandb.init(
            id=self._kept.id, resume="allow", name=run.resolve().name, config=dict(attempt.settings),
            dir=os.environ.get("WANDB_DIR") or str(run), settings=settings,
        )  # fmt: skip
        self._run.define_metric("*", step_metric="step")  # its own count can't go back as a run does
        print(f"wandb: {self._run.url or self._run.dir}", file=sys.stderr, flush=True)

    @staticmethod
    def check() -> None:
        """Raises UserError where it would ask for a key, or does not like the one it has."""
        import wandb

        try:
            mode = wandb.setup(wandb.Settings(console="off", silent=True)).settings.mode
            if mode not in ("offline", "dryrun", "disabled"):
                wandb.login(verify=False)
        except wandb.Error as error:
            raise UserError(f"--wandb: {error} Or set WANDB_MODE=offline") from None

    def write(self, step: int, figures: dict[str, float]) -> None:
        if self._kept.lacks(step):
            self._run.log({"step": step, **figures})

    def close(self) -> None:
        self._run.finish()


class MLflow:
    """MLflow. Its own variables say where (MLFLOW_TRACKING_URI), and as which experiment (MLFLOW_EXPERIMENT_NAME)."""

    def __init__(self, attempt: Attempt) -> None:
        from mlflow import MlflowClient

        path = attempt.run / "mlflow-run.json"
        kept = Kept.read(path, attempt)
        self._client = MlflowClient()
        if kept.id:
            self._client.update_run(kept.id, status="RUNNING")
        else:
            name = attempt.run.resolve().name
            kept = kept._replace(id=self._client.create_run(self._experiment(), run_name=name).info.run_id)
            self._log_settings(kept.id, attempt.settings)
        kept.write(path)
        self._kept = kept

    @staticmethod
    def check() -> None:
        """Raises UserError where MLFLOW_TRACKING_URI is one that can't be used here."""
        from mlflow import MlflowClient

        try:
            MlflowClient()
        except Exception as error:
            raise UserError(f"--mlflow: {' '.join(str(error).split())[:300]}") from None

    def _experiment(self) -> str:
        """The experiment that is named, made where there is none."""
        if found := os.environ.get("MLFLOW_EXPERIMENT_ID"):
            return found
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "Default")
        experiment = self._client.get_experiment_by_name(name)
        return experiment.experiment_id if experiment else self._client.create_experiment(name)

    def _log_settings(self, run_id: str, settings: Mapping[str, Any]) -> None:
        from mlflow.entities import Param

        parameters = [Param(name, str(value)[:CHARACTERS]) for name, value in settings.items()]
        for first in range(0, len(parameters), PARAMETERS):
            self._client.log_batch(run_id, params=parameters[first : first + PARAMETERS])

    def write(self, step: int, figures: dict[str, float]) -> None:
        from mlflow.entities import Metric

        if self._kept.lacks(step):
            now = int(1000 * time.time())
            metrics = [Metric(name, value, now, step) for name, value in figures.items()]
            self._client.log_batch(self._kept.id, metrics)

    def close(self) -> None:
        self._client.set_terminated(self._kept.id)
