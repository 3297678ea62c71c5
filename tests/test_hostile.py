"""Hostile programs: each succeeds against a naive runner (a plain subprocess and its exit code) and fails against ours.

ESCAPES do harm outside of themselves: they print ESCAPED or the secret, change a file, hurt or outlive a process, reach a
server, hang or flood their caller. FORGERIES pass tests of which they compute nothing.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import sandbox
from sandbox import run_program, run_tests

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="the attacks are written against Linux"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]
TOKEN = "hunter2"
ESCAPES = {
    # ---- files
    "read a file": "print(open(secret).read())",
    "read it through a symbolic link": "os.symlink(secret, 'l'); print(open('l').read())",
    "read it through a hard link": "os.link(secret, 'h'); print(open('h').read())",
    "see that a file exists": "os.path.exists(secret) and escaped()",
    "list a directory": "os.path.basename(secret) in os.listdir(os.path.dirname(secret)) and escaped()",
    "overwrite a file": "open(secret, 'w').write('x')",
    "append by pwrite": "os.pwrite(os.open(secret, os.O_WRONLY), b'x', 0)",
    "truncate a file": "os.truncate(secret, 0)",
    "delete a file": "os.remove(secret)",
    "rename a file": "os.rename(secret, secret + '.moved')",
    "make a file unreadable": "os.chmod(secret, 0)",
    "create a file": "open(target, 'w')",
    "create a fifo": "os.mkfifo(target)",
    "bind a socket in a directory": "socket.socket(socket.AF_UNIX).bind(target)",
    "copy with a shell": "os.system(f'cp {secret} {target}')",
    "leave a file in /tmp": "open('/tmp/' + mark, 'w'); time.sleep(.1)",
    "leave shared memory": "open('/dev/shm/' + mark, 'w')",
    "clean up behind a link": "os.symlink(os.path.dirname(secret), 'l'); shutil.rmtree(os.path.realpath('l'))",
    "climb out by ..": "print(open('../' * 40 + secret).read())",
    "climb out by /proc/self/root": "print(open('/proc/self/root' + secret).read())",
    "climb out by another process's root": "print(open(f'/proc/{caller}/root{secret}').read())",
    "open by file handle": "h = (ctypes.c_char * 136)(128); m = ctypes.c_int()\n"
    "libc.name_to_handle_at(-100, secret.encode(), h, ctypes.byref(m), 0) == 0 and "
    "libc.open_by_handle_at(os.open('/', 0), h, 0) > 0 and escaped()",
    "poison the interpreter's packages": "p = os.path.dirname(os.__file__) + '/' + mark + '.pth'; open(p, 'w'); escaped()",
    "poison the interpreter's cache": "os.access(os.path.dirname(os.__file__) + '/__pycache__', os.W_OK) and escaped()",
    "read the users of the machine": "open('/etc/passwd').read() and escaped()",
    "read the sandbox's own code": f"open({sandbox.__file__!r}) and escaped()",
    "fill a directory": "[open(str(i), 'w').close() for i in range(5000)]; escaped()",
    "write a large file": "open('f', 'wb').write(bytes(20 << 20)); escaped()",
    "write many large files": "[open(str(i), 'wb').write(bytes(7 << 20)) for i in range(12)]; escaped()",
    # ---- processes
    "read the environment": "print(os.environ.get('TOKEN'))",
    "read the caller's environment": "b'\\0PATH=' in open(f'/proc/{caller}/environ', 'rb').read() and "
    "b'MALLOC_ARENA_MAX' not in open(f'/proc/{caller}/environ', 'rb').read() and escaped()",
    "read a command line": "mark in open(f'/proc/{victim}/cmdline').read() and escaped()",
    "open the memory of a process": "open(f'/proc/{victim}/mem', 'rb') and escaped()",
    "list the descriptors of a process": "len(os.listdir(f'/proc/{caller}/fd')) > 5 and escaped()",
    "attach to a process": "libc.ptrace(16, victim, 0, 0) == 0 and escaped()",
    "attach to its own parent": "libc.ptrace(16, victim if os.getppid() == caller else os.getppid(), 0, 0) == 0 and escaped()",
    "kill a process": "os.kill(victim, 9)",
    "stop a process": "os.kill(victim, signal.SIGSTOP)",
    "kill by pidfd": "signal.pidfd_send_signal(os.pidfd_open(victim), 9)",
    "renice a process": "os.setpriority(os.PRIO_PROCESS, victim, 5); escaped()",
    "a daemon": "subprocess.Popen(['/bin/sleep', mark], start_new_session=True, stdout=subprocess.DEVNULL)",
    "a daemon that holds stdout": "subprocess.Popen(['/bin/sleep', mark], start_new_session=True)",
    "a daemon by double fork": "if os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n        os.closerange(0, 9)\n"
    "        os.execv('/bin/sleep', ['sleep', mark])\n    os._exit(0)\ntime.sleep(.2)",
    "a daemon that ignores signals": "if os.fork() == 0:\n    [signal.signal(s, signal.SIG_IGN) for s in (1, 2, 15)]\n"
    "    os.setsid()"
    "\n    os.closerange(0, 9)\n    os.execv('/bin/sleep', ['sleep', mark])",
    "many processes": "n = 0\nwhile n < 90:\n    os.fork() or (time.sleep(1), os._exit(0))\n    n += 1\nescaped()",
    "many threads": "[threading.Thread(target=time.sleep, args=(1,)).start() for _ in range(300)]; escaped(); os._exit(0)",
    "namespaces of its own": "libc.unshare(0x10000000) == 0 and escaped()",
    "namespaces by clone3": "a = (ctypes.c_uint64 * 8)(0x10000000, 0, 0, 0, 17)\np = libc.syscall(435, a, 64)\n"
    "if p == 0: os._exit(0)\np > 0 and escaped()",
    # ---- limits
    "much memory": "bytearray(1400 << 20); escaped()",
    "much memory by mmap": "mmap.mmap(-1, 1400 << 20); escaped()",
    "much memory by memfd": "[os.truncate(os.memfd_create('x'), 1 << 20) for _ in range(9)]; escaped()",
    "much memory by System V": "libc.shmget(0, 1 << 30, 0o1600) >= 0 and escaped()",
    "many descriptors": "[os.dup(1) for _ in range(900)]; escaped()",
    "limits raised": "import resource as r; r.setrlimit(r.RLIMIT_FSIZE, (1 << 40, 1 << 40)); escaped()",
    "cpu for ever": "signal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass",
    "sleep for ever": "time.sleep(99)",
    "sleep for ever, deaf": "[signal.signal(s, signal.SIG_IGN) for s in range(1, 32) if s not in (9, 19)]; time.sleep(99)",
    "stop itself": "os.kill(os.getpid(), signal.SIGSTOP)",
    "stop its parent": "os.kill(os.getppid(), signal.SIGSTOP) if os.getppid() not in (0, 1, caller) else os.kill(victim, 19)",
    "one number for ever": "10 ** 10 ** 9",
    "one regular expression for ever": "re.match('(a+)+$', 'a' * 50 + 'b')",
    "a flood on stdout": "[print('x' * (1 << 20)) for _ in range(40)]",
    "a flood from a child": "subprocess.run(['/bin/sh', '-c', 'yes x | head -c 40000000'])",
    "a flood on stderr through stdout": "os.dup2(1, 2); [os.write(2, b'x' * (1 << 20)) for _ in range(40)]",
    # ---- network, kernel
    "tcp": "socket.create_connection(('127.0.0.1', port), 1)",
    "udp": "socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', udp)); time.sleep(.1)",
    "a unix socket": "socket.socket(socket.AF_UNIX).connect(unix)",
    "an abstract unix socket": "socket.socket(socket.AF_UNIX).connect(abstract)",
    "a netlink socket": "socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0); escaped()",
    "a raw socket": "socket.socket(socket.AF_INET, socket.SOCK_RAW, 1); escaped()",
    "a port of its own": "socket.create_server(('127.0.0.1', 0)); escaped()",
    "the core pattern": "open('/proc/sys/kernel/core_pattern', 'r+'); escaped()",
    "the kernel's settings": "os.access('/proc/sys/vm/swappiness', os.W_OK) and escaped()",
    "devices": "os.mknod(target, 0o60600, os.makedev(254, 0))",
    "mounts": "libc.mount(b'x', os.path.dirname(secret).encode(), b'tmpfs', 0, 0) == 0 and "
    "(libc.umount2(os.path.dirname(secret).encode(), 2), escaped())",
    "a change of root": "os.chroot('.'); escaped()",
    "the name of the machine": "n = socket.gethostname(); socket.sethostname(n); escaped()",
    "the uid of root": "os.setuid(0); escaped()",
    "setuid programs": "libc.prctl(39, 0, 0, 0, 0) == 0 and escaped()",
    "io_uring": "libc.syscall(425, 1, (ctypes.c_char * 120)()) >= 0 and escaped()",
    "bpf": "libc.syscall({'x86_64': 321}.get(os.uname().machine, 280), 0, (ctypes.c_int * 32)(2, 4, 4, 1), 128) >= 0 and "
    "escaped()",
    "the keyring": "libc.syscall({'x86_64': 250}.get(os.uname().machine, 219), 0, -3, 1) >= 0 and escaped()",
}
PREAMBLE = ("import os, sys, time, socket, subprocess, signal, ctypes, shutil, glob, threading, mmap, re\n"
            "libc = ctypes.CDLL(None)\n")


class Scene:
    """What a program could hurt, and whether it did."""

    def __init__(self) -> None:
        self.directory = Path(tempfile.mkdtemp(dir="/tmp", prefix="scene-"))
        self.directory.chmod(0o777)
        self.secret, self.target = self.directory / "secret", self.directory / "target"
        self.mark = "1000" + str(time.monotonic_ns())
        self.victim = subprocess.Popen(["/bin/sleep", self.mark + "1"], start_new_session=True)
        self.secret.write_text(TOKEN)
        self.secret.chmod(0o666)
        self.servers = [socket.create_server(("127.0.0.1", 0)), socket.socket(socket.AF_INET, socket.SOCK_DGRAM),
                        socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)]
        self.servers[1].bind(("127.0.0.1", 0))
        self.servers[2].bind(str(self.directory / "socket"))
        (self.directory / "socket").chmod(0o777)
        self.servers[3].bind("\0" + self.mark)
        for server in self.servers:
            server.setblocking(False)
            if server.type == socket.SOCK_STREAM:
                server.listen()

    def program(self, body: str) -> str:
        names = {"secret": str(self.secret), "target": str(self.target), "mark": self.mark, "victim": self.victim.pid,
                 "port": self.servers[0].getsockname()[1], "udp": self.servers[1].getsockname()[1],
                 "unix": str(self.directory / "socket"), "abstract": "\0" + self.mark, "caller": os.getpid()}
        setting = "".join(f"{name} = {value!r}\n" for name, value in names.items())
        return f"{PREAMBLE}{setting}def escaped(): print('ESCAPED', flush=True)\n{body}\n"

    def harm(self, stdout: str) -> list[str]:
        """What has been done, in words; [] if nothing."""
        with open(f"/proc/{self.victim.pid}/stat") as file:
            state = file.read().rpartition(") ")[2][0]
        done = {"escaped": "ESCAPED" in stdout, "told": TOKEN in stdout, "flooded": len(stdout) > 8 << 20,
                "created": os.path.lexists(self.target), "hurt": state in "TtZX", "daemon": bool(self.daemons()),
                "left": any(Path(place, self.mark).exists() for place in ("/tmp", "/dev/shm")),
                "changed": not self.secret.exists() or self.secret.stat().st_mode & 0o777 != 0o666
                or self.secret.read_text() != TOKEN}
        for name, server in zip(("tcp", "udp", "unix", "abstract"), self.servers, strict=True):
            with contextlib.suppress(BlockingIOError):
                done[name] = bool(server.recv(9) if name == "udp" else server.accept()[0].close() is None)
        return [name for name, value in done.items() if value]

    def daemons(self) -> list[int]:
        found = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                if f"sleep\0{self.mark}\0".encode() in path.read_bytes():
                    found.append(int(path.parent.name))
        return found

    def close(self) -> None:
        for pid in self.daemons():
            os.kill(pid, signal.SIGKILL)
        self.victim.kill()
        self.victim.wait()
        for server in self.servers:
            server.close()
        for place in ("/tmp", "/dev/shm"):
            Path(place, self.mark).unlink(missing_ok=True)
        Path(os.path.dirname(os.__file__), self.mark + ".pth").unlink(missing_ok=True)
        shutil.rmtree(self.directory, ignore_errors=True)


@pytest.fixture
def scene() -> Iterator[Scene]:
    it = Scene()
    yield it
    it.close()


def naive(arguments: list[str], directory: Path, timeout: float = 1.5) -> tuple[str, int | None]:
    """(stdout, exit code; None if it had to be killed): a subprocess with a timeout, as runners usually are."""
    with subprocess.Popen([sys.executable, *arguments], cwd=directory, env={**os.environ, "TOKEN": TOKEN}, start_new_session=True,
                          stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        try:
            return process.communicate(timeout=timeout)[0].decode(errors="replace"), process.returncode
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGCONT)
                os.killpg(process.pid, signal.SIGKILL)
            process.stdout.close()
            return "", None


@pytest.mark.parametrize("attack", ESCAPES)
def test_an_escape_succeeds_against_a_naive_runner_and_fails_here(attack: str, scene: Scene) -> None:
    if sandbox._settled().level != "full":
        pytest.skip("this machine cannot contain everything: see python sandbox.py --doctor")
    begin = time.monotonic()
    result = run_program(scene.program(ESCAPES[attack]), timeout=1.5)
    assert scene.harm(result.stdout + result.stderr) == [], result
    assert len(result.stdout) + len(result.stderr) <= 2 * sandbox.OUTPUT_LIMIT
    assert time.monotonic() - begin < 30
    assert result.status in ("ok", "error", "timeout", "memory", "output", "killed")
    work = scene.directory / "work"
    work.mkdir()
    stdout, code = naive(["-c", scene.program(ESCAPES[attack])], work)
    if not scene.harm(stdout) and code is not None:
        pytest.skip("needs root, or what this kernel was built without: harmless here, even to a naive runner")


# ------------------------------------------------------------------------------------------------------------ forgeries

WRONG = "def add(a, b): return None\n"
ADD = "assert add(1, 2) == 3\nassert add(2, 2) == 4\n"
CASES = ("import unittest\nclass T(unittest.TestCase):\n    def test_one(self): self.assertEqual(add(1, 2), 3)\n"
         "if __name__ == '__main__': unittest.main()\n")
LIAR = ("class Liar(%s):\n    def __eq__(self, other): return True\n    __ne__ = lambda s, o: False\n    __hash__ = lambda s: 3\n"
        "    __lt__ = __gt__ = __le__ = __ge__ = lambda s, o: True\n    __contains__ = lambda s, o: True\n"
        "    __sub__ = __rsub__ = __add__ = lambda s, o: 0\n    __float__ = lambda s: 3.0\n")
FORGERIES = {
    "exit": ("import sys; sys.exit(0)", ADD),
    "exit without clean-up": ("import os; os._exit(0)", ADD),
    "exit when called": ("def add(a, b): raise SystemExit(0)", ADD),
    "exit at exit": ("import atexit, os; atexit.register(os._exit, 0)\n" + WRONG, ADD),
    "exit by the hook of exceptions": ("import sys, os; sys.excepthook = lambda *a: os._exit(0)\n" + WRONG, ADD),
    "exit by a thread": ("import threading, os, time; threading.Timer(.1, os._exit, [0]).start()\ndef add(a, b): "
                         "time.sleep(9)", ADD),
    "exit by a signal": ("import signal, os, time; signal.signal(14, lambda *a: os._exit(0)); signal.setitimer(0, .1)\n"
                         "def add(a, b): time.sleep(9)", ADD),
    "exit by a finaliser": ("import os\nclass D: __del__ = lambda self: os._exit(0)\ndef add(a, b): D()", ADD),
    "exit of the parent": ("import os\nif os.fork(): os.wait(); os._exit(0)\n" + WRONG, ADD),
    "exit by the machine's true": ("import os\nos.execv('/bin/true', ['true'])", ADD),
    "no asserts": ("import os, sys\nif __debug__:\n    c = open('/proc/self/cmdline').read().split('\\0')\n"
                   "    os.execv(sys.executable, [sys.executable, '-O', *c[1:-1]])\n" + WRONG, ADD),
    "liar": (LIAR % "object" + "def add(a, b): return Liar()", ADD),
    "liar int": (LIAR % "int" + "def add(a, b): return Liar()", ADD),
    "liar float": (LIAR % "float" + "def add(a, b): return Liar()", ADD + "assert abs(add(1, 2) - 3) < 1e-6\n"),
    "liar str": (LIAR % "str" + "def add(a, b): return Liar()", "assert add('a', 'b') == 'ab'"),
    "liar bytes": (LIAR % "bytes" + "def add(a, b): return Liar()", "assert add(b'a', b'b') == b'ab'"),
    "liar list": (LIAR % "list" + "def add(a, b): return Liar()", "assert add([1], [2]) == [1, 2]\nassert 1 in add([1], [2])"),
    "liar tuple": (LIAR % "tuple" + "def add(a, b): return Liar()", "assert add((1,), (2,)) == (1, 2)"),
    "liar dict": (LIAR % "dict" + "def add(a, b): return Liar()", "assert add({1: 1}, {2: 2}) == {1: 1, 2: 2}"),
    "liar set": (LIAR % "set" + "def add(a, b): return Liar()", "assert add({1}, {2}) == {1, 2}"),
    "liar in a list": (LIAR % "object" + "def add(a, b): return [Liar()]", "assert add([1], [2]) == [3]"),
    "liar in a dict": (LIAR % "object" + "def add(a, b): return {'sum': Liar()}", "assert add(1, 2) == {'sum': 3}"),
    "liar in a generator": (LIAR % "object" + "def add(a, b):\n    yield Liar()", "assert list(add(1, 2)) == [3]"),
    "liar as an attribute": (LIAR % "object" + "class P:\n    def __init__(self, *a): self.x = Liar()", "assert P(3).x == 3"),
    "liar with another class": (LIAR % "object" + "    __class__ = property(lambda s: int)\ndef add(a, b): return Liar()",
                                "assert isinstance(add(1, 2), int)\n" + ADD),
    "liar numbers": (LIAR % "object" + "def add(a, b): return Liar()", "assert abs(add(1, 2) - 3) < 1e-6"),
    "liar order": (LIAR % "object" + "def add(a, b): return Liar()", "assert 2.9 < add(1, 2) < 3.1"),
    "anything": ("from unittest.mock import ANY\ndef add(a, b): return ANY", ADD),
    "anything magic": ("from unittest.mock import MagicMock\ndef add(a, b):\n    m = MagicMock(); m.__eq__ = lambda s, o: True\n"
                       "    return m", ADD),
    "abs": ("import builtins; builtins.abs = lambda x: 0\ndef add(a, b): return 0", "assert abs(add(1, 2) - 3) < 1e-6"),
    "all": ("import builtins; builtins.all = lambda x: True\n" + WRONG, "assert all(add(1, x) == 1 + x for x in (2, 3))"),
    "all, redefined": ("all = lambda x: True\n" + WRONG, "assert all(add(1, x) == 1 + x for x in (2, 3))"),
    "all, and nothing else": ("all = lambda x: True\n", "assert all(add(1, x) == 1 + x for x in (2, 3))"),
    "all, for a class": ("all = lambda x: True\nclass Solution: pass", "assert all(Solution().add(1, x) == 1 + x for x "
                         "in (2, 3))"),
    "len": ("import builtins; builtins.len = lambda x: 3\ndef add(a, b): return []", "assert len(add([1], [2, 3])) == 3"),
    "sorted": ("import builtins; builtins.sorted = lambda *a, **k: 0\n" + WRONG, "assert sorted(add([1], [2])) == "
               "sorted([1, 2])"),
    "set": ("import builtins; builtins.set = lambda *a: 0\n" + WRONG, "assert set(add([1], [2])) == set([1, 2])"),
    "isinstance": ("import builtins; builtins.isinstance = lambda *a: True\n" + WRONG, "assert isinstance(add(1, 2), int)"),
    "range": ("import builtins; builtins.range = lambda *a: ()\n" + WRONG, "for i in range(3):\n    assert add(i, 1) == i + 1"),
    "isclose": ("import math; math.isclose = lambda *a, **k: True\n" + WRONG, "import math\nassert math.isclose(add(1, 2), 3)"),
    "Counter": ("import collections; collections.Counter = lambda x: 0\n" + WRONG,
                "from collections import Counter\nassert Counter(add('a', 'b')) == Counter('ab')"),
    "operator": ("import operator; operator.eq = lambda *a: True\n" + WRONG, "import operator\nassert operator.eq(add(1, 2), 3)"),
    "json": ("import json; json.dumps = lambda *a, **k: 0\n" + WRONG, "import json\nassert json.dumps(add(1, 2)) == "
             "json.dumps(3)"),
    "random": ("import random; random.randint = lambda *a: 0\ndef add(a, b): return 0",
               "import random\na, b = random.randint(1, 9), random.randint(1, 9)\nassert add(a, b) == a + b"),
    "the clock": ("import time; s = time.sleep; time.time = time.monotonic = time.perf_counter = lambda: 0\n"
                  "def add(a, b): s(.5); return a + b",
                  "import time\nt = time.monotonic()\nassert add(1, 2) == 3\nassert time.monotonic() - t < .4"),
    "a false module": ("import sys, types; m = sys.modules['math'] = types.ModuleType('math'); m.isclose = lambda *a: "
                       "True\n" + WRONG,
                       "import math\nassert math.isclose(add(1, 2), 3)"),
    "a false import": ("import builtins\nclass M: isclose = lambda *a: True\nbuiltins.__import__ = lambda *a: M()\n" + WRONG,
                       "import math\nassert math.isclose(add(1, 2), 3)"),
    "assertEqual": ("import unittest; unittest.TestCase.assertEqual = lambda *a: None\n" + WRONG, CASES),
    "the run of cases": ("import unittest; unittest.TestCase.run = lambda *a: None\n" + WRONG, CASES),
    "the main of unittest": ("import unittest; unittest.main = lambda *a: None\n" + WRONG, CASES),
    "the result of unittest": ("import unittest; unittest.TestResult.wasSuccessful = lambda s: True\n" + WRONG, CASES),
    "a skipped case": ("import unittest\ndef add(a, b): raise unittest.SkipTest", CASES),
    "a jump over the assert": ("import sys\ndef t(f, e, a):\n    if f.f_code.co_name == 'check' and e == 'line' and "
                               "f.f_lineno == f.f_code."
                               "co_firstlineno + 1: f.f_lineno += 1\n    return t\nsys.settrace(t)\n" + WRONG,
                               "def check(candidate):\n    assert candidate(1, 2) == 3\n    candidate(0, 0)\ncheck(add)\n"),
    "answers in the caller's code": ("import sys, dis\ndef add(a, b):\n    f = sys._getframe(1)\n    return [i.argval "
                                     "for i in dis."
                                     "get_instructions(f.f_code) if i.offset > f.f_lasti and i.opname == 'LOAD_CONST'][0]", ADD),
    "answers in the text of the tests": ("import re\ntext = open('/proc/self/cmdline').read()\ndef add(a, b): return "
                                         "int(re.search("
                                         "fr'add\\({a}, {b}\\) == (\\d+)', text)[1])", ADD),
    "numbers rewritten in memory": ("import ctypes, os, atexit; atexit.register(os._exit, 0)\n"
                                    "for n in (3, 4): ctypes.memmove(id(n) + 24, id(7) + 24, 4)\ndef add(a, b): return 7", ADD),
}


# More of them, aimed at what crosses between program and tests: callbacks, objects, changed arguments, content that lies.
for _case in (Path(__file__).parent / "forgeries.txt").read_text().removeprefix("=== ").split("\n=== "):
    _name, _, _body = _case.partition("\n")
    assert _name not in FORGERIES
    FORGERIES[_name] = tuple(_body.split("--- tests\n"))


@pytest.mark.parametrize("attack", FORGERIES)
def test_a_forgery_passes_a_naive_runner_and_fails_here(attack: str, tmp_path: Path) -> None:
    code, tests = FORGERIES[attack]
    result = run_tests(code, tests, "f" if "\ndef f(" in f"\n{code}" else None, timeout=5)
    assert not result.passed, result
    assert result.error
    assert result.n_passed < max(result.n_total, 1) or "process ended" in result.error
    tests += "\ncheck(f)" * ("def check" in tests and "\ncheck(" not in tests) + "\ntest()" * ("def test()" in tests) + (
        "\nunittest.main()" * ("TestCase" in tests and "main()" not in tests))
    assert naive(["-c", f"{code}\n{tests}"], tmp_path, timeout=10)[1] == 0, "the forgery does not even pass the naive runner"


def test_the_tests_of_the_forgeries_can_be_passed() -> None:
    solution = (
        "def add(a, b):\n    if isinstance(a, dict) or isinstance(a, set): return a | b\n    return a + b\n"
        "class P:\n    def __init__(self, x): self.x = x\nclass Solution:\n    def add(self, a, b): return a + b\n"
    )
    special = {"liar in a list": "def add(a, b): return [3]", "liar in a dict": "def add(a, b): return {'sum': 3}",
               "liar in a generator": "def add(a, b):\n    yield a + b"}
    for attack in ("exit", "liar list", "liar dict", "liar set", "all", "all, for a class", "Counter", "random", "the clock",
                   "assertEqual", "liar as an attribute", *special):
        result = run_tests(special.get(attack, solution), FORGERIES[attack][1])
        assert result.passed, (attack, result)
