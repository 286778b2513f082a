"""The tests' own tools tell right from wrong: nothing of forkfs takes part here."""

from forkfs_test import truth


def save_devices(guest, path):
    """The device state of a stopped guest."""
    guest.qmp.execute("xen-save-devices-state", filename=str(path), live=False)


def test_truths_agree(case):
    """/proc/PID/mem and pmemsave say the same of a stopped guest, and a running one changes."""
    guest = case.guest(run=["load,mib=64,disk=1"], disk="plain", mib=192).booted()
    guest.qmp.execute("stop")
    first, second = case.dir / "first", case.dir / "second"
    case.run(*truth.foreign_command(case, guest, first))
    truth.pmemsave(guest, second)
    assert truth.difference(case, first, second, truth.NOT_RAM) == ""
    guest.go()
    guest.console.wait("load", start=guest.console.mark())
    guest.qmp.execute("stop")
    truth.pmemsave(guest, second)
    said = truth.difference(case, first, second, truth.NOT_RAM)
    assert "pages differ" in said, said


def test_selfcheck_notices(case):
    """A child of memory and vmstate of one instant goes on; of two instants it finds the mismatch."""
    guest = case.guest(run=["selfcheck,mib=32,threads=2,step=1,every=8"], mib=160).booted()
    for name in ("early", "late"):
        guest.qmp.execute("stop")
        case.run(*truth.foreign_command(case, guest, case.dir / f"{name}.memory"))
        save_devices(guest, case.dir / f"{name}.vmstate")
        guest.go()
        guest.console.wait("ok", start=guest.console.mark())
    whole = guest.child("whole", case.dir / "early.memory", case.dir / "early.vmstate")
    whole.go()
    for _ in range(3):
        whole.console.wait(r"ok 0 \d+", start=whole.console.mark())
    whole.check_sane()
    torn = guest.child("torn", case.dir / "early.memory", case.dir / "late.vmstate")
    torn.go()
    torn.check_torn()
