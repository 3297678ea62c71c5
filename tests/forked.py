"""Programs in processes of their own that begin as forks of one that has torch: to start Python and import it takes seconds.

The process that they are forked from has imported packages of others and nothing of ours, and has one thread.
"""

import atexit
import os
import runpy
import socket
import sys
from pathlib import Path

import torch.multiprocessing

ROOT = Path(__file__).parent.parent
FORKS = torch.multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["torch._dynamo", "torch.distributed.fsdp", "safetensors.torch", "tokenizers", "tqdm", "pytest"])


class Program(FORKS.Process):
    """`python SCRIPT words...` in the repository; what it prints is in `out` and `err`, two files in `place`."""

    def __init__(self, script: Path, *words: object, place: Path, **environment: object) -> None:
        super().__init__(daemon=True)
        place.mkdir(parents=True, exist_ok=True)
        self.words, self.environment = [str(script), *map(str, words)], {key: str(value) for key, value in environment.items()}
        self.out, self.err = place / "out", place / "err"
        self.start()

    def run(self) -> None:
        for path, standard in ((self.out, 1), (self.err, 2)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), standard)
        os.chdir(ROOT)
        os.environ |= self.environment
        sys.argv, sys.path[0] = self.words, str(Path(self.words[0]).parent)
        try:
            runpy.run_path(self.words[0], run_name="__main__")
        finally:
            atexit._run_exitfuncs()                          # as a Python does that ends, and multiprocessing does not

    def ended(self, seconds: float = 300) -> int:
        """Wait for its end; return its exit code (minus the number of the signal that ended it)."""
        self.join(seconds)
        assert self.exitcode is not None, f"{self.words} has not ended after {seconds} s: {self.err.read_text()[-2000:]}"
        return self.exitcode


def as_ranks(size: int, script: Path, *words: object, place: Path) -> list[Program]:
    """The processes that torchrun would start, with its variables; one process without any."""
    if size == 1:
        return [Program(script, *words, place=place)]
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    return [Program(script, *words, place=place / f"rank{rank}", RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=size,
                    MASTER_ADDR="127.0.0.1", MASTER_PORT=port, TORCHELASTIC_RUN_ID="by hand") for rank in range(size)]
