"""Keeps one role and all its descendants: ``python -I -S keeper.py NAME deaf|hearing``, run by ``processes.start``.

    supervisor ── outer keeper ── inner keeper ── role ── whatever it starts

Each of the first three is a subreaper: a process below it whose parent dies becomes its child, whatever that process
has done with its process group, its session or its environment (SGLang's processes wipe theirs when they take a
title). So each can end, by nothing but the kernel's own list of its children, all that a role leaves behind, and no
stranger. The inner keeper does so when the role has ended, or the supervisor or the outer keeper has; the outer one
when the inner one has ended; the supervisor when both have. None of them kills another: so whichever two are killed,
and whatever the others were about to do, the third is there to do it. A keeper ends as what it kept did.

Imports little: two of these run beside every role.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import sys
import time

TYPE_CHECKING = False
if TYPE_CHECKING:  # typing takes as long to import as all the rest
    from typing import NoReturn

PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_CHILD_SUBREAPER = 1, 4, 36
LIBC = ctypes.CDLL(None, use_errno=True)
FOR_ALL = (signal.SIGUSR1, signal.SIGTERM)
"""The signals that Slurm sends to every process of a step, meant for the supervisor."""
UNHEARD = (*FOR_ALL, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
TIE = 0
"""Stdin of both keepers, a socket: brings the role's command, takes the pids of the inner keeper and of the role, and
closes with the supervisor."""
LONGEST_COMMAND = 2**20
PATIENCE = 15.0
"""Seconds for a killed process to end: in uninterruptible I/O it ends late even after SIGKILL."""


def be_subreaper(on: bool = True) -> None:
    """Have orphans among this process's descendants become its children."""
    LIBC.prctl(PR_SET_CHILD_SUBREAPER, int(on), 0, 0, 0)


def die_with_parent() -> None:
    """Ask the kernel to SIGKILL this process when its parent dies, however the parent dies."""
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def children() -> set[int]:
    """Find the pids of this process's children, ended ones included until they are waited for."""
    own, found = os.getpid(), set()
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat", "rb") as file:
                    fields = file.read().rpartition(b")")[2].split()
            except OSError:
                continue  # it has ended meanwhile
            if int(fields[1]) == own:
                found.add(int(name))
    return found


def sweep(spare: set[int]) -> set[int]:
    """Kill this process's children but ``spare``, and what they leave to it, until there are none; return those that
    do not end. Until a child has been waited for, its pid is no other process's."""
    while found := children() - spare:
        for pid in found:
            try:
                os.kill(pid, signal.SIGKILL)
            except PermissionError:
                continue  # of another user by now
        if left := wait_for(found, PATIENCE):
            return left
    return set()


def wait_for(pids: set[int], seconds: float) -> set[int]:
    """Wait until these children have ended; return those that do not within ``seconds``."""
    deadline = time.monotonic() + seconds
    while pids := {pid for pid in pids if not reaped(pid)}:
        if time.monotonic() > deadline:
            break
        time.sleep(0.005)
    return pids


def reaped(pid: int) -> bool:
    try:
        return os.waitpid(pid, os.WNOHANG)[0] == pid
    except ChildProcessError:
        return True


def main() -> NoReturn:
    """Read the command, become the outer keeper, and start the inner one, which starts the role."""
    deaf = sys.argv[2] == "deaf"
    signal.pthread_sigmask(signal.SIG_BLOCK, UNHEARD)
    signal.signal(signal.SIGCHLD, lambda *_: None)  # for the wake-up of ``keep``
    be_subreaper()
    command = os.read(TIE, LONGEST_COMMAND)
    if not command:
        sys.exit(1)  # the supervisor is gone
    lower, upper = os.pipe()  # closes with the outer keeper
    inner = os.fork()
    if inner:
        os.close(lower)
        keep(inner, [])
    os.close(upper)
    be_subreaper()  # which a fork does not inherit
    role = start_role(command.split(b"\0"), deaf)
    try:
        os.write(TIE, f"{os.getpid()} {role}".encode())
    except OSError:
        os.kill(role, signal.SIGKILL)  # the supervisor is gone
    keep(role, [TIE, lower])


def start_role(argv: list[bytes], deaf: bool) -> int:
    """Start the role in a process group of its own; return its pid."""
    keeper = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    try:
        os.setpgid(0, 0)
        die_with_parent()
        if os.getppid() != keeper:
            os._exit(1)  # too late to be told
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for number in (signal.SIGPIPE, signal.SIGXFSZ):
            signal.signal(number, signal.SIG_DFL)  # which Python ignores
        # Blocked for the deaf, not ignored: SGLang installs handlers, which would undo the latter.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, set(UNHEARD) - set(FOR_ALL if deaf else ()))
        os.execvp(argv[0], argv)
    except OSError as error:
        sys.stderr.write(f"agpo-megatron: cannot run {os.fsdecode(argv[0])}: {error}\n")
        sys.stderr.flush()
    finally:
        os._exit(127)


def keep(child: int, ties: list[int]) -> NoReturn:
    """Wait until ``child`` has ended, killed if one of ``ties`` closes; end all that is below, and end as it did."""
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    events = select.poll()
    for descriptor in (woken, *ties):
        events.register(descriptor, select.POLLIN)
    while not has_ended(child):
        if [descriptor for descriptor, _ in events.poll() if descriptor != woken]:
            os.kill(child, signal.SIGKILL)
            break
        os.read(woken, 4096)
    # Only waited for at the very end: until then its pid, which the supervisor signals, is nobody else's.
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    if left := sweep(spare={child}):
        sys.stderr.write(f"agpo-megatron: killed, but not ended in {PATIENCE:g} s: {left}\n")
        sys.stderr.flush()
    end_like(os.waitpid(child, 0)[1])


def has_ended(child: int) -> bool:
    """Wait for all ended children but ``child``; say whether that one has ended too."""
    while ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT):
        if ended.si_pid == child:
            return True
        os.waitpid(ended.si_pid, 0)
    return False


def end_like(status: int) -> NoReturn:
    """End with the same code, or by the same signal, without a core of this process."""
    code = os.waitstatus_to_exitcode(status)
    if code < 0:
        LIBC.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)
        if -code != signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {-code})
        os.kill(os.getpid(), -code)
    os._exit(code)


if __name__ == "__main__":
    main()
