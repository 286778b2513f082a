"""Guests with the agent, and `forkfs exec` in them."""

import os
import socket
import threading
import time

from . import processes


def exec_command(case, target, *command, options=()):
    """The words of a `forkfs exec`. target: a guest, or the path of its agent's socket."""
    path = target if isinstance(target, (str, os.PathLike)) else target.dir / "agent"
    return [case.forkfs(), "exec", "--socket", str(path), *options, "--", *command]


def run(case, target, *command, options=(), check=True, **how):
    """Run a command in the guest to its end; a Result."""
    return case.run(*exec_command(case, target, *command, options=options), check=check, **how)


def shell(case, target, script, **how):
    """The same with a script for the guest's shell."""
    return run(case, target, "sh", "-c", script, **how)


def side_by_side(n, one):
    """Call one(0) … one(n - 1) in threads of their own; the results in order."""
    results, errors = [None] * n, []

    def work(i):
        try:
            results[i] = one(i)
        except Exception as e:  # whatever it is, it is the test's
            errors.append(e)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(n)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    if errors:
        raise errors[0]
    return results


def wait_for(condition, otherwise, seconds=60):
    """Wait until it is true."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, otherwise
        time.sleep(0.02)


def wait_text(path, text):
    """Wait until a file has the text."""
    wait_for(lambda: path.exists() and text in path.read_text(errors="replace"), f"{path} does not say: {text}")


def service(case, name="agent", options=()):
    """The agent as a service of this machine: no VM; (its socket, the process). It leaves the clock alone, which is right."""
    path = case.dir / f"{name}.sock"
    agent = os.path.join(os.environ.get("FORKFS_TEST_BUILD") or os.environ["FORKFS_BUILD"], "tools", "forkfs-agent")
    process = case.start(agent, "--no-vsock", "--unix", path, *options, stderr=open(case.dir / f"{name}.log", "wb"))
    probe = socket.socket(socket.AF_UNIX)
    while probe.connect_ex(str(path)):
        assert process.poll() is None, f"the agent has ended: {process.returncode}"
    probe.close()
    return path, process


def children(pid):
    """The processes whose parent is that one, as (pid, state)."""
    found = []
    for name in os.listdir("/proc"):
        fields = processes.stat_fields(name) if name.isdigit() else None
        if fields and int(fields[1]) == pid:
            found.append((int(name), fields[0]))
    return found


def link_of(path):
    """The process that has the connection to an agent."""
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/cmdline", "rb") as f:
                words = f.read().split(b"\0")
        except OSError:
            continue
        if words[0] == b"forkfs-agent-link" and words[1] == str(path).encode():
            return int(pid)
    raise AssertionError(f"{path} has no link")
