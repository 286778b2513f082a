"""A QMP socket serves one client: who comes second is told so, and what to do."""

import socket

from forkfs_test import qmp


def test_busy(case):
    """attach fails in a few seconds with a sentence on a second monitor; then, the socket free, it works."""
    guest = case.guest(mib=128).booted()
    mount = case.mount()
    client = qmp.Qmp(guest.qmp_path)
    result = mount.run("attach", "sbx1", "--qemu", guest.qmp_path, check=False, timeout=20)
    assert result.code != 0 and guest.qmp_path in result.err, result.err
    assert "-qmp" in result.err, f"how to give the VM a second monitor is missing: {result.err}"
    assert result.seconds < 10, f"the refusal took {result.seconds:.1f} s"
    client.close()
    mount.attach(guest)
    (mount / "sbx1" / "branches" / "b1").mkdir()
    guest.check_runs()


def test_silent_socket(case):
    """A socket whose server never answers does not hang attach for good."""
    path = case.dir / "silent"
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(path))
    server.listen()
    case.on_end(server.close)
    mount = case.mount()
    result = mount.run("attach", "sbx1", "--qemu", path, check=False, timeout=30)
    assert result.code != 0 and str(path) in result.err, result.err
