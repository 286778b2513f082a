"""Until a guest's agent can be asked: one that is late, one that never comes, and a VM that ends instead."""

import signal
import subprocess
import time

from forkfs_test import agent, processes

LATE = 10  # seconds


def stopped(case):
    """A guest with the agent whose vCPU is stopped before it has booted."""
    guest = case.guest(agent=True, mib=128)
    guest.qmp.execute("stop")
    assert "forkfs-agent: up" not in (guest.dir / "console").read_text(errors="replace")
    return guest


def test_late(case):
    """The guest comes ten seconds late: the command that waits for it runs, and none is lost."""
    guest = stopped(case)
    waits = [case.start(*agent.exec_command(case, guest, "sh", "-c", f"echo {n}; exit {n}"), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
             for n in range(3)]
    time.sleep(LATE)
    for n, p in enumerate(waits):
        assert p.poll() is None, (n, p.returncode, p.stderr.read())
    guest.qmp.execute("cont")
    for n, p in enumerate(waits):
        out, err = p.communicate(timeout=90)
        assert (p.returncode, out) == (n, b"%d\n" % n), (n, p.returncode, out, err)


def test_wedged(case):
    """The guest never comes: the wait ends with what it waited for, and a later command runs when the guest does."""
    guest = stopped(case)
    done = agent.run(case, guest, "true", options=["--ready-timeout", "2"], check=False)
    assert done.code == 125 and "within 2.0 s" in done.err and "edge 'begun'" in done.err, done
    guest.qmp.execute("cont")
    guest.booted()
    agent.wait_for(lambda: agent.run(case, guest, "true", check=False).code == 0, "the guest that has come is never asked again")


def test_ends_early(case):
    """The VM ends while its agent is waited for: who waits is told so then, long before any time-out."""
    guest = stopped(case)
    p = case.start(*agent.exec_command(case, guest, "true", options=["--ready-timeout", "3600"]), stderr=subprocess.PIPE)
    agent.wait_for(lambda: [pid for pid in processes.marked(case.id) if processes.describe(pid).startswith(f"{pid} (forkfs-agent-link")], "no link")
    guest.process.send_signal(signal.SIGKILL)
    _, err = p.communicate(timeout=60)
    assert p.returncode == 125 and b"ended" in err, (p.returncode, err)
