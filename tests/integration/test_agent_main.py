"""The main command of a guest: its log, its exit code, its end, and that there is one."""

import json
import os
import re
import signal
import subprocess
import time

from forkfs_test import agent, children, processes, rig

FILES = 3
FILE_BYTES = 10 << 20


def main(case, target, script, *options):
    """Start `forkfs exec --main`; the Popen."""
    return case.start(*agent.exec_command(case, target, "sh", "-c", script, options=["--main", *options]),
                      stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def gate(path):
    """The words of a shell that wait for a file."""
    return f"while [ ! -e {path} ]; do sleep 0.02; done"


def records(path):
    """The lines of a log, the oldest file first."""
    found = []
    for name in (*(f"{path}.{i}" for i in range(FILES - 1, 0, -1)), path):
        if os.path.exists(name):
            with open(name, encoding="utf-8") as lines:
                found += [json.loads(line) for line in lines]
    return found


def test_log(case):
    """Its output is in the log, by stream, with times that follow one another; what a process behind it says last is not lost."""
    path, _ = agent.service(case)
    log = case.dir / "main.log"
    before = time.time()
    # who may write after its end
    done = main(case, path, "echo out; echo err >&2; printf 'half'; (echo behind; echo more) & exit 7", "--log", log)
    out, err = done.communicate(timeout=60)
    assert (done.returncode, out, err) == (7, "", ""), (done.returncode, out, err)
    said = records(log)
    assert [(r["log"], r["stream"]) for r in said if r["stream"] == "stderr"] == [("err\n", "stderr")], said
    assert [r["log"] for r in said if r["stream"] == "stdout"] == ["out\n", "halfbehind\n", "more\n"], said
    for r in said:
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{9}Z", r["time"]), r
        at = time.strptime(r["time"][:19] + " UTC", "%Y-%m-%dT%H:%M:%S %Z")
        assert abs(before - (time.mktime(at) - time.timezone)) < 600, r
    assert [r["time"] for r in said] == sorted(r["time"] for r in said)


def test_burst(case):
    """50 MB and a last line: three files of at most 10 MiB, the last line in them, the lines before it without a gap."""
    path, _ = agent.service(case)
    log = case.dir / "main.log"
    done = main(case, path, "seq -f '%060.0f' 820000; echo the last line; exit 3", "--log", log)
    assert done.communicate(timeout=100) == ("", "") and done.returncode == 3
    sizes = [os.path.getsize(p) for p in (log, f"{log}.1", f"{log}.2")]
    assert all(s <= FILE_BYTES for s in sizes) and sum(sizes) > 2 * FILE_BYTES - (1 << 18), sizes
    assert sorted(p.name for p in case.dir.glob("main.log*")) == ["main.log", "main.log.1", "main.log.2"]
    said = [r["log"] for r in records(log)]
    assert said[-1] == "the last line\n"
    numbers = [int(s) for s in said[:-1]]
    assert numbers == list(range(numbers[0], 820001)), (numbers[0], numbers[-1])


def test_detached(case):
    """Nobody is there any more: the log is whole all the same. A second request is refused, and its log is left alone."""
    path, _ = agent.service(case)
    log, go = case.dir / "main.log", case.dir / "go"
    done = main(case, path, f"echo one; {gate(go)}; echo two >&2; seq 1000; exit 3", "--log", log, "--detach")
    assert done.communicate(timeout=60) == ("", "") and done.returncode == 0
    agent.wait_text(log, "one")
    second = main(case, path, "true", "--log", case.dir / "second.log")
    assert "container main already spawned" in second.communicate(timeout=60)[1] and second.returncode == 125
    same = main(case, path, "true", "--log", log)
    said = same.communicate(timeout=60)[1]
    assert "is the log of another main command" in said and same.returncode == 125, (same.returncode, said)
    assert agent.run(case, path, "echo", "there").out == "there\n"
    go.touch()
    agent.wait_for(lambda: len(records(log)) == 1002, "the log is not whole")
    said = records(log)
    assert [r["log"] for r in said if r["stream"] == "stdout"] == ["one\n", *(f"{i}\n" for i in range(1, 1001))]
    assert [r["log"] for r in said if r["stream"] == "stderr"] == ["two\n"]
    assert not records(case.dir / "second.log")


def test_disk_full(case):
    """The disk is full: the command goes on and ends as it would, what is missing is counted in the log and said."""
    path, _ = agent.service(case)
    disk, go = case.dir / "disk", [case.dir / f"go{i}" for i in range(2)]
    disk.mkdir()
    case.run("mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk)
    case.on_end(lambda: case.run("umount", "-l", disk, check=False))
    log, done = disk / "main.log", case.dir / "done"
    p = main(case, path, f"echo before; {gate(go[0])}; seq 10 200010; echo > {done}; {gate(go[1])}; echo after; exit 4", "--log", log)
    agent.wait_text(log, "before")
    with open(disk / "filler", "wb", buffering=0) as filler:
        try:
            while filler.write(bytes(4096)):
                pass
        except OSError:
            pass
    go[0].touch()
    agent.wait_for(done.exists, "a full disk has stopped the command")
    (disk / "filler").unlink()
    go[1].touch()
    _, err = p.communicate(timeout=60)
    said = [r["log"] for r in records(log)]
    assert p.returncode == 4 and said[0] == "before\n" and said[-1] == "after\n", (p.returncode, said[-3:])
    lines = size = 0
    following = 10
    for one in said[1:-1]:
        missing = re.fullmatch(r"forkfs: (\d+) lines \((\d+) bytes\) are missing here: No space left on device\n", one)
        if missing:
            lines, size, following = lines + int(missing[1]), size + int(missing[2]), following + int(missing[1])
        else:
            assert int(one) == following, (one, following)
            following += 1
    assert following == 200011 and lines, (following, lines)
    assert f"{lines} lines ({size} bytes) are missing" in err, err


def test_link_gone(case):
    """The host's link is killed: the command goes on, what it says is where the agent's own words are."""
    path, process = agent.service(case)
    log, go = case.dir / "main.log", case.dir / "go"
    p = main(case, path, f"echo one; {gate(go)}; seq 20000; echo the last line; exit 3", "--log", log)
    agent.wait_text(log, "one")
    os.kill(agent.link_of(path), signal.SIGKILL)
    assert p.wait(timeout=60) == 125
    # what is on its way to a host at its end is lost with it; this session begins when the agent has seen that end
    assert agent.run(case, path, "echo", "there").out == "there\n"
    go.touch()
    agent.wait_text(case.dir / "agent.log", "main ended: 3")
    agent.wait_text(case.dir / "agent.log", "the last line")
    # the agent's own line may stand in the middle of another
    said = (case.dir / "agent.log").read_text().replace("forkfs-agent: main ended: 3\n", "").splitlines()
    assert said[1:] == [*(str(i) for i in range(1, 20001)), "the last line"], (len(said), said[:3], said[-3:])
    assert agent.run(case, path, "echo", "there").out == "there\n"
    assert not agent.children(process.pid)


def test_exit_file(case):
    """The code is in its file before anybody hears of it: after a signal, and when the link is gone; one of the past counts for nothing."""
    for number, (script, code) in enumerate((("exit 7", 7), ("kill -9 $$", 137), ("kill -TERM $$", 143), ("exit 0", 0))):
        file = case.dir / f"code{number}"
        file.write_text("99\n")
        path, _ = agent.service(case, f"agent{number}", options=["--exit-file", file])
        assert main(case, path, script, "--exit-file", file).wait(timeout=60) == code
        assert file.read_text() == f"{code}\n" and not os.path.exists(f"{file}.new")
    file, go = case.dir / "code", case.dir / "go"
    file.write_text("99\n")
    path, _ = agent.service(case, options=["--exit-file", file])
    assert agent.run(case, path, "true").code == 0
    assert agent.run(case, path, "no-such-main", options=["--main", "--exit-file", file], check=False).code == 127
    p = main(case, path, f"echo up; {gate(go)}; exit 7", "--log", case.dir / "main.log", "--exit-file", file)
    agent.wait_text(case.dir / "main.log", "up")
    assert not file.exists()
    link = agent.link_of(path)
    os.kill(link, signal.SIGSTOP)
    go.touch()
    agent.wait_for(file.exists, "no exit file")
    os.kill(link, signal.SIGKILL)
    assert p.wait(timeout=60) == 7, p.stderr.read()
    # without the file nothing is known: never a code of the past
    path, _ = agent.service(case, "other")
    p = main(case, path, f"echo up; {gate(case.dir / 'end')}", "--log", case.dir / "other-main.log", "--exit-file", file)
    agent.wait_text(case.dir / "other-main.log", "up")
    os.kill(agent.link_of(path), signal.SIGKILL)
    assert p.wait(timeout=60) == 125
    (case.dir / "end").touch()
    agent.wait_text(case.dir / "other.log", "main ended: 0")


def test_slow_handler(case):
    """A command that ignores signals and sleeps delays neither the end of the main command nor what is said of it."""
    path, _ = agent.service(case)
    handler = case.start(*agent.exec_command(case, path, "sh", "-c", "trap '' TERM HUP; echo $$; exec sleep 1000"), stdout=subprocess.PIPE)
    pid = int(handler.stdout.readline())
    assert main(case, path, "exit 5", "--log", case.dir / "main.log").wait(timeout=60) == 5
    assert handler.poll() is None and processes.alive(pid)
    os.kill(pid, signal.SIGKILL)
    assert handler.wait(timeout=60) == 137


def test_listener(case):
    """Who connects before the agent serves is served when it does; no command has a listener or a connection of the agent's."""
    path, process = agent.service(case)
    os.kill(process.pid, signal.SIGSTOP)
    early = case.start(*agent.exec_command(case, path, "sh", "-c", "ls -l /proc/$$/fd"), stdout=subprocess.PIPE, text=True)
    agent.wait_for(lambda: link_waits(path), "the connection is not there")
    os.kill(process.pid, signal.SIGCONT)
    seen = early.communicate(timeout=60)[0]
    assert early.returncode == 0
    log = case.dir / "main.log"
    assert main(case, path, "ls -l /proc/$$/fd", "--log", log).wait(timeout=60) == 0
    for text in (seen, "".join(r["log"] for r in records(log))):
        fds = dict(re.findall(r" (\d+) -> (\S+)", text))
        assert set(fds) == {"0", "1", "2"}, fds
        assert all(v.startswith(("/dev/null", "pipe:")) for v in fds.values()), fds


def link_waits(path):
    """True when the agent's listener, which takes nobody, has a connection in its queue."""
    with open("/proc/net/unix", encoding="utf-8") as f:
        states = [line.split()[5] for line in f if line.rstrip().endswith(f" {path}")]
    return "02" in states


def test_restored(case):
    """The main command is started once in a guest's life: not in children, not in a child's child; theirs go on, on their consoles."""
    r = rig.Rig(case, guest=case.guest(agent=True, mib=128, run=[]).booted())
    log = case.dir / "main.log"
    started = main(case, r.guest, "echo run >> /tmp/runs; i=0; while :; do sleep 0.1; i=$((i+1)); echo tick $i; done", "--log", log, "--detach")
    assert started.wait(timeout=60) == 0, started.stderr.read()
    agent.wait_text(log, "tick 2")
    assert rig.wait_settled(r.branch("b1")) == "ready"
    (child,), _ = children.run(r.mount, "sbx1/b1", "--attach", "c")
    child.wait_console(r"^tick \d+")
    (r.mount.path / "c/branches/b2").mkdir()
    assert rig.wait_settled(r.mount.path / "c/branches/b2") == "ready"
    (grandchild,), _ = children.run(r.mount, "c/b2", "--attach", "d")
    grandchild.wait_console(r"^tick \d+")
    for name in ("sbx1", "c", "d"):
        assert r.mount.run("exec", name, "--", "cat", "/tmp/runs").out == "run\n", name
        done = r.mount.run("exec", name, "--main", "--", "true", check=False)
        assert done.code == 125 and "container main already spawned" in done.err, done.err
    mark = len(records(log))
    agent.wait_for(lambda: len(records(log)) > mark, "the source's main command has stopped")
    numbers = [int(x["log"].split()[1]) for x in records(log)]
    assert numbers == list(range(1, len(numbers) + 1))


def test_halt(case):
    """The VM ends with its main command: its code is on the disk then, the log is whole though nobody is there, and no command that sleeps is waited for."""
    disk, log = case.dir / "disk.img", case.dir / "main.log"
    with open(disk, "wb") as f:
        f.truncate(64 << 20)
    case.run("mkfs.ext4", "-q", "-F", disk)
    mount = "mkdir -p /mnt && busybox mount -t ext4 /dev/vda /mnt"
    how = {"agent": True, "mib": 128, "run": [], "disk": "plain", "image": disk, "append": "forkfs.halt forkfs.exit_file=/mnt/exit_code"}
    guest = case.guest(**how).booted()
    handler = case.start(*agent.exec_command(case, guest, "sh", "-c", "trap '' TERM HUP; echo up; exec sleep 1000"), stdout=subprocess.PIPE)
    assert handler.stdout.readline() == b"up\n"
    started = main(case, guest, f"{mount} || exit 9; seq 5000; echo the last line; exit 7", "--log", log, "--detach")
    assert started.wait(timeout=60) == 0, started.stderr.read()
    assert guest.process.wait(timeout=90) == 0
    guest.console.wait("main ended: 7")
    agent.wait_for(lambda: records(log) and records(log)[-1]["log"] == "the last line\n", "the last line is not in the log")
    assert [r["log"] for r in records(log)[:-1]] == [f"{i}\n" for i in range(1, 5001)]
    assert handler.wait(timeout=60) == 125
    again = case.guest("again", **how).booted()
    assert agent.shell(case, again, f"{mount} && cat /mnt/exit_code").out == "7\n"
