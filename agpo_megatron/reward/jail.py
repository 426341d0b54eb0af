"""A child that can compute and nothing else: no network, no processes, no writing outside its folder, hard limits.

Four means, none of which needs a privilege or a daemon: Landlock (files), a seccomp filter (system calls), rlimits
(memory, CPU, file size), and a bounding set without capabilities. ``python -I jail.py`` runs one job from stdin and
is itself free, the children that it forks are not (``run``). Standard library only: it runs by its path, alone.

Numbers are those of the Linux uapi headers: landlock.h, seccomp.h, filter.h, unistd_64.h, asm-generic/unistd.h.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import platform
import resource
import select
import shutil
import signal
import struct
import sys
import tempfile
import time
from typing import Any

LIBC = ctypes.CDLL(None, use_errno=True)
PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 1, 22, 24, 38
LANDLOCK_CREATE_RULESET, LANDLOCK_ADD_RULE, LANDLOCK_RESTRICT_SELF = 444, 445, 446
READ = 0b1101  # execute, read a file, read a folder
WRITE_TRUNCATE = 1 << 1 | 1 << 14  # write a file, truncate
READABLE = (
    "/usr",
    "/lib",
    "/lib64",
    "/bin",
    "/etc",
    "/dev/urandom",
    "/dev/random",
    "/proc/self",
    "/proc/cpuinfo",
)
KEPT_OUTPUT = 2**20  # bytes of a child's output that are looked at
CLONE_THREAD = 0x10000

# Refused to the child: sockets and ways around them, processes, other processes, attributes of files, shared memory
# that outlives it. Name, number on x86_64, on aarch64.
_REFUSED_CALLS = """
shmget 29 194
socket 41 198
fork 57 -
vfork 58 -
kill 62 129
semget 64 190
msgget 68 186
chmod 90 -
fchmod 91 52
chown 92 -
fchown 93 55
lchown 94 -
ptrace 101 117
rt_sigqueueinfo 129 138
utime 132 -
setpriority 141 140
setxattr 188 5
lsetxattr 189 6
fsetxattr 190 7
removexattr 197 14
lremovexattr 198 15
fremovexattr 199 16
tkill 200 130
tgkill 234 131
utimes 235 -
mq_open 240 180
add_key 248 217
request_key 249 218
keyctl 250 219
fchownat 260 54
futimesat 261 -
fchmodat 268 53
unshare 272 97
utimensat 280 88
rt_tgsigqueueinfo 297 240
perf_event_open 298 241
prlimit64 302 261
setns 308 268
process_vm_readv 310 270
process_vm_writev 311 271
bpf 321 280
userfaultfd 323 282
pidfd_send_signal 424 424
io_uring_setup 425 425
pidfd_open 434 434
clone3 435 435
pidfd_getfd 438 438
fchmodat2 452 452
setxattrat 463 463
removexattrat 466 466
"""
_ROWS = [row.split() for row in _REFUSED_CALLS.strip().splitlines()]
REFUSED = {
    machine: {int(row[column]) for row in _ROWS if row[column] != "-"}
    for column, machine in enumerate(("x86_64", "aarch64"), start=1)
}
CLONE = {"x86_64": 56, "aarch64": 220}
AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}


def missing() -> str:
    """Name what this machine lacks for a jail; "" if nothing."""
    if platform.machine() not in CLONE:
        return f"a seccomp filter for {platform.machine()}"
    if LIBC.syscall(LANDLOCK_CREATE_RULESET, None, 0, 1) < 3:
        return "Landlock, version 3 or later (Linux 6.2, enabled with lsm=landlock)"
    return ""


def confine(folder: str, limits: dict[str, Any]) -> None:
    """Limits that hold everywhere: rlimits, no capability to be had, death with the parent."""
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    for capability in range(64):
        LIBC.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)
    rlimits = {
        resource.RLIMIT_AS: limits["memory_mb"] * 2**20,
        resource.RLIMIT_CPU: int(limits["seconds"]) + 1,
        resource.RLIMIT_FSIZE: limits["file_mb"] * 2**20,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NOFILE: 64,
    }
    if not limits["locked"]:
        rlimits[resource.RLIMIT_NPROC] = 0  # root is exempt
    for kind, limit in rlimits.items():
        resource.setrlimit(kind, (limit, limit))
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(HOME=folder, TMPDIR=folder, PATH="/usr/bin:/bin", OMP_NUM_THREADS="1")


def lock(folder: str) -> None:
    """Landlock and seccomp. Raises OSError where the kernel refuses; never to be undone."""
    if LIBC.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "no_new_privs")
    abi = LIBC.syscall(LANDLOCK_CREATE_RULESET, None, 0, 1)
    every = (1 << (16 if abi >= 5 else 15)) - 1
    attributes = struct.pack("=Q", every)
    rules = LIBC.syscall(LANDLOCK_CREATE_RULESET, attributes, len(attributes), 0)
    if rules < 0:
        raise OSError(ctypes.get_errno(), "landlock_create_ruleset")
    for path in (*READABLE, sys.prefix, sys.base_prefix):
        _allow(rules, path, READ if os.path.isdir(path) else READ & ~(1 << 3))
    _allow(rules, "/dev/null", 1 << 2 | WRITE_TRUNCATE)
    _allow(rules, folder, every)
    if LIBC.syscall(LANDLOCK_RESTRICT_SELF, rules, 0):
        raise OSError(ctypes.get_errno(), "landlock_restrict_self")
    os.close(rules)
    _filter_calls()


def _allow(rules: int, path: str, access: int) -> None:
    try:
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    rule = struct.pack("=Qi", access, place)
    failed = LIBC.syscall(LANDLOCK_ADD_RULE, rules, 1, rule, 0)
    os.close(place)
    if failed:
        raise OSError(ctypes.get_errno(), f"landlock_add_rule for {path}")


def _filter_calls() -> None:
    """Refuse ``REFUSED`` with EPERM, clone3 with ENOSYS (the C library then uses clone), clone but for threads."""
    machine = platform.machine()
    load, equal, at_least, any_bit, answer = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, kill, eperm, enosys = 0x7FFF0000, 0x80000000, 0x50001, 0x50026
    program = [
        (load, 0, 0, 4),  # architecture
        (equal, 1, 0, AUDIT_ARCH[machine]),
        (answer, 0, 0, kill),
        (load, 0, 0, 0),  # number of the call
        (at_least, 0, 1, 0x40000000),  # x32
        (answer, 0, 0, eperm),
        (equal, 0, 1, 435),
        (answer, 0, 0, enosys),
    ]
    for number in sorted(REFUSED[machine]):
        program += [(equal, 0, 1, number), (answer, 0, 0, eperm)]
    program += [
        (equal, 1, 0, CLONE[machine]),
        (answer, 0, 0, allow),
        (load, 0, 0, 16),  # flags, the first argument
        (any_bit, 1, 0, CLONE_THREAD),
        (answer, 0, 0, eperm),
        (answer, 0, 0, allow),
    ]
    code = b"".join(struct.pack("=HBBI", *line) for line in program)
    held = ctypes.create_string_buffer(code, len(code))
    head = struct.pack("@HP", len(program), ctypes.addressof(held))
    if LIBC.prctl(PR_SET_SECCOMP, 2, head, 0, 0):
        raise OSError(ctypes.get_errno(), "seccomp")


def run(code: str, test: dict[str, str], limits: dict[str, Any], nonce: str) -> dict[str, Any]:
    """One test in a child of its own: ``{"status", "output"}``.

    ``test``: "stdin", what the program reads; "after", code that is run behind it in the same module. ``status``: "ok",
    or "exit N", "signal N", "timeout". ``output``: what it wrote, at most KEPT_OUTPUT bytes; ``nonce`` stands at its
    end if the program came to its end (sys.exit counts where there is nothing to run behind it).
    """
    folder = tempfile.mkdtemp(prefix="reward-code-")
    source = os.path.join(folder, "stdin")
    output = os.path.join(folder, "stdout")
    try:
        with open(source, "w", encoding="utf-8", errors="replace") as file:
            file.write(test.get("stdin", ""))
        child = os.fork()
        if child == 0:
            _be_the_child(code, test.get("after", ""), folder, source, output, limits, nonce)
        status = _wait(child, limits["seconds"])
        with open(output, "rb") as file:
            return {"status": status, "output": file.read(KEPT_OUTPUT).decode(errors="replace")}
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _be_the_child(
    code: str, after: str, folder: str, source: str, output: str, limits: dict[str, Any], nonce: str
) -> None:
    """Never returns."""
    status = 1
    try:
        os.setsid()
        for target, path, flags in (
            (0, source, os.O_RDONLY),
            (1, output, os.O_WRONLY | os.O_CREAT),
        ):
            opened = os.open(path, flags, 0o600)
            os.dup2(opened, target)
        os.dup2(os.open("/dev/null", os.O_WRONLY), 2)
        os.closerange(3, 4096)
        sys.stdin, sys.stdout = open(0, encoding="utf-8"), open(1, "w", encoding="utf-8")  # noqa: SIM115
        confine(folder, limits)
        if limits["locked"]:
            lock(folder)
        module: dict[str, Any] = {"__name__": "__main__"}
        try:
            exec(compile(code, "solution.py", "exec"), module)
        except SystemExit as left:
            if after or left.code not in (None, 0):
                raise
        if after:
            exec(compile(after, "tests.py", "exec"), module)
        sys.stdout.flush()
        os.write(1, nonce.encode())
        status = 0
    finally:
        os._exit(status)


def _wait(child: int, seconds: float) -> str:
    handle = os.pidfd_open(child)
    poll = select.poll()
    poll.register(handle, select.POLLIN)
    over = not poll.poll(seconds * 1000)
    os.close(handle)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # and what it may have started, where it could
    _, status = os.waitpid(child, 0)
    if over or (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXCPU):
        return "timeout"
    if os.WIFSIGNALED(status):
        return f"signal {os.WTERMSIG(status)}"
    return "ok" if os.WEXITSTATUS(status) == 0 else f"exit {os.WEXITSTATUS(status)}"


def main() -> None:
    """A job ``{"code", "tests", "limits", "nonce", "all"}`` from stdin; the list of what ``run`` says, to stdout.

    Without ``all`` the first test that does not end well is the last.
    """
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    job = json.load(sys.stdin)
    deadline = time.monotonic() + job["limits"]["total_seconds"]
    results = []
    for test in job["tests"]:
        left = deadline - time.monotonic()
        if left <= 0:
            break
        limits = {**job["limits"], "seconds": min(left, job["limits"]["seconds"])}
        results.append(run(job["code"], test, limits, job["nonce"]))
        if results[-1]["status"] != "ok" and not job["all"]:
            break
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main()
