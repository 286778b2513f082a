"""The agent in a guest: commands with their output and exit codes, its duties as process 1, and as a service of this machine."""

import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import termios
import time

from forkfs_test import agent, children, processes, rig

TIMEOUT = {"test_false": 180, "test_orphans": 240}
TOGETHER = 10


def boot(case, **how):
    """A guest whose process 1 is the agent."""
    return case.guest(agent=True, mib=128, run=how.pop("run", []), **how).booted()


def test_guest(case):
    """A Linux guest with the agent as process 1: output, codes, signals, stdin, ten at a time, a terminal."""
    guest = boot(case)
    done = agent.shell(case, guest, "echo out; echo err >&2; exit 7", check=False)
    assert (done.code, done.out, done.err) == (7, "out\n", "err\n"), (done.code, done.out, done.err)
    assert agent.run(case, guest, "nothing-of-that-name", check=False).code == 127
    assert agent.run(case, guest, "/etc", check=False).code == 126
    assert agent.shell(case, guest, "kill -9 $$", check=False).code == 137
    assert agent.shell(case, guest, 'echo $A; pwd', options=["--env", "A=b c", "--cwd", "/tmp"]).out == "b c\n/tmp\n"
    text = os.urandom(300_000).hex()
    done = subprocess.run(agent.exec_command(case, guest, "md5sum", options=["-i"]), input=text, capture_output=True, text=True, check=True)
    here = subprocess.run(["md5sum"], input=text, capture_output=True, text=True, check=True)
    assert done.stdout == here.stdout
    codes = agent.side_by_side(TOGETHER, lambda i: agent.shell(case, guest, f"echo {i}; exit {i}", check=False))
    assert [(c.code, c.out) for c in codes] == [(i, f"{i}\n") for i in range(TOGETHER)]
    # process 1 is ours, and has no child that is not one of a command's
    assert "forkfs-agent" in agent.shell(case, guest, "cat /proc/1/cmdline; ls -l /proc/1/exe").out + guest.console.wait("forkfs-agent: up").string
    assert terminal(case, guest, "tty; stty size; exit 3\n", 3, (33, 111)) > 0
    # orphans: their parents are gone, process 1 has them, and none stays
    agent.shell(case, guest, "for i in $(seq 300); do (sleep 0 & exec true); done")
    agent.wait_for(lambda: not re.search(r"\bZ\b", agent.shell(case, guest, "ps -o stat,comm | grep -v sh").out), "zombies are left")


def terminal(case, target, text, code, size):
    """Type into `forkfs exec -it sh`; how many bytes it showed. The shell must know the terminal's size."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", *size, 0, 0))
    process = case.start(*agent.exec_command(case, target, "sh", options=["-it"]), stdin=slave, stdout=slave, stderr=slave)
    os.close(slave)
    shown = b""

    def read():
        nonlocal shown
        ready, _, _ = select.select([master], [], [], 30)
        assert ready, f"the terminal is silent; so far: {shown!r}"
        try:
            shown += os.read(master, 65536)
        except OSError:  # EIO: its other side is closed
            return False
        return True

    while b"#" not in shown and b"$" not in shown:
        assert read(), shown
    os.write(master, text.encode())
    while read():
        pass
    os.close(master)
    assert process.wait(timeout=30) == code, shown
    assert b"/dev/pts/" in shown and f"{size[0]} {size[1]}".encode() in shown, shown
    return len(shown)


def in_sandbox(r, name, script):
    """Run a script in the guest of a sandbox; what it has said."""
    return r.mount.run("exec", name, "--", "sh", "-c", script).out


def test_restored(case):
    """Commands in a sandbox by its name; in its children, each with the clock of now, ten at a time; in a child of a child; in the source as before."""
    r = rig.Rig(case, guest=boot(case))
    assert in_sandbox(r, "sbx1", "echo one > /tmp/who; cat /tmp/who") == "one\n"
    assert rig.wait_settled(r.branch("b1")) == "ready"
    both, _ = children.run(r.mount, "sbx1/b1", "-n", "2", "--attach", "c")
    for name in ("c-1", "c-2"):
        assert in_sandbox(r, name, f"cat /tmp/who; echo {name} > /tmp/who") == "one\n"
        said = agent.side_by_side(TOGETHER, lambda i, name=name: in_sandbox(r, name, f"echo {i}; cat /tmp/who"))
        assert said == [f"{i}\n{name}\n" for i in range(TOGETHER)], said
        assert abs(int(in_sandbox(r, name, "date +%s")) - time.time()) < 60
    (r.mount.path / "c-1/branches/b2").mkdir()
    assert rig.wait_settled(r.mount.path / "c-1/branches/b2") == "ready"
    grandchild, _ = children.run(r.mount, "c-1/b2", "--attach", "d")
    assert in_sandbox(r, "d", "cat /tmp/who") == "c-1\n"
    assert in_sandbox(r, "sbx1", "cat /tmp/who") == "one\n"
    for child in (*both, *grandchild):
        assert not (child.dir / "agent.log").exists(), "what goes over the port is kept"
        child.stop()
    done = r.mount.run("exec", "c-2", "--", "true", check=False)
    assert done.code == 125, done.err
    plain = case.guest("plain", mib=96).booted()
    r.mount.attach(plain)
    done = r.mount.run("exec", "plain", "--", "true", check=False)
    assert done.code == 125 and "no port for an agent" in done.err, done.err


def test_resize(case):
    """A terminal that changes its size tells the guest's."""
    path, _ = agent.service(case)
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 20, 70, 0, 0))
    process = case.start(*agent.exec_command(case, path, "sh", "-c", 'trap "stty size; exit 4" WINCH; echo ready; while :; do sleep 0.05; done',
                                             options=["-it"]), stdin=slave, stdout=slave, stderr=slave)
    shown = b""
    while b"ready" not in shown:
        shown += os.read(master, 4096)
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 90, 0, 0))
    os.kill(process.pid, signal.SIGWINCH)  # a terminal sends it to its own session only
    os.close(slave)
    assert process.wait(timeout=30) == 4
    while b"40 90" not in shown:
        shown += os.read(master, 4096)
    os.close(master)


def test_false(case):
    """1000 × false, ten at a time, while orphans end all the while: 1 every time; nothing is left."""
    path, process = agent.service(case)
    orphans = case.start(*agent.exec_command(case, path, "sh", "-c", "while :; do (true &) ; done"))
    codes = []

    def some(_):
        for _ in range(100):
            codes.append(subprocess.run(agent.exec_command(case, path, "false"), check=False).returncode)

    agent.side_by_side(TOGETHER, some)
    assert codes == [1] * 1000, {c: codes.count(c) for c in codes}
    orphans.kill()
    agent.wait_for(lambda: not agent.children(process.pid), "children of the agent are left")


def test_orphans(case):
    """10,000 orphans: all are reaped, and the command that made them has its own code."""
    path, process = agent.service(case)
    script = "i=0; while [ $i -lt 10000 ]; do (: &); i=$((i+1)); done; exit 9"
    assert agent.shell(case, path, script, check=False, timeout=180).code == 9
    agent.wait_for(lambda: not agent.children(process.pid), "orphans are left")


def test_burst(case):
    """50 MB and a last line, and the command ends: all of it comes, in order; a grandchild that keeps its output open is not waited for."""
    path, _ = agent.service(case)
    command = agent.exec_command(case, path, "sh", "-c", "head -c 50000000 /dev/zero; echo the last line")
    with subprocess.Popen(command, stdout=subprocess.PIPE) as p:
        size, last = 0, b""
        while piece := p.stdout.read(1 << 20):
            size, last = size + len(piece), (last + piece)[-20:]
    assert p.returncode == 0 and size == 50_000_014 and last.endswith(b"\0the last line\n"), (p.returncode, size, last)
    done = agent.shell(case, path, "sleep 1000 & echo $!; exit 5", check=False)
    assert done.code == 5
    os.kill(int(done.out), signal.SIGKILL)


def test_nobody_reads(case):
    """A command whose output is not read waits; others go on. Who goes away takes his command along, and nobody else's."""
    path, _ = agent.service(case)
    stuck = case.start(*agent.exec_command(case, path, "sh", "-c", "echo $$ >&2; exec yes"), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    pid = int(stuck.stderr.readline())
    for _ in range(20):
        assert agent.run(case, path, "echo", "there").out == "there\n"
    assert processes.alive(pid)
    stuck.kill()
    assert processes.wait_gone(pid, 30), processes.describe(pid)
    assert agent.run(case, path, "echo", "there").out == "there\n"


def test_signals(case):
    """A signal of ours is the command's; its handler decides, or it ends it."""
    path, _ = agent.service(case)
    for script, number, code in (('trap "exit 33" TERM; echo up; while :; do sleep 0.05; done', signal.SIGTERM, 33),
                                 ("echo up; exec sleep 1000", signal.SIGINT, 130)):
        p = case.start(*agent.exec_command(case, path, "sh", "-c", script), stdout=subprocess.PIPE)
        assert p.stdout.readline() == b"up\n"
        p.send_signal(number)
        assert p.wait(timeout=30) == code


def test_main_once(case):
    """64 requests for the main command at the same time: one is it, 63 are told that there is one. A start that failed is none."""
    path, _ = agent.service(case)
    assert agent.run(case, path, "no-such-main", options=["--main"], check=False).code == 127
    done = agent.side_by_side(64, lambda i: agent.shell(case, path, "sleep 1; exit 7", options=["--main"], check=False))
    codes = [d.code for d in done]
    assert codes.count(7) == 1 and codes.count(125) == 63, codes
    assert all("container main already spawned" in d.err for d in done if d.code == 125)
    assert agent.run(case, path, "true", options=["--main"], check=False).code == 125


def test_halt(case):
    """The main command ends, and the guest is switched off: whoever waits for its code gets it, also when the host was too busy to take
    it before, and all that was said until then lay in between."""
    guest = boot(case, append="forkfs.halt")
    main = case.start(*agent.exec_command(case, guest, "sh", "-c", "until [ -e /tmp/go ]; do sleep 0.05; done; exit 7", options=["--main"]))
    for _ in range(12):  # more than fits between guest and host
        flood = case.start(*agent.exec_command(case, guest, "sh", "-c", "echo; until [ -e /tmp/flood ]; do sleep 0.05; done; exec yes"), stdout=subprocess.PIPE)
        assert flood.stdout.readline() == b"\n"
    agent.shell(case, guest, "setsid sh -c 'sleep 0.5; touch /tmp/flood; sleep 1; touch /tmp/go' >/dev/null 2>&1 </dev/null &")
    (link,) = [pid for pid in processes.marked(case.id) if processes.describe(pid).startswith(f"{pid} (forkfs-agent-link")]
    os.kill(link, signal.SIGSTOP)
    guest.console.wait("main ended: 7", timeout=60)
    os.kill(link, signal.SIGCONT)
    assert main.wait(timeout=60) == 7
    assert guest.process.wait(timeout=60) == 0


def test_agent_ends(case):
    """The agent, or its VM, is gone: a command that runs is told so, and the next one cannot begin."""
    path, process = agent.service(case)
    p = case.start(*agent.exec_command(case, path, "sh", "-c", "echo up; exec sleep 1000"), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert p.stdout.readline() == b"up\n"
    (child, _), = agent.children(process.pid)
    process.kill()
    process.wait()
    assert p.wait(timeout=30) == 125 and b"the VM has ended" in p.stderr.read()
    os.kill(child, signal.SIGKILL)
    assert processes.wait_gone(child, 30)
    done = agent.run(case, path, "true", check=False)
    assert done.code == 125 and "agent.sock" in done.err, done.err
    assert not os.path.exists(f"{path}.link")


def test_usage(case):
    """Wrong usage is 125 too: any other code could be the command's."""
    for words in ([], ["--socket", "/x"], ["--socket", "/x", "sbx1", "--", "true"], ["--socket", "/x", "-t", "--", "true"],
                  ["--socket", "/x", "--env", "A", "--", "true"], ["--socket", "/x", "--main", "-i", "--", "true"]):
        done = case.run(case.forkfs(), "exec", *words, check=False)
        assert done.code == 125 and "usage:" in done.err, (words, done)
