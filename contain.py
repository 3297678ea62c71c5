"""Containment: what a sandboxed child does to itself before it runs anything. Used by sandbox.py only.

sandbox.py hands this file's code to a fresh interpreter and calls `boot(config)`. Three processes follow from it:
A (boot) stays out of the program's reach, keeps the clock and kills; B (run_init) is pid 1 of a new pid namespace, builds
a new root, reaps, and bounds the memory of all; C (become_job) gives everything up and is the program. config["layers"]
says which layers are in force: every one of them must succeed, else one line "setup <layer> <why>" goes to the caller and
nothing runs. (`_signal` and no `typing`: what this file imports, every program waits for.)
"""
from __future__ import annotations

import _signal
import ctypes
import os
import struct
import sys
import time
import types

LIBC = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None
DEVICES = [f"/dev/{name}" for name in ("null", "zero", "full", "random", "urandom")]


class Stopped(Exception):
    """Time is up, or the caller wants us to end. (Not an OSError such as InterruptedError: those are failures of a layer.)"""


def kernel(name: str, *args: int | bytes | None) -> int:
    """Call libc's `name`; a negative result becomes OSError. Elsewhere than on Linux there is nothing to call."""
    if sys.platform != "linux":
        return 0
    result = getattr(LIBC, name)(*(ctypes.c_long(arg) if isinstance(arg, int) else arg for arg in args))
    if result < 0:
        raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")
    return result


def raise_oom_score(config: dict) -> None:
    """If the machine runs out of memory, the kernel shall take the program and not the trainer."""
    with open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")


def choose_uid(config: dict) -> None:
    """A uid of this job's own: it can signal nobody else, and its process limit counts nobody else."""
    config["uid"] = config["gid"] = (1 << 24) + int.from_bytes(os.urandom(3), "little")
    if not {"bwrap", "namespaces"} & set(config["layers"]):
        for path in config["readable"]:
            while path := os.path.dirname(path).rstrip("/"):
                if not os.stat(path).st_mode & 1:
                    raise OSError(f"the interpreter needs {path}, where only root and its owner may enter")
        os.chown(config["workdir"], config["uid"], config["gid"])


def enter_namespaces(config: dict) -> None:
    """Leave the host's processes, network, IPC and mounts; who is not root needs a user namespace to do so."""
    flags = 0x20000 | 0x20000000 | 0x40000000 | 0x8000000 | 0x4000000  # NEWNS NEWPID NEWNET NEWIPC NEWUTS
    if "uid" in config["layers"]:
        kernel("unshare", flags)
    else:
        uid, gid = os.getuid(), os.getgid()
        config["uid"], config["gid"] = uid or 65534, gid or 65534
        kernel("unshare", flags | 0x10000000)  # NEWUSER
        for path, text in (("self/setgroups", "deny"), ("self/uid_map", f"{config['uid']} {uid} 1"),
                           ("self/gid_map", f"{config['gid']} {gid} 1"), ("sys/user/max_user_namespaces", "0")):
            with open(f"/proc/{path}", "w") as file:
                file.write(text)
    kernel("mount", None, b"/", None, 0x4000 | 0x40000, None)  # MS_REC | MS_PRIVATE: our mounts stay ours


def build_root(config: dict) -> None:
    """A new root: interpreter and libraries, read-only; /proc of this pid namespace; /tmp in memory. Nothing else exists."""
    sources = {path: os.path.realpath(path) for path in (*config["readable"], *DEVICES) if os.path.exists(path)}
    os.umask(0o022)
    kernel("mount", b"tmpfs", b"/tmp", b"tmpfs", 2 | 4, b"size=1m,mode=0755")  # NOSUID | NODEV
    os.mkdir("/tmp/old")
    os.chdir("/tmp")
    kernel("pivot_root", b".", b"old")
    os.mkdir("/tmp")
    kernel("mount", b"tmpfs", b"/tmp", b"tmpfs", 2 | 4, b"size=64m,nr_inodes=4096,mode=1777")
    for path, source in sources.items():
        directory = os.path.isdir("/old" + source)
        os.makedirs(path if directory else os.path.dirname(path), exist_ok=True)
        if not directory:
            open(path, "x").close()
        kernel("mount", f"/old{source}".encode(), path.encode(), None, 0x1000 | 0x4000, None)  # MS_BIND | MS_REC
        if path not in DEVICES:
            make_read_only(path)
    for link, target in (("/dev/shm", "/tmp"), ("/dev/fd", "/proc/self/fd"), ("/dev/stdin", "/proc/self/fd/0"),
                         ("/dev/stdout", "/proc/self/fd/1"), ("/dev/stderr", "/proc/self/fd/2")):
        os.symlink(target, link)
    os.mkdir("/proc")
    kernel("mount", b"proc", b"/proc", b"proc", 2 | 4 | 8, None)  # NOSUID | NODEV | NOEXEC; needs the old one in sight
    make_read_only("/proc")
    kernel("umount2", b"/old", 2)  # MNT_DETACH
    os.rmdir("/old")
    make_read_only("/", recursive=False)


def make_read_only(path: str, recursive: bool = True) -> None:
    """mount_setattr(2), Linux 5.12: unlike a remount it keeps the flags that the host has locked."""
    attributes = struct.pack("=QQQQ", 1 | 2, 0, 0, 0)  # RDONLY | NOSUID
    kernel("syscall", 442, -100, path.encode(), 0x8000 if recursive else 0, attributes, len(attributes))


def limit_resources(config: dict) -> None:
    """Hard limits; per process, but for NPROC, which counts the processes of the uid in its user namespace."""
    import resource
    limits = {"AS": config["memory"], "CPU": int(config["timeout"]) + 2, "FSIZE": 8 << 20, "NOFILE": 256, "CORE": 0,
              "STACK": 64 << 20, "MSGQUEUE": 0, "NPROC": 32}
    if not {"bwrap", "namespaces", "uid"} & set(config["layers"]):
        del limits["NPROC"]  # it would count the caller's own processes
    if sys.platform == "darwin":
        del limits["AS"], limits["MSGQUEUE"]  # refused there, unknown there
    for name, value in limits.items():
        hard = resource.getrlimit(getattr(resource, "RLIMIT_" + name))[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(getattr(resource, "RLIMIT_" + name), (value, value))


def drop_privileges(config: dict) -> None:
    """Become the job's uid, without capabilities and without a way back."""
    if "uid" in config["layers"]:
        os.setgroups([])
        os.setresgid(*[config["gid"]] * 3)
        os.setresuid(*[config["uid"]] * 3)
    kernel("prctl", 38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
    kernel("capset", struct.pack("=Ii", 0x20080522, 0), bytes(24))
    kernel("prctl", 4, 0, 0, 0, 0)  # PR_SET_DUMPABLE 0, again after setresuid: no ptrace between jobs of one uid
    kernel("prctl", 1, _signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG, which a change of uid clears


def enter_landlock(config: dict) -> None:
    """Read interpreter and libraries, write the working directory; no TCP, no abstract sockets or signals to outside."""
    abi = kernel("syscall", 444, None, 0, 1)
    # Bits 0 execute, 1 write, 2 read, 3 readdir, 4-12 remove and make, 13 refer, 14 truncate, 15 ioctl_dev.
    everything = (1 << 13 + (abi >= 2) + (abi >= 3) + (abi >= 5)) - 1
    attributes = struct.pack("=QQQ", everything, 3, 3)[:8 if abi < 4 else 16 if abi < 6 else 24]
    ruleset = kernel("syscall", 444, attributes, len(attributes), 0)
    rules = {**dict.fromkeys(DEVICES, 0b110), **dict.fromkeys(config["readable"], 0b1101), config["workdir"]: everything}
    if {"bwrap", "namespaces"} & set(config["layers"]):  # a /proc and a /dev/shm of its own
        rules |= {"/proc": 0b1100, "/dev/shm": everything}
    for path, rights in rules.items():
        if os.path.exists(path):
            fd = os.open(path, 0o10000000)  # O_PATH
            rights &= everything if os.path.isdir(path) else 0b111
            kernel("syscall", 445, ruleset, 1, struct.pack("=Qi", rights, fd), 0)
            os.close(fd)
    kernel("syscall", 446, ruleset, 0)
    os.close(ruleset)


# By machine: audit code; socket; clone; then what opens the kernel or other processes and no program here needs: shmget
# semget msgget mq_open memfd_create (memory that no limit counts), add_key request_key keyctl, unshare setns, ptrace
# process_vm_readv/writev kcmp, perf_event_open, bpf, userfaultfd, open_by_handle_at.
CALLS = {"x86_64": (0xC000003E, 41, 56, 29, 64, 68, 240, 319, 248, 249, 250, 272, 308, 101, 310, 311, 312, 298, 321, 323, 304),
         "aarch64": (0xC00000B7, 198, 220, 194, 190, 186, 180, 279, 217, 218, 219, 97, 268, 117, 270, 271, 272, 241, 280,
                     282, 265)}
CALLS_OF_ALL = (425, 426, 427, 438, 447)  # io_uring_setup/enter/register pidfd_getfd memfd_secret


def filter_system_calls(config: dict) -> None:
    """Seccomp: the calls above fail with EPERM, as do new namespaces and every socket that is not a unix socket."""
    if os.uname().machine not in CALLS:
        raise OSError(f"no table of system calls for {os.uname().machine}")
    audit, socket, clone, *denied = CALLS[os.uname().machine]
    kill, deny, allow = 0x80000000, 0x50001, 0x7FFF0000  # what to return; the low bits are the errno

    def op(code: int, value: int, yes: int = 0, no: int = 0) -> bytes:  # load 0x20, == 0x15, >= 0x35, & 0x45, return 0x06
        return struct.pack("=HBBI", code, yes, no, value)

    program = [op(0x20, 4), op(0x15, audit, 1), op(0x06, kill), op(0x20, 0), op(0x35, 1 << 30, 0, 1), op(0x06, kill)]
    for number in (*denied, *CALLS_OF_ALL):
        program += [op(0x15, number, 0, 1), op(0x06, deny)]
    program += [op(0x15, 435, 0, 1), op(0x06, 0x50000 | 38)]  # clone3 hides its flags: ENOSYS makes libc use clone
    program += [op(0x15, clone, 0, 4), op(0x20, 16), op(0x45, 0x7E020000, 0, 1), op(0x06, deny), op(0x06, allow)]
    program += [op(0x15, socket, 0, 3), op(0x20, 16), op(0x15, 1, 1), op(0x06, deny), op(0x06, allow)]
    text = ctypes.create_string_buffer(b"".join(program))
    kernel("prctl", 22, 2, struct.pack("@HP", len(program), ctypes.addressof(text)), 0, 0)  # PR_SET_SECCOMP, FILTER


def refuse(config: dict, name: str, error: Exception) -> None:
    """Tell the caller that the sandbox, and not the program, has failed; end."""
    os.write(config["report"], f"setup {name} {error}\n".encode())
    os._exit(1)


def apply(config: dict, names: str) -> None:
    """Apply those of the named layers that the probe has settled; the first that fails ends the child."""
    functions = {"oom": raise_oom_score, "uid": choose_uid, "namespaces": enter_namespaces, "root": build_root,
                 "limits": limit_resources, "drop": drop_privileges, "landlock": enter_landlock, "seccomp": filter_system_calls}
    for name in names.split():
        if name in config["layers"]:
            try:
                functions[name](config)
            except (OSError, ValueError) as error:
                refuse(config, name, error)


def become_job(config: dict, roles: dict[str, types.CodeType]) -> None:
    """Process C: shed everything, then play the role."""
    os.chdir(config["workdir"])
    apply(config, "limits drop landlock seccomp")
    low = 3
    for kept in (*sorted(config["keep"]), 1 << 16):
        os.closerange(low, kept)
        low = kept + 1
    sys.path[:] = ["", *sys.path[1:], *config["path"]]
    sys.argv[:] = ["program.py"]
    module, role = config["role"]
    for name in {"": (), "wire": ("codec", "wire"), "judge": ("codec", "wire", "judge")}[module]:
        sys.modules[name] = types.ModuleType(name)
        exec(roles[name], sys.modules[name].__dict__)
    (sys.modules[module].__dict__ if module else globals())[role](config)


def memory_in_use() -> int:
    """Bytes of private memory of all processes in this pid namespace."""
    pages = 0
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/statm") as file:
                _, resident, shared, *_ = map(int, file.read().split())
        except OSError:
            continue  # it has just ended
        pages += resident - shared
    return pages * os.sysconf("SC_PAGE_SIZE")


def run_init(config: dict, roles: dict[str, types.CodeType]) -> None:
    """Process B: start C, reap everybody, report how C ended. As pid 1 its end is the end of all."""
    _signal.signal(_signal.SIGALRM, _signal.SIG_DFL)
    _signal.signal(_signal.SIGTERM, _signal.SIG_DFL)
    os.setsid()
    kernel("prctl", 1, _signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG
    apply(config, "root")
    own_proc = {"bwrap", "namespaces"} & set(config["layers"])
    _signal.pthread_sigmask(_signal.SIG_BLOCK, {_signal.SIGCHLD})
    begin, pid, cause = time.monotonic(), 0, "done"
    try:
        job = os.fork()
    except OSError as error:
        refuse(config, "process", error)
    if job == 0:
        _signal.pthread_sigmask(_signal.SIG_UNBLOCK, {_signal.SIGCHLD})
        return become_job(config, roles)
    while pid != job and cause == "done":
        pid, status, usage = os.wait4(-1, os.WNOHANG if own_proc else 0)
        if pid == 0 and _signal.sigtimedwait({_signal.SIGCHLD}, 0.1) is None:
            cause = "memory" if memory_in_use() > 4 * config["memory"] else "done"
    line = f"{cause} {status} {time.monotonic() - begin:.6f} {usage.ru_utime + usage.ru_stime:.6f}\n"
    os.write(config["report"], line.encode())
    os.killpg(0, _signal.SIGKILL)  # what the program left behind, and ourselves where we are not pid 1
    os._exit(0)


def sweep(init: int, config: dict) -> None:
    """Kill and reap every child; orphans of the job become ours, because we are their subreaper."""
    try:
        if "uid" in config["layers"] and not {"bwrap", "namespaces"} & set(config["layers"]):
            killer = os.fork()
            if killer == 0:
                if LIBC.setresuid(*[config["uid"]] * 3) == 0:  # never as root
                    LIBC.kill(-1, 9)  # all of the job's own uid at once, in whatever session they are
                os._exit(0)
            os.waitpid(killer, 0)
        if init:
            os.kill(init, _signal.SIGKILL)  # with a pid namespace, everybody else is gone then
            os.killpg(init, _signal.SIGKILL)  # all at once: one by one, a fork bomb is quicker than we are
            os.waitpid(init, 0)
    except (ProcessLookupError, ChildProcessError, BlockingIOError):
        pass  # it ended by itself in this moment, or there is no process to be had: one by one, then
    while True:
        try:
            with open("/proc/thread-self/children") as file:
                children = file.read().split()
        except OSError:
            children = []  # a pid namespace, or not on Linux: the process group was all that could be killed
        for child in children:
            os.kill(int(child), _signal.SIGKILL)
        try:
            if os.waitpid(-1, 0 if children else os.WNOHANG)[0] == 0:
                return
        except ChildProcessError:
            return


def boot(config: dict, roles: dict[str, types.CodeType]) -> None:
    """Process A, out of the job's reach: contain, start B, keep the clock, say so before C is killed and B wakes, sweep."""
    def stop(number: int, frame: types.FrameType | None) -> None:
        _signal.signal(_signal.SIGALRM, _signal.SIG_IGN)  # one is enough, a second would interrupt the sweeping
        _signal.signal(_signal.SIGTERM, _signal.SIG_IGN)
        raise Stopped("timeout" if number == _signal.SIGALRM else "stopped")

    _signal.signal(_signal.SIGALRM, stop)
    _signal.signal(_signal.SIGTERM, stop)
    config |= {"uid": os.getuid(), "gid": os.getgid()}
    init, begin, cause = None, time.monotonic(), "killed"  # unless B reports before
    try:
        apply(config, "oom uid namespaces")
        kernel("prctl", 36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER
        kernel("prctl", 4, 0, 0, 0, 0)  # PR_SET_DUMPABLE 0: nobody of our uid may ptrace us
        kernel("prctl", 1, _signal.SIGTERM, 0, 0, 0)  # PR_SET_PDEATHSIG, after namespaces, which clear it
        if "bwrap" not in config["layers"] and os.getppid() != config["caller"]:
            os._exit(1)  # the caller died while we started
        begin, init = time.monotonic(), os.fork()
        if init:
            _signal.setitimer(_signal.ITIMER_REAL, config["timeout"])
            os.waitpid(init, 0)
    except Stopped as error:
        cause = str(error)
    except OSError as error:
        refuse(config, "process", error)
    if init == 0:
        return run_init(config, roles)
    _signal.signal(_signal.SIGALRM, _signal.SIG_IGN)
    _signal.signal(_signal.SIGTERM, _signal.SIG_IGN)
    os.write(config["report"], f"{cause} 0 {time.monotonic() - begin:.6f} 0\n".encode())
    sweep(init if init and cause != "killed" else 0, config)
    os._exit(0)


def program(config: dict) -> None:
    """Role: be the program, as __main__, with its text on disk so that tracebacks can quote it."""
    with open("program.py", "w", encoding="utf-8", errors="replace") as file:
        file.write(config["code"])
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    main.__dict__.update(__file__="program.py", exit=sys.exit, quit=sys.exit)  # site, which is not imported, gives the last two
    try:
        exec(compile(config["code"], "program.py", "exec", dont_inherit=True), main.__dict__)
    except SystemExit:
        raise
    except BaseException as error:
        error = error.with_traceback(error.__traceback__ and error.__traceback__.tb_next)  # without this frame
        sys.__excepthook__(type(error), error, error.__traceback__)
        raise SystemExit(1) from None


def can_drop() -> bool:
    """Whether we are root with uids to spare; in a container without root it may own few."""
    if sys.platform != "linux" or os.getuid():
        return False
    with open("/proc/self/uid_map") as file:
        return max(int(inside) + int(count) for inside, _, count in map(str.split, file)) >= 1 << 25


def directories() -> tuple[list[str], list[str]]:
    """(what the child may read, its packages). They are importable, though no .pth file is processed (-S)."""
    library = os.path.dirname(os.path.dirname(os.path.realpath(os.__file__)))
    packages = [entry for entry in sys.path if entry.endswith(("site-packages", "dist-packages")) and os.path.isdir(entry)]
    readable = [library, "/usr/lib", "/usr/lib64", "/usr/local/lib", "/lib", "/lib64", "/usr/bin", "/bin",
                "/usr/share/zoneinfo", "/etc/ld.so.cache", "/etc/localtime", "/etc/alternatives",
                os.path.realpath(sys.executable), *packages]
    readable = sorted({entry for entry in readable if os.path.exists(entry)})
    return [path for path in readable if not any(path.startswith(other + "/") for other in readable)], packages


def bubblewrap(readable: list[str], as_root: bool) -> list[str]:
    """Arguments of the "bwrap" layer: a new root that holds the interpreter, /tmp and nothing else.

    The caller starts it with a scrubbed environment, because pid 1 in there is bwrap with what it was started with.
    Real root must give up its uid inside, and /proc must be read-only, or /proc/sys/kernel would be writable.
    """
    command = ["--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts", "--unshare-cgroup-try",
               "--die-with-parent", "--new-session", "--cap-drop", "ALL"]
    if as_root:
        command += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID", "--cap-add", "CAP_KILL"]  # to drop, and to sweep
    else:
        command += ["--unshare-user", "--disable-userns", "--uid", str(os.getuid() or 65534)]
    command += ["--proc", "/proc", "--dev", "/dev", "--remount-ro", "/proc"]
    command += [word for name in ("/tmp", "/dev/shm") for word in ("--perms", "1777", "--size", str(64 << 20), "--tmpfs", name)]
    parents = {"/" + "/".join(path.split("/")[1:n]) for path in readable for n in range(1, path.count("/") + 1)}
    made = [("--perms", "0755", "--dir", parent) for parent in sorted(parents - {"/", "/tmp"} - set(readable))]
    bound = [("--ro-bind", entry, entry) for entry in readable]
    return [*command, *(word for words in made + bound for word in words), "--chdir", "/tmp", "--"]


# A program that tries to get out, and prints in one word each what it could do. {0}: pid, file and port of the caller.
PROBE = """
import os, socket; pid, file, port = {0!r}
def attempt(word, action):
    try: action()
    except OSError: return
    print(word)
attempt("files", lambda: open("/etc/passwd").close()); attempt("outside", lambda: os.stat("/etc/passwd"))
def environment():  # in a pid namespace the same number may be one of ours, with the scrubbed environment
    if "\\0MALLOC_ARENA_MAX=2\\0" in open(f"/proc/{{pid}}/environ").read(): raise OSError
attempt("environment", environment)
if os.getpid() > 9: attempt("signals", lambda: os.kill(pid, 0))
attempt("writes", lambda: open(file, "w").close())
attempt("tcp", lambda: socket.create_connection(("127.0.0.1", port), 1).close())
attempt("udp", lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).connect(("192.0.2.1", 9)))
"""
OPENINGS = {"files": "read files outside", "environment": "read other processes' environment", "signals": "signal processes",
            "writes": "write files outside", "tcp": "open TCP connections", "udp": "send UDP packets",
            "outside": "see which files exist, change modes of yours, use unix sockets, fill the disk"}
LAYERS = {"bwrap": "bubblewrap: a root, pids, network and IPC of its own", "namespaces": "the same by system calls",
          "uid": "root becomes a throw-away uid", "landlock": "files, TCP and signals by allow-list",
          "seccomp": "dangerous system calls and sockets refused", "oom": "the kernel's first choice when memory runs out",
          "limits": "rlimits, no_new_privs, subreaper, scrubbed environment, bounded output"}
