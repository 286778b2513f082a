"""The warm pool: hits and misses, never more than its permits, payloads of their own, and nothing left however it ends."""

import json
import os
import signal
import socket
import threading

from forkfs_test import agent, pool, processes, rig
from forkfs_test.api import ApiRig
from forkfs_test.microvm import MicroVm

MIB = 16


def guest(case, **options):
    """A microVM, attached, and its branch b1, which is ready."""
    r = ApiRig(case, MicroVm(case, "sbx1", mib=MIB, kind="memfd", vcpus=1, **options))
    assert rig.wait_settled(r.branch("b1")) == "ready"
    return r


def test_hit_miss(case):
    """An idle child is a hit, a further one a miss; both go on where the branch was taken; released, died, and drained: nothing is left."""
    r = guest(case)
    p = pool.micro(r.mount, "sbx1/b1", low=1, high=3)
    assert p.path.stat().st_mode & 0o777 == 0o600
    first = p.acquire()
    assert first.said["from"] == "pool" and first.said["state"] == "running", first.said
    p.wait(lambda s: s["idle"] == 1)
    second = p.acquire("--timeout", "0")
    p.wait(lambda s: s["idle"] == 1)
    third = p.acquire()
    assert p.status()["out"] == 3
    assert "no child came free in time" in p.refused("--timeout", "0")
    for child in (first, second, third):
        child.visit_all(MIB, 1)
        child.drop()
    p.release(second)
    p.wait(lambda s: s["idle"] == 1)
    # one that ends by itself gives its place back, and leaves its directory to who had it
    os.kill(third.pid, signal.SIGKILL)
    status = p.wait(lambda s: s["out"] == 1 and s["idle"] == 1)
    assert status["ended"] == [third.said["id"]] and third.dir.exists(), status
    p.release(third)
    assert p.ask("release", str(third.said["id"]), check=False).code == 1
    assert (status["hits"], status["misses"], status["died"]) == (3, 0, 1), status
    left = p.drain()
    assert [c["pid"] for c in left["left"]] == [first.pid], left
    p.check_gone([first.pid], [first.dir])
    first.visit_all(MIB, 1)
    r.guest.check_runs()


def test_miss(case):
    """With nothing kept ready everybody gets a child that is restored for them."""
    r = guest(case)
    p = pool.micro(r.mount, "sbx1/b1", low=0, high=2)
    children = [p.acquire(), p.acquire()]
    assert [c.said["from"] for c in children] == ["restored"] * 2
    assert "no child came free in time" in p.refused("--timeout", "1")
    left = p.drain("--end-all")
    assert not left["left"] and not any(c.alive() for c in children), left
    p.check_gone()


def test_permits(case):
    """32 ask at the same time, 4 may be out: everybody gets one in turn, and there are never more than 4 processes."""
    r = guest(case)
    p = pool.micro(r.mount, "sbx1/b1", low=2, high=4)
    most, over, got = [], threading.Event(), []

    def watch():
        while not over.is_set():
            most.append(len(p.vms()))

    def one(_):
        child = json.loads(p.ask("acquire", timeout=120).out)
        got.append(child["pid"])
        assert processes.alive(child["pid"])
        p.ask("release", str(child["id"]))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        agent.side_by_side(32, one)
    finally:
        over.set()
        watcher.join()
    status = p.status()
    assert max(most) <= 4 and status["most_at_once"] <= 4, (max(most), status)
    assert len(set(got)) == 32 and status["hits"] + status["misses"] == 32 and status["released"] == 32, status
    p.drain()
    p.check_gone()


def test_ended_children_are_heard_of(case):
    """A child that ends by itself frees its place, also where whoever started the pool has SIGCHLD ignored."""
    r = guest(case)
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        p = pool.micro(r.mount, "sbx1/b1", low=0, high=1, wait=False)
    finally:
        signal.signal(signal.SIGCHLD, before)
    child = p.acquire()
    os.kill(child.pid, signal.SIGKILL)
    assert p.wait(lambda s: s["out"] == 0)["ended"] == [child.said["id"]]
    p.release(p.acquire())
    p.drain()


def test_waits_in_line(case):
    """Who came first is served first; who went away takes nothing; who waited too long is told so."""
    r = guest(case)
    p = pool.micro(r.mount, "sbx1/b1", low=0, high=1)
    child = p.acquire()
    line = []
    for i in range(3):
        line.append(p.asking("--timeout", "60"))
        p.wait(lambda s, i=i: s["waiting"] == i + 1)
    line[0].kill()
    p.wait(lambda s: s["waiting"] == 2)
    p.release(child)
    said = json.loads(line[1].stdout.readline())
    assert line[1].wait(timeout=30) == 0 and line[2].poll() is None, said
    assert "no child came free" in p.refused("--timeout", "1")
    p.ask("release", str(said["id"]))
    assert json.loads(line[2].stdout.readline())["id"] > said["id"]
    p.drain("--end-all")
    p.check_gone()


def test_ttl(case):
    """An idle child is replaced when it is old: by one that is ready before."""
    r = guest(case)
    p = pool.micro(r.mount, "sbx1/b1", "--ttl", "1", low=1, high=3)
    before = p.vms()
    seen = []

    def replaced(status):
        seen.append(status["idle"])
        return status["expired"] >= 2

    p.wait(replaced)
    assert min(seen) >= 1 and not set(before) & set(p.vms()), seen
    p.drain()
    p.check_gone()


def test_payloads(case):
    """Every acquisition has its own payload and epoch, whoever else asks at the same time; what cannot be is refused, and the child is not lost."""
    r = guest(case, mailbox="config,s3cret")
    p = pool.micro(r.mount, "sbx1/b1", low=2, high=6)
    epochs = []

    def one(i):
        child = p.acquire("--mailbox", f'config={{"task":{i},"n":9007199254740993}}')
        epoch = child.said["epoch"].replace("-", "")
        assert child.mail() == (epoch, f'{{"task":{i},"n":9007199254740993}}'), child.mails()
        epochs.append(epoch)
        assert len(child.mails()) == 1
        p.release(child)

    agent.side_by_side(12, one)
    assert len(set(epochs)) == 12
    assert "nobody" in p.refused("--mailbox", 'nobody={"a":1}')
    plain = p.acquire()
    plain.visit_all(MIB, 1)
    assert plain.mails() == [] and plain.said["epoch"] is None
    assert not list((r.sandbox / "branches/b1/forks").iterdir())
    p.drain("--end-all")
    p.check_gone()


def test_killed(case):
    """The pool is killed: what is idle or being started is ended and removed with its socket; what was handed out lives on."""
    r = guest(case)
    for low in (3, 0):
        p = pool.micro(r.mount, "sbx1/b1", low=low, high=6, name=f"pool{low}", wait=bool(low))
        child = p.acquire()
        asking = [p.asking() for _ in range(3)]  # in the middle of something
        p.process.kill()
        p.process.wait()
        for a in asking:
            a.wait(timeout=30)
        taken = [json.loads(out) for a in asking if a.returncode == 0 and (out := a.stdout.read())]
        p.check_gone([child.pid] + [t["pid"] for t in taken], [child.dir] + [t["dir"] for t in taken])
        child.visit_all(MIB, 1)
        child.stop()
        for t in taken:
            os.kill(t["pid"], signal.SIGKILL)
    r.guest.check_runs()


def test_socket(case):
    """A second pool at the same socket is refused; one that was left by a killed pool and its guard is taken over; other files are not."""
    r = guest(case)
    p = pool.micro(r.mount, "sbx1/b1", low=0, high=1)
    done = case.run(*p.command, check=False)
    assert done.code == 1 and f"process {p.pid} listens there already" in done.err, done.err
    p.drain()
    stale = socket.socket(socket.AF_UNIX)
    stale.bind(str(p.path))
    stale.close()
    p = pool.micro(r.mount, "sbx1/b1", low=0, high=1)
    p.drain()
    p.path.write_text("mine\n")
    done = case.run(*p.command, check=False)
    assert done.code == 1 and "no socket" in done.err and p.path.read_text() == "mine\n", done.err


def test_together(case):
    """Two pools and their first askers begin at the same time, of the same branch: all get children of their own."""
    r = guest(case)
    pools = agent.side_by_side(2, lambda i: pool.micro(r.mount, "sbx1/b1", low=1, high=4, name=f"pool{i}", wait=False))
    children = agent.side_by_side(6, lambda i: pools[i % 2].acquire())
    assert len({c.pid for c in children}) == 6
    for child in children:
        child.visit_all(MIB, 1)
    for p in pools:
        p.drain("--end-all")
        p.check_gone()


def test_failing(case):
    """Three restores in a row fail: the pool says so, and why, to all who ask, tries ever less often, and is back when one succeeds."""
    rules = case.dir / "pool-faults"
    rules.write_text("")
    r = guest(case)
    os.environ["FORKFS_FAULT_FILE"] = str(rules)
    try:
        p = pool.micro(r.mount, "sbx1/b1", low=1, high=3)
    finally:
        del os.environ["FORKFS_FAULT_FILE"]
    rules.write_text("pool-start error:EIO\n")
    assert p.acquire().said["from"] == "pool"
    status = p.wait(lambda s: s["state"] == "failing")
    assert "pool-start" in status["last_error"] and status["failed_in_a_row"] >= 3, status
    p.wait(lambda s: s["retry_in_ns"] > 0)
    assert "restores failed" in p.refused() and "pool-start" in p.said()
    p.wait(lambda s: s["failed_in_a_row"] >= 5)
    assert p.status()["failures"] <= 8, p.status()
    rules.write_text("")
    p.wait(lambda s: s["state"] == "serving" and s["idle"] == 1)
    p.acquire().visit_all(MIB, 1)
    p.drain("--end-all")
    p.check_gone()


def test_branch_replaced(case):
    """A branch that is removed is not handed out any more; one that is made in its place is."""
    r = guest(case)
    p = pool.micro(r.mount, "sbx1/b1", low=1, high=3)
    old = p.vms()
    (r.sandbox / "branches/b1").rmdir()
    assert "restores failed" in p.refused()
    p.wait(lambda s: not s["children"] and not set(old) & set(p.vms()))
    assert rig.wait_settled(r.branch("b1")) == "ready"
    status = p.wait(lambda s: s["idle"] == 1)
    assert status["state"] == "serving", status
    (r.sandbox / "branches/b1").rmdir()
    assert rig.wait_settled(r.branch("b1")) == "ready"
    child = p.acquire()
    assert child.said["from"] == "restored"
    child.visit_all(MIB, 1)
    p.drain("--end-all")
    p.check_gone()


def test_daemon_ends(case):
    """The daemon is killed: what is idle is handed out all the same, without payloads; nothing new can be started, and the pool says so."""
    r = guest(case)
    p = pool.micro(r.mount, "sbx1/b1", low=1, high=3)
    r.mount.kill()
    r.mount.clear_dead()
    child = p.acquire()
    assert child.said["from"] == "pool", child.said
    child.visit_all(MIB, 1)
    assert p.wait(lambda s: s["state"] == "failing")["out"] == 1
    assert "restores failed" in p.refused()
    p.drain()
    p.check_gone([child.pid], [child.dir])
    r.guest.check_runs()


def test_hostile(case):
    """Garbage, too much of it, half requests, silence and idle ends disturb nobody; an idle child or the guard that is killed is replaced."""
    r = guest(case)
    p = pool.micro(r.mount, "sbx1/b1", low=1, high=2)
    silent = []
    for text in (b"", b"{", b'{"acquire":{"timeout_ms":1000'):
        silent.append(socket.socket(socket.AF_UNIX))
        silent[-1].connect(str(p.path))
        silent[-1].sendall(text)
    for text in (b"\n", b"hello\n", b"[]\n", b"{}\n", b'{"acquire":{}}\n', b'{"acquire":{"timeout_ms":-1}}\n', b'{"release":{"id":99}}\n',
                 b'{"release":{"id":"1"}}\n', b'{"acquire":{"timeout_ms":1,"main":[]}}\n', b'{"acquire":{"timeout_ms":1,"mailboxes":[1]}}\n',
                 b'{"status":{}} {"drain":{}}\n', b'{"a":' * 100 + b"\n", b"x" * (1 << 19), os.urandom(4096).replace(b"\n", b"") + b"\n"):
        s = socket.socket(socket.AF_UNIX)
        s.settimeout(30)
        s.connect(str(p.path))
        try:
            s.sendall(text)
        except (BrokenPipeError, ConnectionResetError):
            pass
        try:
            said = s.makefile("rb").readline()
        except ConnectionResetError:
            said = b""
        assert not said or "error" in json.loads(said), (text[:40], said)
        s.close()
    (idle,) = p.vms()
    os.kill(idle, signal.SIGKILL)
    p.wait(lambda s: s["idle"] == 1 and s["died"] == 1)
    (guard,) = [pid for pid in processes.marked(case.id) if _command(pid) == "forkfs-pool-guard"]
    os.kill(guard, signal.SIGKILL)
    p.wait(lambda s: [pid for pid in processes.marked(case.id) if _command(pid) == "forkfs-pool-guard"] not in ([], [guard]))
    child = p.acquire()
    child.visit_all(MIB, 1)
    p.wait(lambda s: s["idle"] == 1)
    p.process.kill()
    p.process.wait()
    p.check_gone([child.pid], [child.dir])
    for s in silent:
        s.close()


def _command(pid):
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as f:
            return f.read().split(b"\0")[0].decode()
    except OSError:
        return ""
