"""`forkfs pager`: VMMs whose memory is served page by page, and that never read a zero that the branch has not."""

import json
import os
import pathlib
import resource
import signal
import socket
import subprocess
import sys

from forkfs_test import processes, rig
from forkfs_test.pager import TIMEOUT as PATIENCE
from forkfs_test.pager import Lines, Pager, UffdVmm, image

MIB = 1 << 20


def test_serves(case):
    """Three VMMs of one image, with threads that fault on the same pages; let go with all their pages in the end."""
    memory = image(case.dir / "memory", 48, zeros=(3, 4, 17))
    pager = Pager(case, memory)
    vmms = [UffdVmm(case, pager, memory), UffdVmm(case, pager, memory, "regions=3"), UffdVmm(case, pager, memory, "close")]
    vmms[0].check("race 8")
    vmms[1].check("read 5242880 4096")
    vmms[2].check("read 0 4096")
    assert 0 < int(vmms[1].ask("resident")) < 4 * MIB
    # the first of them goes
    vmms[0].process.kill()
    assert pager.event("exited")["pid"] == vmms[0].pid
    pager.stop()
    for vmm in vmms[1:]:
        assert vmm.process.poll() is None
        flags = pathlib.Path(f"/proc/{vmm.pid}/smaps").read_text()
        assert " um" not in flags, "it is registered still"
        vmm.check()
    assert not pager.socket.exists()


def test_slow_one(case):
    """One whose page does not come, and one that is stopped, hold up nobody else; they get theirs in the end."""
    memory, hold = image(case.dir / "memory", 24), case.dir / "hold"
    pager = Pager(case, memory)
    pager.faults(f"pager-read@1 hold:{hold}")
    slow = UffdVmm(case, pager, memory)
    slow.say("read 0 4096")
    while not pathlib.Path(f"{hold}.held").exists():
        assert pager.process.poll() is None
    stopped = UffdVmm(case, pager, memory)
    stopped.check("read 0 4096")
    stopped.say("race 2")
    os.kill(stopped.pid, signal.SIGSTOP)
    others = [UffdVmm(case, pager, memory, "close") for _ in range(3)]
    for vmm in others:
        vmm.check()
    assert slow.lines.queue.empty(), "its page came all the same"
    hold.touch()
    os.kill(stopped.pid, signal.SIGCONT)
    for vmm in (slow, stopped):
        assert vmm.lines.next() == "same"
        vmm.check()
    pager.stop()


def test_many(case):
    """256 VMMs of one image at once: each has its own socket's connection, and every page right."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    memory = image(case.dir / "memory", 1)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, hard))  # as a shell has it
    pager = Pager(case, memory)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, hard), hard))
    vmms = [UffdVmm(case, pager, memory, "close") for _ in range(256)]
    for vmm in vmms:
        vmm.check("read 65536 4096")
    served = [pager.event("serves")["pid"] for _ in vmms]
    assert set(served) == {vmm.pid for vmm in vmms}
    for vmm in vmms:
        vmm.check("read 0 1048576")
    # one that ends ends alone; who needs the pager still is served
    vmms[7].process.kill()
    assert pager.event("exited")["pid"] == vmms[7].pid
    UffdVmm(case, pager, memory).check("read 0 1048576")
    pager.stop()
    for vmm in vmms[:7] + vmms[8:]:
        assert vmm.process.poll() is None
        vmm.process.kill()


def test_all(case):
    """--all: a VMM has its pages without having asked, and the pager ends when all have."""
    memory = image(case.dir / "memory", 24)
    pager = Pager(case, memory, "--all", "-n", 2)
    first, second = UffdVmm(case, pager, memory, "close"), UffdVmm(case, pager, memory)
    for _ in range(2):
        assert pager.event("released")["served_bytes"] == 24 * MIB
    assert pager.process.wait(PATIENCE) == 0, pager.log()
    for vmm in (first, second):
        vmm.check()


def test_last(case):
    """Told that no more VMMs will come, or that its parent has ended, it ends with the last one there is."""
    memory = image(case.dir / "memory", 4)
    pager = Pager(case, memory)
    vmm = UffdVmm(case, pager, memory)
    vmm.check("read 0 4096")
    pager.process.send_signal(signal.SIGUSR2)
    vmm.check()
    vmm.process.kill()
    assert pager.process.wait(PATIENCE) == 0, pager.log()
    # its parent is a shell that ends
    socket_path, pid_file = case.dir / "orphan.sock", case.dir / "pid"
    shell = case.start("bash", "-c", f"{case.forkfs()} pager --with-parent {memory} {socket_path} & echo $! >{pid_file}; read x",
                       stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
    while not socket_path.exists() or not pid_file.read_text():
        assert shell.poll() is None
    pid = int(pid_file.read_text())
    shell.stdin.close()
    shell.wait(PATIENCE)
    assert processes.wait_gone(pid, PATIENCE)


def test_huge(case):
    """Pages of 2 MiB."""
    pool = pathlib.Path("/proc/sys/vm/nr_hugepages")
    before = pool.read_text()
    case.on_end(lambda: pool.write_text(before))
    pool.write_text(str(int(before) + 16))
    assert int(pool.read_text()) == int(before) + 16, "no huge pages to be had"
    memory = image(case.dir / "memory", 16, zeros=(2, 3))
    pager = Pager(case, memory)
    vmm = UffdVmm(case, pager, memory, "huge")
    vmm.check("read 6291456 4096")
    assert vmm.ask(f"discard {2 * MIB} {2 * MIB}") == "done"
    vmm.check()
    pager.stop()
    vmm.check()


def test_discard(case):
    """What the VMM gives back (a balloon) reads as zeros from then on, whether it was there or not, also after the pager's end."""
    memory = image(case.dir / "memory", 16)
    pager = Pager(case, memory)
    vmm = UffdVmm(case, pager, memory)
    vmm.check(f"read {2 * MIB} {MIB}")
    for off in (2 * MIB, 2 * MIB + 512 * 1024, 5 * MIB, 6 * MIB + 4096):
        assert vmm.ask(f"discard {off} {256 * 1024}") == "done"
    vmm.check("race 4")
    for i in range(8, 14):
        assert vmm.ask(f"discard {i * MIB} {MIB // 2}") == "done"
    pager.stop()
    vmm.check("race 4")
    # a VMM that does not ask for events: what it discards after it was there is zeros too
    again = Pager(case, memory, name="again")
    deaf = UffdVmm(case, again, memory, "features=0")
    deaf.check()
    assert deaf.ask(f"discard {MIB} {MIB}") == "done"
    deaf.check()


def test_discard_while_filling(case):
    """Discarding and filling at once: the kernel refuses to fill then, until the event was read."""
    memory = image(case.dir / "memory", 32)
    pager = Pager(case, memory, "--all")
    pager.faults("pager-read delay:1")
    vmm = UffdVmm(case, pager, memory, "close")
    for i in range(64):
        assert vmm.ask(f"discard {i * MIB // 2} {MIB // 4}") == "done"
    vmm.check("race 2")
    pager.event("released")
    vmm.check("race 2")


def check_death(case, *options):
    """kill -9 of the pager while VMMs wait for pages: they end, and none has read a wrong byte."""
    memory = image(case.dir / "memory", 64)
    pager = Pager(case, memory)
    pager.faults("pager-read delay:2")
    vmms = [UffdVmm(case, pager, memory, *options) for _ in range(3)]
    for vmm in vmms:
        vmm.check("read 0 65536")
        vmm.say("race 3")
    idle = UffdVmm(case, pager, memory, *options)
    pager.event("serves")
    pager.process.kill()
    for vmm in vmms + [idle]:
        vmm.check_killed()


def test_killed(case):
    """VMMs that keep their own copy of the userfaultfd: they would hang otherwise."""
    check_death(case)


def test_killed_closed(case):
    """VMMs that do not: the kernel would give them zeros otherwise."""
    check_death(case, "close")


def test_killed_at_accept(case):
    """The pager dies before it has looked at who has connected: the userfaultfd is in a message that nobody has received."""
    memory = image(case.dir / "memory", 4)
    pager = Pager(case, memory)
    hold = case.dir / "hold"
    pager.faults(f"pager-accept hold:{hold}")
    first = UffdVmm(case, pager, memory, "close")
    while not pathlib.Path(f"{hold}.held").exists():
        assert pager.process.poll() is None
    second = UffdVmm(case, pager, memory, "close")
    for vmm in (first, second):
        vmm.say("race 2")
    pager.process.kill()
    for vmm in (first, second):
        vmm.check_killed()


def test_guard_killed(case):
    """Without its guard a pager gives its VMs all their pages, serves no others, and says so."""
    memory = image(case.dir / "memory", 24)
    pager = Pager(case, memory)
    vmm = UffdVmm(case, pager, memory, "close")
    vmm.check("read 0 4096")
    os.kill(pager.guard(), signal.SIGKILL)
    assert pager.process.wait(PATIENCE) == 1
    assert "guards the VMs has ended" in pager.log(), pager.log()
    vmm.check()


def test_unreadable(case):
    """A page that cannot be read ends the VM that waits for it, and says why; the others go on."""
    memory = image(case.dir / "memory", 24)
    pager = Pager(case, memory)
    other = UffdVmm(case, pager, memory, "close")
    other.check()
    vmm = UffdVmm(case, pager, memory, "close")
    vmm.check("read 0 4096")
    pager.faults("pager-read error:EIO")
    vmm.say("race 2")
    vmm.check_killed()
    said = pager.event("killed")
    assert said["pid"] == vmm.pid and "cannot be read" in said["why"], said
    pager.faults()
    other.check()
    UffdVmm(case, pager, memory).check()
    # an image that is cut off behind our back
    short = UffdVmm(case, pager, memory, "close")
    short.check("read 0 4096")
    copy = case.dir / "copy"
    copy.write_bytes(memory.read_bytes())
    truncated = Pager(case, copy, name="truncated")
    vmm = UffdVmm(case, truncated, memory, "close")
    vmm.check("read 0 4096")
    os.truncate(copy, 8 * MIB)
    vmm.say(f"read {12 * MIB} 4096")
    vmm.check_killed()


def test_branch(case):
    """A branch of a real VM that is being captured: read as far as the child needs it, and complete afterwards without the daemon."""
    r = rig.Rig(case, mib=96, run=["load,mib=24"])
    branch = r.branch_with_truth("b1", "guest-read delay:3")
    r.mount.faults("guest-read delay:3")
    pager = Pager(case, "sbx1/b1", mount=r.mount)
    vmm = UffdVmm(case, pager, r.truth)
    vmm.check(f"read {64 * MIB} {MIB}")
    r.mount.faults()
    assert rig.wait_settled(branch) == "ready"
    assert (branch / "wait").read_text()
    vmm.check(f"read {32 * MIB} {MIB}")
    second = UffdVmm(case, pager, r.truth, "close")
    pager.event("serves")
    second.check("read 0 65536")
    r.guest.stop()
    r.mount.kill()
    r.mount.clear_dead()
    second.check()
    vmm.check()
    pager.stop()


def test_branch_lost(case):
    """The daemon dies while the branch is being captured: its children end, none reads zeros."""
    r = rig.Rig(case, mib=96, run=["load,mib=24"])
    r.branch_with_truth("b1", "guest-read delay:20")
    r.mount.faults("guest-read delay:20")
    pager = Pager(case, "sbx1/b1", mount=r.mount)
    vmms = [UffdVmm(case, pager, r.truth, "close") for _ in range(2)]
    for i, vmm in enumerate(vmms):
        vmm.check(f"read {i * 65536} 4096")
    r.mount.kill()
    for vmm in vmms:
        vmm.say("race 2")
    for vmm in vmms:
        vmm.check_killed()
    r.mount.clear_dead()
    pager.stop()


def region(address="%A", size="%S", offset="0", page_size="4096"):
    """One region of a message."""
    return f'{{"base_host_virt_addr":{address},"size":{size},"offset":{offset},"page_size":{page_size}}}'


FORK, REMAP = 1 << 1, 1 << 2
# orders for the stand-in; what the pager says of it; whether the VMM is ended (it had handed over a userfaultfd)
HOSTILE = [
    ({"cut": 0}, "hung up", False),
    ({"fds": "none"}, "0 descriptors", False),
    ({"fds": "null"}, "no userfaultfd", False),
    ({"fds": "two"}, "2 descriptors", True),
    ({"fds": "many"}, "more than 8 descriptors", True),
    ({"cut": 40}, "cut off", True),
    ({"text": "[" + " " * 70000 + "]"}, "larger", True),
    ({"text": "hello"}, "no JSON array", True),
    ({"text": "[7]"}, "whole numbers", True),
    ({"text": f"[{region(size='0')}]"}, "no range", True),
    ({"text": f"[{region(offset='4096')}]"}, "leave or share", True),
    ({"text": f"[{region(address='65536')}]"}, "not mapped", True),
    ({"text": f"[{region(page_size='2097152')}]"}, "", True),
    ({"text": f"[{region(size='1099511627776')}]"}, "", True),
    ({}, "not registered", True),
    ({"features": 0}, "not registered", True),
    ({"features": REMAP, "register": 1}, "moved mappings", True),
    ({"features": FORK, "register": 1}, "forks", True),
]


def test_hostile(case):
    """What connects may say anything: it is refused in words, ended where its memory would be wrong, and the pager goes on."""
    memory = image(case.dir / "memory", 4)
    pager = Pager(case, memory)
    good = UffdVmm(case, pager, memory)
    good.check("read 0 4096")
    wrong = []
    for orders, expected, killed in HOSTILE:
        process = case.start(sys.executable, "-m", "forkfs_test.standin", pager.socket, json.dumps({"pager": 1, **orders}),
                             stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        lines = Lines(process.stdout)
        said = pager.event("killed" if killed else "refused")
        if expected not in said["why"] or said["pid"] != process.pid:
            wrong.append(f"{json.dumps(orders)[:80]}: {said}")
        if killed and process.wait(PATIENCE) != -signal.SIGKILL:
            wrong.append(f"{json.dumps(orders)[:80]}: it lives on")
        if not killed and (lines.next() != "sent" or process.poll() is not None):
            wrong.append(f"{json.dumps(orders)[:80]}: it was ended")
    assert not wrong, "\n".join(wrong)
    # its image is smaller than the memory that the VMM names
    small = Pager(case, image(case.dir / "small", 2), name="small")
    vmm = UffdVmm(case, small, memory)
    vmm.check_killed()
    assert "not its memory" in small.event("killed")["why"]
    good.check()
    left = list(processes.open_files(pager.process.pid).values())
    assert sum("userfaultfd" in link for link in left) == 1, left


def connect_as(case, path, uid):
    """A process of another user that connects and sends nothing of use; its pid."""
    pid = os.fork()
    if pid == 0:
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(str(path))
        sock.sendall(b"x")
        signal.pause()
    case.on_end(lambda: (os.kill(pid, signal.SIGKILL), os.waitpid(pid, 0)))
    return pid


def test_who(case):
    """Only the user that is expected."""
    os.chmod(case.dir, 0o711)
    pager = Pager(case, image(case.dir / "memory", 4), "--owner", "12345:12345")
    mode = os.stat(pager.socket)
    assert (mode.st_uid, mode.st_mode & 0o777) == (12345, 0o600)
    expected = connect_as(case, pager.socket, 12345)
    said = pager.event("refused")
    assert said["pid"] == expected and "0 descriptors" in said["why"], said
    os.chmod(pager.socket, 0o666)
    stranger = connect_as(case, pager.socket, 12346)
    said = pager.event("refused")
    assert said["pid"] == stranger and "12346" in said["why"], said


def test_usage(case):
    """What cannot work is said before anything listens."""
    memory = image(case.dir / "memory", 2)
    for words, code, part in (([], 2, "takes a branch"), ([memory], 2, "SOCKET"), ([memory, case.dir / "s", "-n", "0"], 2, "--children"),
                              ([case.dir / "none", case.dir / "s"], 1, "there is no file"), ([case.dir, case.dir / "s"], 1, "no file"),
                              ([memory, case.dir / ("s" * 200)], 1, "longer than"), ([memory, memory], 1, "listen at"),
                              ([memory, case.dir / "s", "--limit", "x"], 2, "--limit")):
        done = case.run(case.forkfs(), "pager", *words, check=False)
        assert done.code == code and part in done.err, f"{words}: {done.code} {done.err}"


def test_working_set(case):
    """What one child touched until it was ready is there for the next before it asks; a damaged file is ignored."""
    memory = image(case.dir / "memory", 32)
    file = case.dir / "working-set"
    first = Pager(case, memory, "--working-set", file, name="first")
    vmm = UffdVmm(case, first, memory)
    for off in (MIB, 9 * MIB, 31 * MIB):
        vmm.check(f"read {off} {MIB // 2}")
    first.process.send_signal(signal.SIGUSR1)
    while not file.exists():
        assert first.process.poll() is None, first.log()
    vmm.check()  # after it was ready: not recorded
    first.stop()
    second = Pager(case, memory, "--working-set", file, name="second")
    vmm = UffdVmm(case, second, memory)
    second.event("serves")
    while int(vmm.ask("resident")) < 3 * MIB // 2:
        pass
    assert int(vmm.ask("resident")) == 3 * MIB // 2
    for off in (MIB, 9 * MIB, 31 * MIB):
        vmm.check(f"read {off} {MIB // 2}")
    vmm.process.kill()
    said = second.event("exited")
    assert (said["faults"], said["prefetched_bytes"]) == (0, 3 * MIB // 2), said
    second.stop()
    good = file.read_bytes()
    for name, damage in (("flip", good[:70] + bytes([good[70] ^ 1]) + good[71:]), ("cut", good[:-8]), ("none", b"x" * 80),
                         ("empty", b"")):
        file.write_bytes(damage)
        third = Pager(case, memory, "--working-set", file, name=name)
        vmm = UffdVmm(case, third, memory)
        vmm.check()
        vmm.process.kill()
        assert third.event("exited")["prefetched_bytes"] == 0
        assert "it is ignored" in third.log(), third.log()
        third.process.kill()
    file.write_bytes(good)
    fourth = Pager(case, memory, "--working-set", file, "--no-prefetch", "--limit", "1M", name="fourth")
    vmm = UffdVmm(case, fourth, memory)
    vmm.check()
    vmm.process.kill()
    assert fourth.event("exited")["prefetched_bytes"] == 0
    fourth.stop()
    # written anew, and bounded
    fifth = Pager(case, memory, "--working-set", file, name="fifth")
    vmm = UffdVmm(case, fifth, memory)
    fifth.event("serves")
    while int(vmm.ask("resident")) < MIB:
        pass
    vmm.process.kill()
    assert fifth.event("exited")["prefetched_bytes"] == MIB
