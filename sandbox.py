"""Runs untrusted Python in a contained child process.

    run_program(code, stdin)     what did this program print?
    run_tests(code, tests)       does it pass?  The program cannot forge the verdict (judge.py says how).
    python sandbox.py --doctor   which layers of containment hold on this machine?
Three decisions. (1) Containment is a list of layers that one probe settles per process: namespaces by system calls where
they work, else bubblewrap (whose /tmp bounds bytes, not files), and in either a throw-away uid, Landlock and seccomp. A
layer that fails later is a SandboxError, never a silent downgrade. (2) Program and tests never share an interpreter, since
in one process a program can patch whatever judges it. (3) Nothing is forked from the caller, perhaps a trainer full of
threads: contain.py makes the children.

Covered (level `full`): files, environment, processes, network, IPC and descriptors of the host; time, output, disk, memory,
processes; daemons; the privileges of root. Not covered: kernel exploits and side channels (the host's kernel is shared:
train in a VM or container without credentials); a few times `memory_mb`, when a program spreads it over processes; at a
lower level, what the doctor shows as OPEN. A program can read the arguments of its tests, never the expected values.
SANDBOX=bwrap, =namespaces or =plain in the environment forces a mechanism.
"""
from __future__ import annotations

import functools
import inspect
import json
import marshal
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import types
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, BinaryIO

import codec
import contain
import judge
import memo
import wire

NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d{1,4})?", re.ASCII)  # that Decimal compares in no time
OUTPUT_LIMIT = 1 << 20  # bytes of stdout, and of stderr
# Two runs a core: a wall-clock limit means nothing when children starve one another.
_SLOTS = threading.BoundedSemaphore(2 * (os.cpu_count() or 1))
_PROBE_LOCK = threading.Lock()
LEVELS = {"limits": "time, memory, output and processes are bounded",
          "files": "besides, files, environment and processes of others are out of reach",
          "full": "besides, there is no network and nothing else outside: all that the probe tries is closed"}


class SandboxError(RuntimeError):
    """The sandbox itself failed (no descriptor, disk full, a layer refused): says nothing about the program."""


@dataclass(frozen=True)
class RunResult:
    """What a program did; status is ok | error | timeout | memory | output | killed (by a signal)."""
    status: str
    stdout: str
    stderr: str
    seconds: float


@dataclass(frozen=True)
class TestResult:
    """Verdict of the tests; `error` shows up to three failures. It begins with "timeout" or "no verdict" for those."""
    __test__ = False  # not a pytest class
    passed: bool
    n_passed: int
    n_total: int
    error: str
    seconds: float


@contextmanager
def _infrastructure() -> Iterator[None]:
    """Whatever the operating system refuses us is our failure, not the program's."""
    try:
        yield
    except OSError as error:
        raise SandboxError(f"the sandbox could not be set up: {error}") from error


@functools.cache
def _inside() -> tuple[types.CodeType, dict[str, types.CodeType]]:
    """The children's code, compiled once here instead of once in every child: contain.py; what the roles need, in order."""
    code = {it.__name__: compile(inspect.getsource(it), f"{it.__name__}.py", "exec") for it in (contain, codec, wire, judge)}
    return code.pop("contain"), code


@dataclass
class _Child:
    """A sandboxed process that has been started."""
    process: subprocess.Popen
    reports: int  # read end of the pipe to which the child's supervisors write
    deadline: float

    def report(self) -> list[str]:
        """Wait for the first line: [done | timeout | stopped | killed, wait status, seconds, CPU seconds]."""
        poll = select.poll()
        poll.register(self.reports, select.POLLIN)
        if not poll.poll(max(self.deadline - time.monotonic(), 0) * 1000):
            raise SandboxError("the sandbox's supervisor does not answer")
        line = os.read(self.reports, 4096).decode(errors="replace").partition("\n")[0]
        if not line or line.startswith("setup"):
            raise SandboxError(f"the sandbox did not start: {line or 'no report'}")
        self.process.wait()  # only now is everything swept away
        return line.split()

    def check_setup(self) -> None:
        """Stop the child; raise if it never ran, and not because it was stopped."""
        self.stop()
        os.set_blocking(self.reports, False)
        try:
            line = os.read(self.reports, 4096)
        except BlockingIOError:
            return
        if line.startswith(b"setup"):
            raise SandboxError(f"the sandbox did not start: {line.decode(errors='replace')}")

    def stop(self) -> None:
        if self.process.args[0].endswith("bwrap") and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)  # all of it: half started, bwrap's child would wait for ever
        self.process.terminate()  # the supervisor kills the job and then ends
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def _file() -> BinaryIO:
    """An anonymous file; in memory where that exists, so that a full disk hurts nobody."""
    return os.fdopen(os.memfd_create("sandbox"), "w+b") if sys.platform == "linux" else tempfile.TemporaryFile()


def _start(stack: ExitStack, layers: tuple[str, ...], role: tuple[str, str], config: dict, timeout: float, memory_mb: int = 512,
           files: tuple = (subprocess.DEVNULL,) * 3, keep: tuple[int, ...] = ()) -> _Child:
    """Start a child that plays `role` (module, function) and gets `keep`; `stack` stops it and removes what it leaves."""
    readable, path = contain.directories()
    layers = (*layers, "limits", "drop", *(("root",) if "namespaces" in layers else ()))
    workdir = "/tmp"  # of its own
    if not {"bwrap", "namespaces"} & set(layers):
        workdir = tempfile.mkdtemp(prefix="sandbox-")
        stack.callback(_remove, workdir)
    reports, report = os.pipe()
    stack.callback(os.close, reports)
    with ExitStack() as ours, _file() as payload:
        ours.callback(os.close, report)
        marshal.dump((*_inside(), {
            **config, "role": role, "layers": layers, "timeout": timeout, "memory": memory_mb << 20,
            "readable": readable, "path": path, "workdir": workdir, "keep": keep, "report": report,
            "caller": os.getpid()}), payload)
        payload.seek(0)
        bootstrap = (f"import marshal; file = open({payload.fileno()}, 'rb'); code, roles, config = marshal.load(file); "
                     "file.close(); exec(code); boot(config, roles)")
        environment = {"PATH": "/usr/bin:/bin", "HOME": workdir, "TMPDIR": workdir, "LANG": "C.UTF-8",
                       "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2",
                       "PYTHONHASHSEED": "0"}  # the order of a set must not decide a verdict
        # Not -I: it would ignore PYTHONHASHSEED; the environment is ours and sys.path is set by the bootstrap.
        command = [os.path.realpath(sys.executable), "-s", "-S", "-B", "-X", "utf8", "-c", bootstrap]
        outer = [shutil.which("bwrap"), *contain.bubblewrap(readable, "uid" in layers)] if "bwrap" in layers else []
        process = subprocess.Popen([*outer, *command], cwd="/", env=environment, stdin=files[0], stdout=files[1],
                                   stderr=files[2], start_new_session=True, pass_fds=(payload.fileno(), report, *keep))
    child = _Child(process, reports, time.monotonic() + timeout + 60)
    stack.callback(child.stop)
    return child


def _remove(directory: str) -> None:
    """Remove what an untrusted program left behind; rm copes with depths and links on which shutil.rmtree fails."""
    try:
        os.rmdir(directory)
    except OSError:
        subprocess.run(["chmod", "-R", "u+rwx", "--", directory], stderr=subprocess.DEVNULL, check=False)
        subprocess.run(["rm", "-rf", "--one-file-system", "--", directory], stderr=subprocess.DEVNULL, check=False)


def _probe(layers: tuple[str, ...]) -> list[str]:
    """Run the probe program under these layers; return what it could do (keys of contain.OPENINGS)."""
    with tempfile.TemporaryDirectory() as directory, socket.create_server(("127.0.0.1", 0)) as server:
        os.chmod(directory, 0o777)
        code = contain.PROBE.format((os.getpid(), os.path.join(directory, "escaped"), server.getsockname()[1]))
        result = _run(layers, code, "", 10.0, 512)
    if result.status != "ok":
        raise SandboxError(f"the probe ended with {result.status}: {result.stderr[-500:]}")
    return result.stdout.split()


@dataclass(frozen=True)
class _Settled:
    """What holds on this machine: layers in force, what a program can still do, why a layer is missing."""
    layers: tuple[str, ...]
    openings: tuple[str, ...]
    missing: dict[str, str]

    @property
    def level(self) -> str:
        return "full" if not self.openings else "files" if set(self.openings) <= {"tcp", "udp", "outside"} else "limits"


@functools.cache
def _settle(forced: str) -> _Settled:
    """Try everything, drop what this machine refuses. Raises SandboxError where root could not be dropped."""
    missing = {} if shutil.which("bwrap") else {"bwrap": "not installed"}
    uid = ("uid",) if contain.can_drop() else ()
    for mechanism in ("namespaces", "bwrap", "plain"):
        layers: tuple[str, ...] = (mechanism, "oom", *uid, "landlock", "seccomp")
        while mechanism in layers and mechanism not in missing and forced in ("", mechanism):
            if os.getuid() == 0 and mechanism == "plain" and "uid" not in layers:
                raise SandboxError(f"programs would run as root here: {missing}")
            try:
                openings = _probe(layers)
            except SandboxError as error:
                if re.search(r"\[Errno (11|12|23|24)\]", str(error)):  # out of processes, memory, descriptors: no less
                    raise  # containment for the rest of the run, because of one bad moment
                match = re.search(r"did not start: setup (\w+) (.*)", str(error))
                cause = match and {"root": "namespaces", "drop": "uid"}.get(match[1], match[1])
                if cause not in layers:
                    missing[mechanism] = str(error)
                    break
                missing[cause], layers = match[2], tuple(layer for layer in layers if layer != cause)
                continue
            if openings and mechanism == "namespaces" and "bwrap" not in missing:
                missing["namespaces"] = f"they leave open: {openings}"
                break
            if openings:
                can = ", ".join(contain.OPENINGS[key] for key in openings)
                warnings.warn(f"programs in the sandbox can {can} here; see python sandbox.py --doctor, install bubblewrap",
                              RuntimeWarning, stacklevel=4)
            return _Settled(layers, tuple(openings), missing)
    raise SandboxError(f"no sandbox works here{forced and f' with SANDBOX={forced}'}: {missing}")


def _settled() -> _Settled:
    """Probed once per process, by the first caller."""
    if os.name != "posix":
        raise SandboxError("the sandbox needs Linux (or, with fewer layers, another POSIX system)")
    with _PROBE_LOCK:
        return _settle(os.environ.get("SANDBOX", ""))


def _layers() -> tuple[str, ...]:
    return _settled().layers


def require(level: str) -> None:
    """Raise SandboxError unless this machine contains programs at this level (see LEVELS) or a higher one."""
    settled, order = _settled(), list(LEVELS)
    if order.index(settled.level) < order.index(level):
        can = ", ".join(contain.OPENINGS[key] for key in settled.openings)
        raise SandboxError(f"sandbox level {level} is required, but programs can {can} here (level {settled.level}); "
                           "see python sandbox.py --doctor")


def _read(file: BinaryIO, limit: int = OUTPUT_LIMIT) -> tuple[str, bool]:
    """(the text of a child's output file up to `limit` bytes, whether there was more)."""
    size = os.fstat(file.fileno()).st_size
    return os.pread(file.fileno(), min(size, limit), 0).decode(errors="replace"), size > limit


def _run(layers: tuple[str, ...], code: str, stdin: str, timeout: float, memory_mb: int) -> RunResult:
    """run_program under the given layers. Output goes to files, not pipes: a file-size limit bounds a flood."""
    with _infrastructure(), ExitStack() as stack:
        files = tuple(stack.enter_context(_file()) for _ in range(3))
        files[0].write(stdin.encode("utf-8", "surrogatepass"))
        files[0].seek(0)
        child = _start(stack, layers, ("", "program"), {"code": code}, timeout, memory_mb, files)
        cause, status, seconds, cpu = child.report()
        (stdout, more_out), (stderr, more_err) = map(_read, files[1:])
    returncode = os.waitstatus_to_exitcode(int(status))
    last_line = stderr.rstrip().removesuffix("()\nlost sys.stderr").rpartition("\n")[2].removeprefix("object repr     : ")  # 3.13
    if more_out or more_err:
        status = "output"
    elif cause == "timeout" or (returncode == -signal.SIGKILL and float(cpu) > timeout):
        status = "timeout"
    elif cause == "memory" or (returncode == 1 and "MemoryError" in last_line.partition(":")[0]):
        status = "memory"
    elif cause != "done" or returncode < 0:
        status = "killed"
    else:
        status = "error" if returncode else "ok"
    return RunResult(status, stdout, stderr, float(seconds))


def run_program(code: str, stdin: str = "", timeout: float = 5.0, memory_mb: int = 512) -> RunResult:
    """Run a whole program; `timeout` in seconds of wall clock, `memory_mb` of address space per process.

    The time starts when the contained process does, not while the call waits for its turn.
    """
    with _SLOTS:
        return _run(_layers(), code, stdin, timeout, memory_mb)


def _same_output(got: str, expected: str) -> bool:
    """Equal token by token in lines that are not blank: as text, or as numbers. Numbers agree as numpy.allclose has it
    (APPS' rule), but two integers exactly."""
    def same(one: str, other: str) -> bool:
        if not (NUMBER.fullmatch(one) and NUMBER.fullmatch(other)):
            return one == other
        slack = 0 if re.fullmatch(r"[+-]?\d+ [+-]?\d+", f"{one} {other}") else Decimal("1e-8") + abs(Decimal(other)) / 100_000
        return abs(Decimal(one) - Decimal(other)) <= slack

    lines, wanted = ([line.split() for line in text.splitlines() if line.strip()] for text in (got, expected))
    return [*map(len, lines)] == [*map(len, wanted)] and all(all(map(same, *pair)) for pair in zip(lines, wanted, strict=True))


def _text(value: Any) -> str:
    """stdin or stdout of a case; some data sets store a list of lines."""
    return "\n".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _run_cases(code: str, cases: list[dict], timeout: float) -> TestResult:
    """Stdin/stdout cases: one run each, all within `timeout`; the comparison happens here."""
    passed, errors, seconds = 0, [], 0.0
    for case in cases:
        result = run_program(code, _text(case["input"]), max(timeout - seconds, 0.01))
        seconds += result.seconds
        if result.status == "timeout":
            errors.insert(0, f"timeout: not done after {timeout:g} s, at input {_text(case['input'])[:200]!r}")
            break
        if result.status != "ok":
            errors.append(f"input {_text(case['input'])[:200]!r}: {result.status}: {result.stderr.strip()[-300:]}")
        elif not _same_output(result.stdout, _text(case["output"])):
            errors.append(f"input {_text(case['input'])[:200]!r}: expected {_text(case['output'])[:200]!r}, "
                          f"printed {result.stdout[:200]!r}")
        else:
            passed += 1
    return TestResult(passed == len(cases), passed, len(cases), "\n".join(errors[:3]), seconds)


def run_tests(code: str, tests: str | list, entry_point: str | None = None, timeout: float = 10.0) -> TestResult:
    """Judge a program; passes only if there is at least one test and all pass within `timeout` seconds together.

    tests: Python text (asserts, `def check(candidate)`, test functions, unittest), or a list of {"input", "output"}:
    stdin and stdout of whole programs or, with `entry_point`, arguments and value of calls (tuple and list alike).
    """
    if not tests or (isinstance(tests, str) and not tests.strip()):
        return TestResult(False, 0, 0, "there are no tests", 0.0)
    if isinstance(tests, list) and entry_point is None:
        return _run_cases(code, tests, timeout)
    layers = _layers()
    with _SLOTS, _infrastructure(), ExitStack() as stack:
        verdict = stack.enter_context(_file())
        ours, theirs = (stack.enter_context(end) for end in socket.socketpair())
        begin = time.monotonic()
        program = _start(stack, layers, ("wire", "candidate"), {"code": code, "wire": theirs.fileno()}, timeout + 5,
                         keep=(theirs.fileno(),))
        config = {"tests": tests, "entry_point": entry_point, "limit": timeout, "wire": ours.fileno(),
                  "verdict": verdict.fileno(), "nonce": os.urandom(16).hex()}
        tester = _start(stack, layers, ("judge", "judge"), config, timeout + 1, keep=(ours.fileno(), verdict.fileno()))
        ours.close()
        theirs.close()  # now each process sees the end of the other
        cause = tester.report()[0]
        seconds = time.monotonic() - begin
        program.check_setup()
        lines = [line for line in _read(verdict, 8 << 20)[0].split("\n") if line.startswith(f'["{config["nonce"]}", ')]
        _, n_passed, n_total, error, done = json.loads(lines[-1]) if lines else ("", 0, 0, "", False)
        error = error.encode(errors="replace").decode()  # what a program raised may hold half a surrogate pair
    if not done:
        stopped = f"timeout: the tests were not done after {timeout:g} s" if cause == "timeout" else "no verdict"
        error = "\n".join(filter(None, [stopped, error]))
    elif n_total == 0:
        error = error or "there are no tests"
    return TestResult(done and 0 < n_total == n_passed and not error, n_passed, n_total, error, seconds)


def _is_property(result: Any) -> bool:
    """Whether a result tells of the program, and not of the machine's load while it ran."""
    if isinstance(result, RunResult):
        return result.status in ("ok", "error")
    return not (isinstance(result, TestResult) and result.error.startswith(("timeout", "no verdict")))


memoised = functools.partial(memo.memoised, keep=_is_property)


def doctor() -> str:
    """What holds on this machine, as text."""
    settled = _settled()
    lines = [f"level {settled.level}: {LEVELS[settled.level]}"]
    for layer, text in contain.LAYERS.items():
        state = "in force" if layer in settled.layers else "always" if layer == "limits" else "MISSING"
        why = f" ({settled.missing.get(layer, 'not needed, or not for this user')})" if state == "MISSING" else ""
        lines.append(f"{state:9s} {layer:11s} {text}{why}")
    lines += [f"{'OPEN' if key in settled.openings else 'closed':9s} {text}" for key, text in contain.OPENINGS.items()]
    return "\n".join([*lines, "This stops accidents and known attacks, not a kernel exploit: train in a VM without credentials."])


if __name__ == "__main__":
    print(doctor() if sys.argv[1:] == ["--doctor"] else sys.exit("usage: python sandbox.py --doctor"))
