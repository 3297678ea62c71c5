"""--tensorboard and --wandb: the numbers of metrics.jsonl, under the same names, where some people look at them.

Both packages are imported only when they are asked for. metrics.jsonl stays the record; nothing is read back from these.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

MODULES = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb"}  # flag, which is the package, -> what is imported


class TrackerError(ValueError):
    """A tracker that was asked for is not installed; the message says what to install."""


def require(*names: str) -> None:
    """Import what these flags need. TrackerError says what to install."""
    for name in names:
        try:
            importlib.import_module(MODULES[name])
        except ImportError as error:
            raise TrackerError(f"--{name} needs a package that cannot be imported ({error}): pip install {name}") from None


class Trackers:
    """Those that were asked for. `log` is called with every step's row, `close` at the end."""

    def __init__(self, directory: Path, flags: dict[str, Any], start_step: int, tensorboard: bool, wandb: bool) -> None:
        self._log: list[Callable[[int, dict[str, float]], None]] = []
        self._close: list[Callable[[], None]] = []
        if tensorboard:
            self._tensorboard(directory, start_step)
        if wandb:
            self._wandb(directory, flags)

    def log(self, row: dict[str, Any]) -> None:
        """Hand on every number of a row of metrics.jsonl."""
        numbers = {name: value for name, value in row.items() if isinstance(value, (int, float)) and name != "step"}
        for write in self._log:
            write(row["step"], numbers)

    def close(self) -> None:
        for end in self._close:
            end()

    def _tensorboard(self, directory: Path, start_step: int) -> None:
        module = importlib.import_module(MODULES["tensorboard"])
        writer = module.SummaryWriter(str(directory / "tensorboard"), purge_step=start_step)  # resuming writes these again

        def write(step: int, numbers: dict[str, float]) -> None:
            for name, value in numbers.items():
                writer.add_scalar(name, value, step)
            writer.flush()

        self._log.append(write)
        self._close.append(writer.close)

    def _wandb(self, directory: Path, flags: dict[str, Any]) -> None:
        wandb = importlib.import_module(MODULES["wandb"])
        run = wandb.init(project="flowsteer", name=directory.name, dir=str(directory), config=flags)
        self._log.append(lambda step, numbers: run.log(numbers, step=step))
        self._close.append(run.finish)
