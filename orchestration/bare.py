"""A TorchTrainer that does nothing: it sleeps its steps and reports. What a fault costs it is what Ray itself takes.

RAY_ADDRESS=... python -m orchestration.bare FILE FOLDER    a line "pid step" in FILE per step; Ray's own in FOLDER
"""

import logging
import os
import sys
import time
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.train.torch import TorchTrainer

from orchestration.connection import POLL_S

STEP_S = 0.05
STEPS = 100_000
REPORT_EVERY = 200


def sleep_through(config: dict[str, Any]) -> None:
    """What the worker runs."""
    for step in range(1, STEPS + 1):
        time.sleep(STEP_S)
        with Path(config["file"]).open("a") as file:
            file.write(f"{os.getpid()} {step}\n")
        if step % REPORT_EVERY == 0:
            ray.train.report({"step": step})


def main() -> int:
    file, folder = sys.argv[1:]
    os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = POLL_S  # as orchestration/worker.py has it
    ray.init(address="auto", log_to_driver=False, logging_level=logging.ERROR)
    TorchTrainer(
        sleep_through,
        train_loop_config={"file": file},
        scaling_config=ray.train.ScalingConfig(num_workers=1, resources_per_worker={"CPU": 1}),
        run_config=ray.train.RunConfig(
            name="bare", storage_path=folder, failure_config=ray.train.FailureConfig(max_failures=-1)
        ),
    ).fit()
    return 0


if __name__ == "__main__":
    sys.exit(main())
