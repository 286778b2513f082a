"""What is the same for all VMMs that are controlled over HTTP: tests/integration/test_coop.py, test_firecracker.py."""

import errno
import http.client
import json
import pathlib
import signal
import socket
import time

from . import rig

PAUSED, SAVED = "vmm-save", "vmm-resume"  # fault points: stopped and nothing saved yet; armed, just before the resume


class Api(http.client.HTTPConnection):
    """A VMM's control API: HTTP over a unix socket."""

    def __init__(self, path, timeout=10):
        super().__init__("localhost", timeout=timeout)
        self.path = str(path)

    def connect(self):
        """To the socket."""
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self.path)

    def call(self, method, path, body=None, good=(200, 204)):
        """One request; its answer as JSON, None where it has none."""
        self.request(method, path, json.dumps(body) if body is not None else None)
        answer = self.getresponse()
        text = answer.read()
        assert answer.status in good, f"{method} {path}: {answer.status} {text[:300]!r}"
        return json.loads(text) if text else None

    def state(self):
        """Running, Paused or Not started."""
        return self.call("GET", "/")["state"]


class ApiRig(rig.Rig):
    """Such a VM, a mount, attached."""

    instant = SAVED

    def __init__(self, case, guest, mount=None):  # pylint: disable=super-init-not-called
        self.case = case
        self.guest = guest.booted()
        self.mount = mount or case.mount()
        self.sandbox = self.mount.attach(self.guest)
        self.hold = case.dir / "hold"
        self.truth = case.dir / "truth"

    def held(self, name, point):
        """Begin a branch and return when it is held at a point; the thread that makes it."""
        mark = pathlib.Path(f"{self.hold}.held")
        for path in (self.hold, mark):
            path.unlink(missing_ok=True)
        self.mount.faults(f"{point} hold:{self.hold}")
        making = rig.Making(self.sandbox / "branches" / name)
        while not mark.exists():
            assert making.is_alive(), f"mkdir has passed without the point {point}: {making.error}"
            time.sleep(0.0005)
        return making


def check_death(r, point, number):
    """The daemon gets a signal at a point of the pause: the guest runs within a second, and is attached again."""
    r.held("b1", point)
    r.mount.kill(number)
    r.guest.check_runs(within=3)
    r.guest.wait_free()
    if number == signal.SIGSTOP:
        r.mount.kill(signal.SIGKILL)
    r.mount.clear_dead()
    fresh = r.case.mount(name="mnt2")
    branch = fresh.attach(r.guest) / "branches/b2"
    branch.mkdir()
    assert rig.wait_settled(branch) == "ready", (branch / "status").read_text()
    r.guest.visit_all(1)
    assert r.guest.left_over() == [], r.guest.left_over()


def check_paused_by_others(r, checked_branch):
    """A VM that was found paused stays paused: after a branch, and when the daemon dies while it takes one.

    checked_branch(r, name) takes a branch, compares it with the truth and gives its directory.
    """
    r.guest.api.call("PATCH", "/vm", {"state": "Paused"})
    branch = checked_branch(r, "b1")
    assert rig.wait_settled(branch) == "ready"
    assert (r.sandbox / "state").read_text() == "paused\n"
    assert r.guest.api.state() == "Paused"
    r.held("b2", SAVED)
    r.mount.kill()
    r.mount.clear_dead()
    r.guest.wait_free()
    assert r.guest.api.state() == "Paused", "resumed, though somebody else had paused it"
    r.guest.api.call("PATCH", "/vm", {"state": "Resumed"})
    r.guest.check_runs()


def check_resumed_by_others(r):
    """Somebody else resumes between save and arm's end: the branch fails, and says why."""
    making = r.held("b1", SAVED)
    r.guest.api.call("PATCH", "/vm", {"state": "Resumed"})
    r.hold.touch()
    error = making.finish()
    assert error and error.errno == errno.EAGAIN, error
    assert "somebody else resumed" in r.mount.log(), r.mount.log()
    r.mount.faults()
    r.guest.check_runs()
    assert rig.wait_settled(r.branch("b2")) == "ready"


def check_paused_meanwhile(r):
    """Somebody else pauses while we sweep: theirs, and it stays so."""
    making = r.held("b1", "vmm-pause")
    r.guest.api.call("PATCH", "/vm", {"state": "Paused"})
    r.hold.touch()
    assert making.finish() is None
    r.mount.faults()
    assert r.guest.api.state() == "Paused"
    assert rig.wait_settled(r.sandbox / "branches/b1") == "ready"
    r.guest.api.call("PATCH", "/vm", {"state": "Resumed"})
    r.guest.visit_all(1)
