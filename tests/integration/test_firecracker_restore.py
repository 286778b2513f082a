"""Children of a stock Firecracker by `forkfs restore`, with both memory back ends. Where there is no Firecracker: skipped."""

import json
import os
import re
import signal
import time

from forkfs_test import children, microvm, processes, rig
from forkfs_test.api import Api, ApiRig
from forkfs_test.case import Skip
from forkfs_test.firecracker import Firecracker, FirecrackerChild, drive, pagers, program, wait_pagers

WORK = 64
TIMEOUT = {"test_file": 180, "test_uffd": 180}


class Child(FirecrackerChild):
    """With the work that these tests give it."""

    def visit_all(self, times=2, timeout=90):  # pylint: disable=arguments-differ
        """Wait until the guest has visited and judged all its pages so many times."""
        super().visit_all(WORK, times, timeout)


def restore(r, branch, *options, check=True):
    """`forkfs restore`; (the children, the command's result)."""
    return children.run(r.mount, branch, "--vmm", program(), *options, kind=Child, check=check)


def new_rig(case, options="", **vm):
    """A Firecracker that has been at work for a while, a mount, attached."""
    guest = Firecracker(case, "sbx1", work=WORK, **vm)
    r = ApiRig(case, guest, case.mount(options=options))
    case.on_end(lambda: wait_pagers(case))
    r.guest.visit_all(1)
    return r


def test_file(case):
    """Three children that map the branch itself: they go on at its instant, are branched again, and share its pages."""
    r = new_rig(case)
    branch = r.branch("b1")
    assert rig.wait_settled(branch) == "ready"
    steps = r.guest.steps()
    found, _ = restore(r, "sbx1/b1", "-n", "3", "--attach", "kid")
    assert len(found) == 3
    for child in found:
        child.visit_all()
        first = int(re.search(r"ok 0 ([0-9a-f]{16})\n", child.console()).group(1), 16)
        assert first <= steps + (1 << 20), (first, steps)
        assert Api(child.said["sockets"]["api"]).state() == "Running"
    assert "memory.bin" in found[0].maps()
    grandparent = r.mount / found[0].said["sandbox"] / "branches/b2"
    grandparent.mkdir()
    assert rig.wait_settled(grandparent) == "ready"
    (grandchild,), _ = restore(r, f"{found[0].said['sandbox']}/b2")
    grandchild.visit_all()
    r.guest.visit_all(1)
    grandchild.stop()
    for child in found:
        r.mount.run("detach", child.said["sandbox"])


def pager_of(r, child):
    """The pid of the pager of a child, and its directory."""
    for path in (r.case.dir / "ch").glob("pager.*"):
        for line in (path / "stdout").read_text().splitlines():
            said = json.loads(line)
            if said["event"] == "listens":
                pager = said["pid"]
            if said["event"] == "serves" and said["pid"] == child.pid:
                return pager, path
    raise AssertionError(f"no pager serves {child.pid}")


def test_uffd(case):
    """Children whose pages come when they are touched, also of a branch that is being captured; the next ones are prefetched."""
    r = new_rig(case, options=f"store={case.dir}/store")
    r.mount.faults("guest-read delay:2")
    branch = r.branch("b1")
    found, _ = restore(r, "sbx1/b1", "-n", "2", "--backend", "uffd")
    r.mount.faults()
    for child in found:
        child.visit_all()
    assert (branch / "wait").read_text()
    assert rig.wait_settled(branch) == "ready"
    (first,), _ = restore(r, "sbx1/b1", "--backend", "uffd")
    first.visit_all()
    _, path = pager_of(r, first)
    file = case.dir / "store/sbx1/b1/working-set"
    deadline = time.monotonic() + 20
    while not file.exists():
        assert time.monotonic() < deadline, (path / "stderr").read_text()
        time.sleep(0.01)
    (second,), _ = restore(r, "sbx1/b1", "--backend", "uffd")
    second.visit_all()
    pager, path = pager_of(r, second)
    refused = r.mount.run("attach", "x", "--firecracker", second.said["sockets"]["api"], check=False)
    assert refused.code == 1 and "userfaultfd already" in refused.err, refused.err
    # its pager has gone, and so has the VM; those of other pagers go on
    os.kill(pager, signal.SIGKILL)
    deadline = time.monotonic() + 20
    while second.alive():
        assert time.monotonic() < deadline, "it lives on without its pager"
        time.sleep(0.01)
    assert "MISMATCH" not in second.console()
    first.visit_all(1)
    # a pager ends with the last of its children
    pager, path = pager_of(r, first)
    first.stop()
    deadline = time.monotonic() + 20
    while os.path.exists(f"/proc/{pager}/root") and "exited" in (path / "stdout").read_text():
        assert time.monotonic() < deadline, "the pager lives on without children"
        time.sleep(0.01)
    for child in found:
        child.visit_all(1)
    r.guest.visit_all(1)


def test_released(case):
    """A child that got all its pages from a pager (--all) is a sandbox like any other."""
    r = new_rig(case)
    branch = r.branch("b1")
    assert rig.wait_settled(branch) == "ready"
    socket = case.dir / "pager.sock"
    pager = case.start(case.forkfs(), "pager", "--mount", r.mount.path, "--all", "-n", "1", "sbx1/b1", socket)
    while not socket.exists():
        assert pager.poll() is None
        time.sleep(0.005)
    child = Firecracker(case, "child", load=(socket, branch / "vmstate"), backend="Uffd")
    assert pager.wait(60) == 0
    child.visit_all()
    grandchild = r.mount.attach(child) / "branches/b2"
    grandchild.mkdir()
    assert rig.wait_settled(grandchild) == "ready", (grandchild / "status").read_text()
    Firecracker(case, "grandchild", load=(grandchild / "memory.bin", grandchild / "vmstate")).visit_all()
    child.visit_all(1)


def test_drives(case):
    """Children have writable drives of their own, with the content of the branch's instant; the parent's is never theirs."""
    root, data = case.dir / "root.img", case.dir / "data.img"
    root.write_bytes(b"before" + bytes(3 << 20) + b"end of disk" + bytes(501))
    data.write_bytes(bytes(1 << 20))
    guest = Firecracker(case, "sbx1", work=WORK, devices={"drives": [drive(root, "root"), drive(data, "data", True)]}).booted()
    mount = case.mount()
    sandbox = mount.attach(guest, None, "--disk", f"system={root}")
    (sandbox / "branches/b1").mkdir()
    assert rig.wait_settled(sandbox / "branches/b1") == "ready"
    manifest = json.loads((sandbox / "branches/b1/manifest.json").read_text())
    assert sorted(manifest["vmm"]["drives"], key=lambda d: d["id"]) == [
        {"id": "data", "path": str(data), "read_only": True}, {"id": "root", "path": str(root), "read_only": False}], manifest["vmm"]
    with open(root, "r+b") as f:
        f.write(b"after!")
    found, _ = children.run(mount, "sbx1/b1", "--vmm", program(), "-n", "2", "--attach", "kid", kind=Child)
    assert len(found) == 2
    for child in found:
        own = child.dir / "drive-root"
        assert own.read_bytes() == b"before" + root.read_bytes()[6:] and own.stat().st_blocks * 512 < 1 << 20
        files = child.files()
        assert str(own) in files and str(data) in files and str(root) not in files, files
        child.visit_all()
    first = found[0].said
    mount.run("detach", first["sandbox"])
    mount.run("attach", "again", "--firecracker", first["sockets"]["api"], "--disk", f"root={first['dir']}/drive-root")
    (mount.path / "again/branches/b2").mkdir()
    assert rig.wait_settled(mount.path / "again/branches/b2") == "ready"
    (grandchild,), _ = children.run(mount, "again/b2", "--vmm", program(), kind=Child)
    assert (grandchild.dir / "drive-root").read_bytes()[:6] == b"before"
    grandchild.visit_all(1)
    for number in (1, 2):
        (case.dir / f"own{number}").write_bytes(bytes(2 << 20))
    more, _ = children.run(mount, "sbx1/b1", "--vmm", program(), "-n", "2", "--drive", f"root={case.dir}/own{{number}}", kind=Child)
    for child in more:
        assert str(case.dir / f"own{child.said['child']}") in child.files(), child.files()
        assert not (child.dir / "drive-root").exists()
        child.visit_all(1)
    assert root.read_bytes()[:6] == b"after!"
    guest.visit_all(1)


def version(r):
    """Of the Firecracker: (major, minor)."""
    return tuple(int(n) for n in json.loads((r.sandbox / "status").read_text())["vmm_version"].split(".")[:2])


def test_fork(case):
    """Children of forks find their own payload each when they wake up, those of the branch none; served by a pager too."""
    r = new_rig(case, mailbox=True)
    branch = r.branch("b1")
    assert rig.wait_settled(branch) == "ready"
    want = {}
    for name in ("c0", "c1"):
        path = branch / "forks" / name
        path.mkdir()
        (path / "mailboxes/config").write_text(f'{{"task":"{name}"}}\n')
        want[name] = (json.loads((path / "status").read_text())["epoch"].replace("-", ""), f'{{"task":"{name}"}}')
    for name, mail in want.items():
        # its log would be in the middle of what the guest says
        found, _ = restore(r, f"sbx1/b1/{name}", "-n", "2", "--", "--level", "Off")
        for child in found:
            assert child.said["fork"] == name and child.mail() == [mail], (child.said, child.mail())
            child.visit_all(1)
            child.stop()
    (plain,), _ = restore(r, "sbx1/b1")
    plain.visit_all(1)
    assert not microvm.mails(plain.console().encode()) and not r.guest.mails()
    found, done = restore(r, "sbx1/b1/c0", "--backend", "uffd", check=False)
    assert not found and done.code == 1 and "without the payloads of fork c0" in done.err, done.err
    socket = case.dir / "pager.sock"
    pager = case.start(case.forkfs(), "pager", "-n", "1", branch / "forks/c1/memory.bin", socket)
    while not socket.exists():
        assert pager.poll() is None
        time.sleep(0.005)
    served = Firecracker(case, "served", load=(socket, branch / "vmstate"), backend="Uffd")
    served.visit_all(1)
    assert served.mails() == [want["c1"]], served.mails()
    served.stop()
    assert pager.wait(60) == 0


def test_vsock(case):
    """Children have a socket of their own for the guest's vsock, where the version can be told so."""
    r = new_rig(case, devices={"vsock": {"guest_cid": 3, "uds_path": str(case.dir / "vsock")}})
    assert rig.wait_settled(r.branch("b1")) == "ready"
    if version(r) < (1, 16):
        found, done = restore(r, "sbx1/b1", check=False)
        assert not found and done.code == 1 and "child 1" in done.err, done.err
        return
    found, _ = restore(r, "sbx1/b1", "-n", "2")
    for child in found:
        assert child.said["sockets"]["vsock"] == str(child.dir / "vsock") and (child.dir / "vsock").is_socket()
        child.visit_all(1)


def test_networks(case):
    """Children have network interfaces of their own, by --net."""
    if not os.path.exists("/dev/net/tun"):
        raise Skip("there is no /dev/net/tun")
    tap = f"ff{os.getpid() % 1000000}"
    device = {"iface_id": "eth0", "host_dev_name": f"{tap}p"}
    r = new_rig(case, devices={"network-interfaces": [device]})
    assert rig.wait_settled(r.branch("b1")) == "ready"
    found, done = restore(r, "sbx1/b1", check=False)
    assert not found and done.code == 1, done.err
    found, done = restore(r, "sbx1/b1", "-n", "2", "--net", f"eth0={tap}c{{number}}", check=version(r) >= (1, 12))
    if version(r) < (1, 12):
        assert done.code == 1 and "network_overrides" in done.err, done.err
        return
    for child in found:
        assert os.path.exists(f"/sys/class/net/{tap}c{child.said['child']}")
        child.visit_all(1)


STAND_IN = """#!/usr/bin/python3
import os, socket, sys, time
s = socket.socket(socket.AF_UNIX)
s.bind(sys.argv[sys.argv.index("--api-sock") + 1])
s.listen()
c, _ = s.accept()
c.recv(65536)
open("{asked}", "w").close()
{then}
"""


def stand_in(case, name, then):
    """A program that listens where a Firecracker would, and does something else when it is asked."""
    path = case.dir / name
    path.write_text(STAND_IN.format(asked=case.dir / f"{name}.asked", then=then))
    path.chmod(0o755)
    return path


def test_no_answer(case):
    """A VMM that is killed while it loads, and one that never answers until the command is interrupted, leave nothing."""
    r = new_rig(case)
    assert rig.wait_settled(r.branch("b1")) == "ready"
    found, done = children.run(r.mount, "sbx1/b1", "--vmm", stand_in(case, "dies", "os.kill(os.getpid(), 9)"), kind=Child, check=False)
    assert not found and done.code == 1 and "signal 9" in done.err, done.err
    assert not list((case.dir / "ch").iterdir())
    for backend in ("file", "uffd"):
        vmm = stand_in(case, f"silent-{backend}", f"""open('{case.dir}/pid', 'w').write(str(os.getpid()))
os.rename('{case.dir}/pid', '{case.dir}/pid-{backend}')
time.sleep(1000)""")
        command = case.start(case.forkfs(), "restore", "--mount", r.mount.path, "--dir", case.dir / "ch", "--backend", backend,
                             "--vmm", vmm, "sbx1/b1")
        said = case.dir / f"pid-{backend}"
        while not said.exists():
            assert command.poll() is None
            time.sleep(0.005)
        pid = int(said.read_text())
        assert processes.alive(pid)
        command.send_signal(signal.SIGINT)
        assert command.wait(20) != 0
        assert processes.wait_gone(pid, 10), processes.describe(pid)
        deadline = time.monotonic() + 20
        while any(not p.name.startswith("pager.") for p in (case.dir / "ch").iterdir()) or pagers(case):
            assert time.monotonic() < deadline, (list((case.dir / "ch").iterdir()), pagers(case))
            time.sleep(0.01)
    r.guest.visit_all(1)


def test_refused(case):
    """What cannot be started is refused before anything is."""
    disk = case.dir / "disk"
    disk.write_bytes(bytes(1 << 20))
    drive = {"drive_id": "root", "path_on_host": str(disk), "is_root_device": False, "is_read_only": False}
    r = new_rig(case, devices={"drives": [drive]})
    assert rig.wait_settled(r.branch("b1")) == "ready"
    found, done = restore(r, "sbx1/b1", check=False)
    assert not found and done.code == 1 and "writes its drive root" in done.err and "--disk root=" in done.err, done.err
    for words, part in ((["--backend", "x"], "file or uffd"), (["--backend", "uffd", "--attach", "x"], "exclude each other")):
        found, done = restore(r, "sbx1/b1", *words, check=False)
        assert not found and done.code == 2 and part in done.err, done.err
    for words, part in ((["--drive", "root"], "ID=VALUE"), (["--drive", f"root={disk}", "--drive", "swap=/x"], "no such drive"),
                        (["--drive", f"root={disk}", "--net", "=tap0"], "ID=VALUE"), (["--drive", "root=/none"], "/drives/root")):
        found, done = restore(r, "sbx1/b1", *words, check=False)
        assert not found and done.code == 1 and part in done.err, done.err
    assert not list((case.dir / "ch").iterdir())
    shown = json.loads(restore_show(r))
    assert shown["command"][:2] == [program(), "--api-sock"], shown


def restore_show(r):
    """What `--show` prints for a branch that can be started."""
    guest = Firecracker(r.case, "plain", mib=64, work=16).booted()
    sandbox = r.mount.attach(guest)
    (sandbox / "branches/b1").mkdir()
    assert rig.wait_settled(sandbox / "branches/b1") == "ready"
    return r.mount.run("restore", "plain/b1", "--vmm", program(), "--show").out
