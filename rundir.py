"""A run directory: what a run writes, so that nothing already written is ever lost.

    args.json  metrics.jsonl  trajectories.jsonl  checkpoints/step_000100/{adapter..., state.pt}  latest  summary.json

Whole files are written under a temporary name and renamed, so that a run killed at any moment leaves the previous
checkpoint and summary whole. Lines are appended and flushed; on resume, lines of steps that will be run again (and a
half-written last line) are removed. Everything that a step does is a pure function of (seed, step) and the weights, so
a checkpoint needs the adapter, the optimiser and the step, and nothing else.
"""

from __future__ import annotations

import atexit
import io
import json
import os
import pickle
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn

KEEP_CHECKPOINTS = 3
TRAJECTORY_MEGABYTES = 64  # trajectories.jsonl moves to trajectories.1.jsonl at this size, replacing an older one


class RunError(ValueError):
    """A run directory that cannot be used; the message says what to do."""


def end_on_signals(message: str, seconds: float = 1.5) -> None:
    """Ctrl-C and SIGTERM raise KeyboardInterrupt; whoever still waits after `seconds`, for an executor perhaps, is cut off,
    and so is everything at a second signal. seconds=0: at once, as where imports could swallow a KeyboardInterrupt.

    That loses nothing: a run may be killed at any moment, and sandboxes and graders end when we do.
    """
    ending = threading.Event()

    def cut_off() -> None:
        print(message, file=sys.stderr, flush=True)
        os._exit(1)

    def leave() -> None:  # without taking torch apart, which takes seconds during which nothing could cut us off
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)

    def end(number: int, frame: object) -> None:
        if ending.is_set() or seconds == 0:
            cut_off()
        ending.set()
        atexit.register(leave)  # the last to be registered is the first to run
        watch = threading.Timer(seconds, cut_off)
        watch.daemon = True
        watch.start()
        raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, end)


LACKS = {"can't start new thread": "raise `ulimit -u` and `ulimit -v`, or lower --executor-concurrency",
         "out of memory": "lower --micro-batch-tokens, or set --gradient-checkpointing",
         "can't allocate memory": "lower --micro-batch-tokens, or set --gradient-checkpointing"}


@contextmanager
def naming_lacks() -> Iterator[None]:
    """Make an OSError that says what to do of the errors with which Python and torch report that the machine lacks threads
    or memory; other RuntimeErrors are bugs, and pass with their traceback."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        said = f"out of memory {error}" if isinstance(error, MemoryError) else str(error)
        for words, advice in LACKS.items():
            if words in said:
                raise OSError(f"{said.splitlines()[0]}; {advice}. A run goes on with --resume") from error
        raise


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Make an error of writing, such as that of a full disk, say which file it was."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


class RunDir:
    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def require_new(self) -> None:
        """Refuse a directory that holds a run, so that no run is overwritten."""
        if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            raise RunError(f"{self.path} exists; continue it with --resume, or choose another --out")

    def create(self, args: dict[str, Any]) -> None:
        """Make the directory of a new run."""
        self.require_new()
        (self.path / "checkpoints").mkdir(parents=True)
        self.write_json("args.json", args)

    def read_args(self) -> dict[str, Any]:
        try:
            return json.loads((self.path / "args.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise RunError(f"{self.path} is not a run directory: it has no args.json") from None
        except ValueError as error:
            raise RunError(f"{self.path}/args.json is not JSON: {error}") from None

    def write_json(self, name: str, value: Any) -> None:
        temporary = self.path / f"{name}.tmp"
        with naming(temporary):
            temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        temporary.replace(self.path / name)

    def append(self, name: str, *records: dict[str, Any]) -> None:
        path = self.path / name
        if name == "trajectories.jsonl" and path.exists() and path.stat().st_size > TRAJECTORY_MEGABYTES * 2**20:
            path.replace(self.path / "trajectories.1.jsonl")
        with naming(path), path.open("a", encoding="utf-8") as file:
            # surrogates that a model wrote are escaped: a log must always be writable
            file.writelines(json.dumps(record, ensure_ascii=True) + "\n" for record in records)

    def read(self, name: str) -> list[dict[str, Any]]:
        path = self.path / name
        if not path.exists():
            return []
        records = []
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                records.append(json.loads(line))
            except ValueError:  # only a killed run's last line can be torn
                break
        return records

    # ---- checkpoints ---------------------------------------------------------------------------------------------

    def save(self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, sampled: nn.Module | None = None) -> Path:
        """Write checkpoints/step_N whole, point `latest` to it, and remove the oldest ones.

        sampled: the model that samples step N, if it has LoRA weights of its own (--async-depth 1).
        """
        import torch  # late, here and below: flags are read with this file, before torch is imported
        from safetensors import SafetensorError

        from lora import lora_state_dict, save_adapter

        final = self.path / "checkpoints" / f"step_{step:06d}"
        temporary = final.with_name(f"{final.name}.{os.getpid()}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        whole = False
        try:
            save_adapter(model, temporary)
            state = io.BytesIO()  # of a full disk, torch itself says "unexpected pos 255680"
            own = {} if sampled in (None, model) else {"sampled": lora_state_dict(sampled)}
            torch.save({"step": step, "optimizer": optimizer.state_dict(), **own}, state)
            (temporary / "state.pt").write_bytes(state.getbuffer())
            whole = True
        except (SafetensorError, OSError) as error:
            raise OSError(f"checkpoint {final} could not be written: {error}") from error
        finally:
            if not whole:
                shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
        latest = self.path / "latest.tmp"
        latest.write_text(f"checkpoints/{final.name}\n", encoding="utf-8")
        latest.replace(self.path / "latest")
        for old in sorted((self.path / "checkpoints").glob("step_*"))[:-KEEP_CHECKPOINTS]:
            shutil.rmtree(old, ignore_errors=True)
        return final

    def latest(self) -> Path | None:
        """The newest whole checkpoint; None if the run was killed before its first one."""
        pointer = self.path / "latest"
        if not pointer.exists():
            return None
        return self.path / "checkpoints" / Path(pointer.read_text(encoding="utf-8").strip()).name  # in this run, whatever it says

    def restore(self, model: nn.Module, optimizer: torch.optim.Optimizer, sampled: nn.Module | None = None) -> int:
        """Load the newest checkpoint and cut the logs back to it; return the step to go on with."""
        import torch

        from lora import load_adapter

        checkpoint, step = self.latest(), 0
        if checkpoint is not None:
            try:
                load_adapter(model, checkpoint)
                state = torch.load(checkpoint / "state.pt", weights_only=True)
                optimizer.load_state_dict(state["optimizer"])
                if sampled not in (None, model):
                    sampled.load_state_dict(state["sampled"], strict=False)
                step = int(state["step"])
            except (OSError, ValueError, KeyError, TypeError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
                raise RunError(f"{checkpoint} cannot be read ({type(error).__name__}: {error}); write the name of an "
                               f"older one into {self.path / 'latest'}") from None
        self.cut(step)
        return step

    def cut(self, step: int) -> None:
        """Remove what was logged of this step and later ones, and torn checkpoints."""
        for name in ("metrics.jsonl", "trajectories.jsonl"):
            kept = [record for record in self.read(name) if record["step"] < step]
            temporary = self.path / f"{name}.tmp"
            temporary.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
            temporary.replace(self.path / name)
        for torn in (self.path / "checkpoints").glob("*.tmp"):
            shutil.rmtree(torn, ignore_errors=True)


class ReadOnly(RunDir):
    """A run directory for the ranks beside the first: they read what there is and write nothing."""

    def require_new(self) -> None: ...
    def write_json(self, *_: Any) -> None: ...
    def append(self, *_: Any) -> None: ...
    def create(self, *_: Any) -> None: ...
    def save(self, *_: Any) -> None: ...
    def cut(self, *_: Any) -> None: ...
