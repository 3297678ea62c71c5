"""Containment: what a sandboxed child does to itself before it runs anything. Used by sandbox.py only.

sandbox.py hands this file's code to a fresh interpreter and calls `boot(config)`. Three processes follow from it:
A (boot) stays out of the program's reach, keeps the clock and kills; B (run_init) is pid 1 of a new pid namespace and
reaps; C (become_job) gives everything up and is the program. config["layers"] says which layers are in force: every one
of them must succeed, else one line "setup <layer> <why>" goes to the caller and nothing runs.
"""
from __future__ import annotations

import ctypes
import os
import signal
import struct
import sys
import time
import types
from typing import Any


class Stopped(Exception):
    """Time is up, or the caller wants us to end. (Not an OSError such as InterruptedError: those are failures of a layer.)"""


def kernel(name: str, *args: Any) -> int:
    """Call libc's `name`; a negative result becomes OSError. Elsewhere than on Linux there is nothing to call."""
    if sys.platform != "linux":
        return 0
    longs = [ctypes.c_long(arg) if isinstance(arg, int) else arg for arg in args]
    result = getattr(ctypes.CDLL(None, use_errno=True), name)(*longs)
    if result < 0:
        raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")
    return result


def parents(paths: list[str]) -> set[str]:
    """Every directory on the way to these absolute paths."""
    return {"/" + "/".join(path.split("/")[1:n]) for path in paths for n in range(1, path.count("/") + 1)}


def raise_oom_score(config: dict) -> None:
    """If the machine runs out of memory, the kernel shall take the program and not the trainer."""
    with open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")


def choose_uid(config: dict) -> None:
    """A uid of this job's own: it can signal nobody else, and its process limit counts nobody else."""
    with open("/proc/self/uid_map") as file:
        if os.getuid() or max(int(inside) + int(count) for inside, _, count in map(str.split, file)) < 1 << 25:
            raise OSError("needs root, with more than 2^25 uids")
    if not all(os.stat(path).st_mode & 1 for path in parents(config["readable"])):
        # A python below root's 0700 home: keep CAP_DAC_READ_SEARCH, which Landlock confines to the readable directories.
        config["capability"] = 1 << 2
        if "landlock" not in config["layers"]:
            raise OSError("only root can reach the interpreter, and no Landlock can confine that right")
    config["uid"] = config["gid"] = (1 << 24) + int.from_bytes(os.urandom(3), "little")
    if not {"bwrap", "tmpfs"} & set(config["layers"]):
        os.chown(config["workdir"], config["uid"], config["gid"])


def enter_namespaces(config: dict) -> None:
    """Leave the host's processes, network, IPC and mounts; an ordinary user needs a user namespace to do so."""
    uid, gid = os.getuid(), os.getgid()
    flags = 0x20000 | 0x20000000 | 0x40000000 | 0x8000000 | 0x4000000  # NEWNS NEWPID NEWNET NEWIPC NEWUTS
    kernel("unshare", flags | (0x10000000 if uid else 0))  # NEWUSER
    if uid:
        for path, text in (("/proc/self/setgroups", "deny"), ("/proc/self/uid_map", f"{uid} {uid} 1"),
                           ("/proc/self/gid_map", f"{gid} {gid} 1"), ("/proc/sys/user/max_user_namespaces", "0")):
            with open(path, "w") as file:
                file.write(text)
    kernel("mount", None, b"/", None, 0x4000 | 0x40000, None)  # MS_REC | MS_PRIVATE: our mounts stay ours


def mount_tmpfs(config: dict) -> None:
    """The working directory in memory, bounded; it vanishes with its last process."""
    options = f"size=64m,nr_inodes=4096,mode=0700,uid={config['uid']},gid={config['gid']}"
    kernel("mount", b"tmpfs", config["workdir"].encode(), b"tmpfs", 2 | 4, options.encode())  # NOSUID | NODEV


def mount_proc(config: dict) -> None:
    """A /proc of the new pid namespace, in which the caller (and its environment) does not exist."""
    kernel("mount", b"proc", b"/proc", b"proc", 2 | 4 | 8, None)  # NOSUID | NODEV | NOEXEC


def build_landlock(config: dict) -> None:
    """A ruleset: read interpreter and libraries, write the working directory; no TCP, no signals to outside."""
    abi = kernel("syscall", 444, None, 0, 1)
    # Bits 0 execute, 1 write, 2 read, 3 readdir, 4-12 remove and make, 13 refer, 14 truncate, 15 ioctl_dev.
    everything = (1 << 13 + (abi >= 2) + (abi >= 3) + (abi >= 5)) - 1
    attributes = struct.pack("=QQQ", everything, 3, 3)[:8 if abi < 4 else 16 if abi < 6 else 24]
    config["ruleset"] = kernel("syscall", 444, attributes, len(attributes), 0)
    devices = [f"/dev/{name}" for name in ("null", "zero", "full", "random", "urandom")]
    private = ["/dev/shm"] if "bwrap" in config["layers"] else []  # for multiprocessing; at the weak level it is workdir
    rules = {**dict.fromkeys(devices, 0b110), **dict.fromkeys(config["readable"], 0b1101),
             **dict.fromkeys([config["workdir"], *private], everything)}
    for path, rights in rules.items():
        if os.path.exists(path):
            fd = os.open(path, 0o10000000)  # O_PATH
            rights &= everything if os.path.isdir(path) else 0b111
            kernel("syscall", 445, config["ruleset"], 1, struct.pack("=Qi", rights, fd), 0)
            os.close(fd)


def limit_resources(config: dict) -> None:
    """Hard limits; per process, but for NPROC, which counts the processes of the uid in its user namespace."""
    import resource
    limits = {"AS": config["memory"], "CPU": int(config["timeout"]) + 2, "FSIZE": 8 << 20, "NOFILE": 256, "CORE": 0,
              "STACK": 64 << 20, "NPROC": 32}
    if not {"bwrap", "namespaces", "uid"} & set(config["layers"]):
        del limits["NPROC"]  # it would count the caller's own processes
    if sys.platform == "darwin":
        del limits["AS"]  # refused there
    for name, value in limits.items():
        hard = resource.getrlimit(getattr(resource, "RLIMIT_" + name))[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(getattr(resource, "RLIMIT_" + name), (value, value))


def drop_privileges(config: dict) -> None:
    """Become the job's uid, without capabilities (save the one of choose_uid); then enter Landlock, for good."""
    keep = config["capability"]
    if config["uid"] != os.getuid():
        kernel("prctl", 8, 1, 0, 0, 0)  # PR_SET_KEEPCAPS: across setresuid
        os.setgroups([])
        os.setresgid(*[config["gid"]] * 3)
        os.setresuid(*[config["uid"]] * 3)
    kernel("prctl", 38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
    kernel("capset", struct.pack("=Ii", 0x20080522, 0), struct.pack("=6I", keep, keep, keep, 0, 0, 0))
    if keep:
        kernel("prctl", 47, 2, 2, 0, 0)  # ambient: a python that the program starts needs it too
    if config["ruleset"] >= 0:
        kernel("syscall", 446, config["ruleset"], 0)
    kernel("prctl", 4, 0, 0, 0, 0)  # PR_SET_DUMPABLE 0, again after setresuid: no ptrace between jobs of one uid


def apply(config: dict, names: str) -> None:
    """Apply those of the named layers that the probe has settled; the first that fails ends the child."""
    functions = {"oom": raise_oom_score, "uid": choose_uid, "namespaces": enter_namespaces, "tmpfs": mount_tmpfs,
                 "proc": mount_proc, "landlock": build_landlock, "limits": limit_resources, "drop": drop_privileges}
    for name in names.split():
        if name in config["layers"]:
            try:
                if name in ("tmpfs", "proc") and "namespaces" not in config["layers"]:
                    raise OSError("would be mounted for the whole machine")
                functions[name](config)
            except (OSError, ValueError) as error:
                os.write(config["report"], f"setup {name} {error}\n".encode())
                os._exit(1)


def become_job(config: dict, roles: types.CodeType) -> None:
    """Process C: shed everything, then play the role."""
    apply(config, "limits drop")
    low = 3
    for kept in (*sorted(config["keep"]), 1 << 16):
        os.closerange(low, kept)
        low = kept + 1
    sys.path[:] = config["path"]
    sys.argv[:] = ["program.py"]
    if config["role"] != "program":
        exec(roles, globals())  # judge.py
    globals()[config["role"]](config)


def run_init(config: dict, roles: types.CodeType) -> None:
    """Process B: start C, reap everybody, report how C ended. As pid 1 its end is the end of all."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.setsid()
    kernel("prctl", 1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG
    apply(config, "proc")
    begin, job, pid = time.monotonic(), os.fork(), 0
    if job == 0:
        return become_job(config, roles)
    while pid != job:
        pid, status, usage = os.wait4(-1, 0)
    line = f"done {status} {time.monotonic() - begin:.6f} {usage.ru_utime + usage.ru_stime:.6f}\n"
    os.write(config["report"], line.encode())
    os._exit(0)


def sweep() -> None:
    """Kill and reap every child; orphans of the job become ours, because we are their subreaper."""
    while True:
        try:
            with open("/proc/thread-self/children") as file:
                children = file.read().split()
        except OSError:
            children = []  # not on Linux: the process group was all that could be killed
        for child in children:
            os.kill(int(child), signal.SIGKILL)
        try:
            if os.waitpid(-1, 0 if children else os.WNOHANG)[0] == 0:
                return
        except ChildProcessError:
            return


def boot(config: dict, roles: types.CodeType) -> None:
    """Process A, out of the job's reach: contain, start B, keep the clock, leave nothing behind."""
    def stop(number: int, frame: Any) -> None:
        signal.signal(signal.SIGALRM, signal.SIG_IGN)  # one is enough, a second would interrupt the sweeping
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise Stopped("timeout" if number == signal.SIGALRM else "stopped")

    signal.signal(signal.SIGALRM, stop)
    signal.signal(signal.SIGTERM, stop)
    config |= {"uid": os.getuid(), "gid": os.getgid(), "ruleset": -1, "capability": 0}
    init, begin = 0, time.monotonic()
    try:
        kernel("prctl", 1, signal.SIGTERM, 0, 0, 0)  # PR_SET_PDEATHSIG: if the caller dies, so do we
        kernel("prctl", 36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER
        apply(config, "oom uid namespaces tmpfs landlock")
        kernel("prctl", 4, 0, 0, 0, 0)  # PR_SET_DUMPABLE 0: nobody of our uid may ptrace us
        os.chdir(config["workdir"])
        begin, init = time.monotonic(), os.fork()
        if init == 0:
            return run_init(config, roles)
        signal.setitimer(signal.ITIMER_REAL, config["timeout"])
        os.waitpid(init, 0)
        cause = "killed"  # counts only if B has not reported before
    except Stopped as error:
        cause = str(error)
    signal.signal(signal.SIGALRM, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        if init and cause != "killed":
            os.kill(init, signal.SIGKILL)
            os.killpg(init, signal.SIGKILL)  # for systems without pid namespaces and subreapers
    except ProcessLookupError:
        pass  # it ended by itself in this moment, or had no group yet
    sweep()
    os.write(config["report"], f"{cause} 0 {time.monotonic() - begin:.6f} 0\n".encode())
    os._exit(0)


def program(config: dict) -> None:
    """Role: be the program, as __main__, with its text on disk so that tracebacks can quote it."""
    with open("program.py", "w", encoding="utf-8", errors="replace") as file:
        file.write(config["code"])
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    main.__dict__["__file__"] = "program.py"
    try:
        exec(compile(config["code"], "program.py", "exec"), main.__dict__)
    except SystemExit:
        raise
    except BaseException as error:
        error = error.with_traceback(error.__traceback__ and error.__traceback__.tb_next)  # without this frame
        sys.__excepthook__(type(error), error, error.__traceback__)
        raise SystemExit(1) from None


# ---------------------------------------------------------------- used by sandbox.py outside of the child

def directories() -> tuple[list[str], list[str]]:
    """(what the child may read, its sys.path). Packages are importable, though no .pth file is processed (-S)."""
    interpreter = os.path.realpath(sys.executable)
    library = os.path.dirname(os.path.realpath(os.__file__))
    path = [entry for entry in sys.path if entry.startswith(library) or entry.endswith(("site-packages", "dist-packages"))]
    readable = [interpreter, os.path.dirname(library), *path, "/usr/lib", "/usr/lib64", "/usr/local/lib", "/lib", "/lib64",
                "/usr/bin", "/bin", "/usr/share/zoneinfo", "/etc/ld.so.cache", "/etc/localtime"]
    return [entry for entry in dict.fromkeys(readable) if os.path.exists(entry)], ["", *path]


def bubblewrap(readable: list[str]) -> list[str]:
    """Command line of the "bwrap" level: a new root that holds the interpreter, /tmp and nothing else.

    The caller starts it with a scrubbed environment, because pid 1 in there is bwrap with what it was started with.
    Real root must give up its uid inside, and /proc must be read-only, or /proc/sys/kernel would be writable.
    """
    command = ["bwrap", "--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts", "--unshare-cgroup-try",
               "--die-with-parent", "--new-session", "--cap-drop", "ALL"]
    if os.getuid() == 0:
        command += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID", "--cap-add", "CAP_KILL"]  # to drop, and to sweep
    else:
        command += ["--unshare-user", "--disable-userns"]
    command += ["--proc", "/proc", "--dev", "/dev", "--remount-ro", "/proc"]
    command += ["--perms", "1777", "--size", str(64 << 20), "--tmpfs", "/tmp"]
    command += ["--perms", "1777", "--size", str(64 << 20), "--tmpfs", "/dev/shm"]
    for parent in sorted(parents(readable) - {"/", "/tmp"} - set(readable)):
        command += ["--perms", "0755", "--dir", parent]
    for entry in sorted(readable):
        command += ["--ro-bind", entry, entry]
    return [*command, "--chdir", "/tmp", "--"]


# A program that tries to get out, and prints in one word each what it could do. {0}: pid, file and port of the caller.
PROBE = """
import os, socket
def attempt(word, action):
    try: action()
    except OSError: return
    print(word)
pid, file, port = {0!r}
attempt("files", lambda: open("/etc/passwd").close())
def environment():  # in a pid namespace the same number may be one of ours, with the scrubbed environment
    if "\\0MALLOC_ARENA_MAX=2\\0" in open(f"/proc/{{pid}}/environ").read(): raise OSError
attempt("environment", environment)
if os.getpid() > 9: attempt("signals", lambda: os.kill(pid, 0))
attempt("writes", lambda: open(file, "w").close())
attempt("tcp", lambda: socket.create_connection(("127.0.0.1", port), 1).close())
attempt("udp", lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).connect(("192.0.2.1", 9)))
"""
OPENINGS = {"files": "read files outside", "environment": "read other processes' environment", "signals": "signal processes",
         "writes": "write files outside", "tcp": "open TCP connections", "udp": "send UDP packets"}
