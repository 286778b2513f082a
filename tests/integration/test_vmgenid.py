"""A guest whose VM has a generation id hears of a restore from its kernel, at once, and looks into its mailbox then."""

import json

from forkfs_test import children, rig

NEVER = 3600000  # ms between two looks of its own


def test_restored(case):
    """Source and branch say nothing; each child's guest is told, finds its payload without having looked by itself, and so does a child of it."""
    guest = case.guest(mib=256, vmgenid=True, run=["counter", f"mailbox,config,s3cret,ms={NEVER},vmgenid=1"])
    r = rig.Rig(case, guest=guest.booted())
    assert rig.wait_settled(r.branch("b1")) == "ready"
    target, attach = r.sandbox, ["--attach", "web"]
    for generation in range(2):
        rig.request(target / "ctl", fork={"branch": "b1", "name": "c1", "mailboxes": [
            {"name": "config", "payload": {"generation": generation}, "wait_for_ack": True, "ack_timeout_ms": 30000}]})
        epoch = json.loads((target / "branches/b1/forks/c1/status").read_text())["epoch"].replace("-", "")
        (child,), _ = children.run(r.mount, f"{target.name}/b1/c1", *attach)
        assert [a["state"] for a in child.said["acks"]] == ["applied"], child.said
        child.wait_console(rf'^mailbox config took \d+ epoch {epoch} flags 3: {{"ack_port":\d+,"generation": {generation}}}')
        child.wait_console("^mailbox config restored$")
        child.check_sane()
        if attach:
            target, attach = r.mount.path / "web", []
            (target / "branches/b1").mkdir()
            assert rig.wait_settled(target / "branches/b1") == "ready"
    assert not r.guest.console.all("^mailbox config (restored|took)")
    r.guest.check_runs()


def test_agent(case):
    """The agent hears of it too, says so, and has the payload of each child."""
    append = 'forkfs.mailbox=config forkfs.on_mailbox="cat; echo"'
    r = rig.Rig(case, guest=case.guest(mib=256, vmgenid=True, agent=True, run=[], append=append).booted())
    assert rig.wait_settled(r.branch("b1")) == "ready"
    rig.request(r.sandbox / "ctl", fork={"branch": "b1", "name": "c1", "mailboxes": [
        {"name": "config", "payload": {"task": 1}, "wait_for_ack": True, "ack_timeout_ms": 30000}]})
    (child,), _ = children.run(r.mount, "sbx1/b1/c1")
    assert [a["state"] for a in child.said["acks"]] == ["applied"], child.said
    child.wait_console("^forkfs-agent: the VM was restored")
    child.wait_console('"task": 1')
    assert not r.guest.console.all("was restored")
