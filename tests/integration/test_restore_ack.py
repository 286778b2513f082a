"""`forkfs restore` of a fork that is to be acknowledged: who says so lives, who does not is ended, and nothing is left."""

import json
import os
import re
import socket
import threading

from forkfs_test import children, rig

MIB = 1 << 20
SIZE = 96
PAGE = 4096


def guest(case, *boxes):
    """A guest that publishes mailboxes, attached, and its branch b1, which is ready."""
    r = rig.Rig(case, mib=SIZE, run=["counter", *(f"mailbox,{b}" for b in boxes)])
    for box in boxes:
        r.guest.console.wait(rf"^mailbox {box.split(',')[0]} ready$")
    assert rig.wait_settled(r.branch("b1")) == "ready"
    return r


def fork(r, name, *boxes, **how):
    """A fork of b1 whose payloads are to be acknowledged."""
    asked = [{"name": b, "payload": {"task": name}, "wait_for_ack": True, **how} for b in boxes]
    rig.request(r.sandbox / "ctl", fork={"branch": "b1", "name": name, "mailboxes": asked})
    return r.sandbox / "branches/b1/forks" / name


def status(path):
    """What a fork says of itself."""
    return json.loads((path / "status").read_text())


def nothing_left(r):
    """No directory of a child, no process and no port of a command that is over."""
    children.nothing_left(r.mount.case)


class Listener(threading.Thread):
    """Runs `forkfs restore`, and says to the port of its child what it is told, when the child has its payload."""

    def __init__(self, r, target, texts, *options):
        super().__init__(daemon=True)
        self.r, self.target, self.texts, self.options = r, target, texts, options
        self.result = self.found = self.error = None
        self.others = set(self._logs())  # of children that were there before
        self.start()

    def run(self):
        """The thread."""
        try:
            self.found, self.result = children.run(self.r.mount, self.target, *self.options, check=False)
        except AssertionError as e:
            self.error = e

    def port(self):
        """The port, from what the guest of the child has found in its mailbox."""
        pattern = re.compile(rb'^mailbox config took .*"ack_port":(\d+)[,}]', re.M)
        while self.is_alive():
            for log in set(self._logs()) - self.others:
                try:
                    m = pattern.search(log.read_bytes())
                except FileNotFoundError:
                    continue
                if m:
                    return int(m.group(1))
        raise AssertionError(f"the child has not told of a port: {self.result and self.result.err}")

    def _logs(self):
        return (self.r.mount.case.dir / "ch").glob("*/con.log")

    def finish(self):
        """Say the texts; (children, result) of the command."""
        port = self.port()
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
            for text in self.texts:
                s.sendto(text.encode(), ("127.0.0.1", port))
        self.join(60)
        assert not self.is_alive() and not self.error, self.error
        return self.found, self.result


def test_page(case):
    """The guest acknowledges in its page; the command waits for that, says when it came, and the next branch works the same way."""
    r = guest(case, "config,s3cret", "other,tok")
    fork(r, "c1", "config", "other")
    (child,), _ = children.run(r.mount, "sbx1/b1/c1", "--attach", "web")
    assert [(a["mailbox"], a["state"]) for a in child.said["acks"]] == [("config", "applied"), ("other", "applied")]
    assert all(0 < a["after_ns"] < 5e9 for a in child.said["acks"]), child.said
    assert not sum(child.said["acks_ignored"].values()), child.said
    assert child.said["times"]["acknowledged_ns"] >= child.said["times"]["running_ns"]
    # a branch of the child has a payload of its own, and another epoch
    web = r.mount.path / "web"
    (web / "branches/b2").mkdir()
    assert rig.wait_settled(web / "branches/b2") == "ready"
    rig.request(web / "ctl", fork={"branch": "b2", "name": "d1", "mailboxes": [
        {"name": "config", "payload": {"second": True}, "wait_for_ack": True, "ack_timeout_ms": 20000}]})
    (second,), _ = children.run(r.mount, "web/b2/d1")
    assert second.said["acks"][0]["state"] == "applied" and not second.said["acks_ignored"]["forged"]
    epoch = status(web / "branches/b2/forks/d1")["epoch"].replace("-", "")
    second.wait_console(rf'^mailbox config took \d+ epoch {epoch} flags 3: {{"ack_port":\d+,"second": true}}')
    second.check_sane()
    both, _ = children.run(r.mount, "sbx1/b1/c1", "-n", "2")
    assert [c.said["acks"][0]["state"] for c in both] == ["applied", "applied"]
    # not asked for by the command: not waited for
    (plain,), _ = children.run(r.mount, "sbx1/b1/c1", "--no-ack")
    assert "acks" not in plain.said
    plain.wait_console("^mailbox config acknowledged")
    r.guest.check_runs()


def test_missing(case):
    """Without the acknowledgement the child is ended, with a sentence; asked for by the command or by the fork; others live."""
    r = guest(case, "config,s3cret,ack=0", "liar,tok,ack=2", "good,tok2")
    fork(r, "c1", "good", "config", ack_timeout_ms=700)
    found, result = children.run(r.mount, "sbx1/b1/c1", check=False)
    assert not found and result.code == 1 and "mailbox config was not acknowledged within 700 ms" in result.err, result.err
    nothing_left(r)
    fork(r, "c2", "liar", ack_timeout_ms=700)
    found, result = children.run(r.mount, "sbx1/b1/c2", check=False)
    assert not found and "mailbox liar was not acknowledged" in result.err and "ignored: 1 forged" in result.err, result.err
    nothing_left(r)
    # the fork does not ask: the command may, for all of its mailboxes
    plain = r.sandbox / "branches/b1/forks/c3"
    plain.mkdir()
    (plain / "mailboxes/config").write_text('{"task":3}\n')
    (child,), _ = children.run(r.mount, "sbx1/b1/c3")
    assert "acks" not in child.said
    found, result = children.run(r.mount, "sbx1/b1/c3", "--ack", "300", check=False)
    assert not found and result.code == 1 and "within 300 ms" in result.err, result.err
    assert child.alive()
    child.stop()
    r.guest.check_runs()


def test_texts(case):
    """Over UDP only the exact text counts: forged, malformed and others' are ignored and counted, whatever their order."""
    r = guest(case, "config,s3cret,ack=0")
    f = fork(r, "c1", "config", ack_timeout_ms=30000)
    epoch = status(f)["epoch"]
    wrong = ["stage=applied mailbox=config10 epoch=" + epoch, "stage=applied mailbox=config", "hello", "",
             "stage=applied mailbox=config epoch=" + "0" * 32, "stage=failed mailbox=config epoch=" + epoch, "x" * 2000]
    (child,), result = Listener(r, "sbx1/b1/c1", [*wrong, f"epoch={epoch} ms=3 mailbox=config stage=applied\n"]).finish()
    assert result.code == 0, result.err
    assert child.said["acks_ignored"] == {"malformed": 3, "other": 2, "forged": 2, "duplicate": 0, "late": 0}, child.said
    child.check_sane()
    f = fork(r, "c2", "config", ack_timeout_ms=4000)
    found, result = Listener(r, "sbx1/b1/c2", wrong).finish()
    assert not found and result.code == 1, result.out
    assert "ignored: 3 malformed, 2 other, 2 forged" in result.err, result.err


def test_asked(case):
    """What cannot be waited for is refused before anything is started, with its sentence."""
    r = guest(case, "config,s3cret,ack=0")
    fork(r, "c1", "config")
    for options, words, target in (
            (["--ack", "-1"], "--ack must not be negative", "sbx1/b1/c1"), (["--ack", "30001"], "--ack must be 30000 or less", "sbx1/b1/c1"),
            (["--ack", "soon"], "--ack is a number of milliseconds", "sbx1/b1/c1"), (["--ack", "0"], "of a fork", "sbx1/b1"),
            (["--ack", "0", "--paused"], "exclude", "sbx1/b1/c1"), (["--ack", "0", "--no-ack"], "exclude", "sbx1/b1/c1"),
            (["--ack-address", "nowhere"], "IP address", "sbx1/b1/c1")):
        found, result = children.run(r.mount, target, *options, check=False)
        assert not found and result.code == 2 and words in result.err, result.err
    (child,), _ = children.run(r.mount, "sbx1/b1/c1", "--paused")
    assert "acks" not in child.said and any("paused" in n for n in child.said["notes"]), child.said
    found, result = children.run(r.mount, "sbx1/b1/c1", "--ack-address", "192.0.2.1", check=False)
    assert not found and result.code == 1 and "192.0.2.1" in result.err, result.err


def test_hooks(case):
    """A failure at any hook ends the child, and leaves no process, directory or port; the next child is as good as ever."""
    r = guest(case, "config,s3cret")
    fork(r, "c1", "config", ack_timeout_ms=30000)
    rules = case.dir / "restore-faults"
    for point in ("port", "vsock", "network", "mailbox", "vsock-loaded", "port-after", "vsock-after", "network-after", "mailbox-after"):
        rules.write_text(f"restore-{point} error:EIO\n")
        os.environ["FORKFS_FAULT_FILE"] = str(rules)
        try:
            found, result = children.run(r.mount, "sbx1/b1/c1", "-n", "2", check=False)
        finally:
            del os.environ["FORKFS_FAULT_FILE"]
        assert not found and result.code == 1 and result.err.count(f"restore-{point}: ") == 2, result.err
        nothing_left(r)
    (child,), _ = children.run(r.mount, "sbx1/b1/c1")
    assert child.said["acks"][0]["state"] == "applied"
    r.guest.check_runs()


def test_ended(case):
    """A VM that ends before it acknowledges is a failure at once, and nothing of it is left."""
    r = guest(case, "config,s3cret,ack=0")
    fork(r, "c1", "config", ack_timeout_ms=30000)
    waiting = Listener(r, "sbx1/b1/c1", [])
    waiting.port()
    ((_, pid),) = children.vms(r.mount.case)
    os.kill(pid, 9)
    waiting.join(30)
    assert not waiting.is_alive() and not waiting.found and "signal 9" in waiting.result.err, waiting.result
    nothing_left(r)
