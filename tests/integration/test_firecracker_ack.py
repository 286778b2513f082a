"""A real Firecracker whose guest acknowledges its fork's payload by vsock. Where there is none: skipped."""

import json
import pathlib
import stat
import time

from forkfs_test import children, rig
from forkfs_test.api import ApiRig
from forkfs_test.firecracker import Firecracker, jail_options, restore

QUIET = ("--", "--level", "Off")
TIMEOUT = {"test_guest": 180, "test_jailed": 180}


def fork(r, name, ms=30000):
    """A fork of b1 whose payload is to be acknowledged; its epoch as hex digits."""
    box = {"name": "config", "payload": {"task": name}, "wait_for_ack": True, "ack_timeout_ms": ms}
    rig.request(r.sandbox / "ctl", fork={"branch": "b1", "name": name, "mailboxes": [box]})
    return json.loads((r.sandbox / "branches/b1/forks" / name / "status").read_text())["epoch"].replace("-", "")


def new_rig(case, mailbox, **options):
    """A Firecracker with a vsock, whose guest acknowledges in that way; its branch b1."""
    devices = {"vsock": {"guest_cid": 3, "uds_path": str(case.dir / "vsock")}}
    guest = Firecracker(case, "sbx1", mib=64, work=16, mailbox=mailbox, devices=devices).booted()
    r = ApiRig(case, guest, case.mount(**options))
    assert rig.wait_settled(r.branch("b1")) == "ready"
    return r


def heard(child, epoch):
    """The child's guest has said it by vsock and seen that it was heard, and nothing else was said; it works on."""
    assert [(a["mailbox"], a["state"]) for a in child.said["acks"]] == [("config", "applied")], child.said
    assert not sum(child.said["acks_ignored"].values()), child.said
    (found,) = child.mail()
    assert found[0] == epoch and found[1].startswith('{"ack_vsock_port":5242,"ack_port":'), found
    deadline = time.monotonic() + 60
    while "vsock acknowledged" not in child.console():
        assert child.alive() and time.monotonic() < deadline, child.console()[-300:]
        time.sleep(0.005)
    child.visit_all(16, 1)


def test_guest(case):
    """The guest of a real Firecracker acknowledges by vsock and by nothing else; a fork of its child does so again."""
    r = new_rig(case, "vsock")
    epoch = fork(r, "c1")
    found, _ = restore(r.mount, "sbx1/b1/c1", "-n", "2", "--attach", "kid", *QUIET)
    for child in found:
        heard(child, epoch)
        assert not list(child.dir.glob("vsock_*")), list(child.dir.iterdir())
    kid = r.mount.path / found[0].said["sandbox"]
    (kid / "branches/b1").mkdir()
    assert rig.wait_settled(kid / "branches/b1") == "ready"
    r.sandbox = kid
    epoch = fork(r, "d1")
    (child,), _ = restore(r.mount, f"{kid.name}/b1/d1", *QUIET)
    heard(child, epoch)


def test_jailed(case):
    """The same in a jail, where the socket is the jail's user's; nothing of it stays there."""
    r = new_rig(case, "vsock")
    epoch = fork(r, "c1")
    ours, theirs = jail_options(case, 12345, 12346)
    (child,), _ = restore(r.mount, "sbx1/b1/c1", *ours, "--", *theirs, *QUIET)
    heard(child, epoch)
    assert child.said["sockets"]["vsock"] == f"{child.said['jail']}/vsock", child.said
    assert not list(pathlib.Path(child.said["jail"]).glob("vsock_*"))


def test_silent(case):
    """A real Firecracker whose guest says nothing is ended in its time, and nothing is left."""
    r = new_rig(case, "silent")
    fork(r, "c1", ms=1000)
    ours, theirs = jail_options(case, 12345, 12346)
    for options in (QUIET, (*ours, "--", *theirs, *QUIET)):
        found, result = restore(r.mount, "sbx1/b1/c1", *options, check=False)
        assert not found and "mailbox config was not acknowledged within 1000 ms" in result.err, result.err
        children.nothing_left(case)
    assert not [p for p in (case.dir / "jails").rglob("root") if stat.S_ISDIR(p.stat().st_mode)]
