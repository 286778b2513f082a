"""A VM that has its memory for itself is branched without a look at all the processes of the machine."""

import os

from forkfs_test import case as kit
from forkfs_test.microvm import MicroVm

FIRST_PID_NAMESPACE = 0xEFFFFFFC  # PROC_PID_INIT_INO of include/linux/proc_ns.h


def need_counts():
    """The kernel tells how often a file is held: BPF iterators of one process, and types."""
    release = tuple(int(n) for n in os.uname().release.split(".")[:2])
    if release < (6, 1) or not os.path.exists("/sys/kernel/btf/vmlinux") or os.stat("/proc/self/ns/pid").st_ino != FIRST_PID_NAMESPACE:
        raise kit.Skip("the kernel does not count who holds a file: Linux 6.1, BTF and the first pid namespace are needed")


def check(case, guest):
    """A branch without that look; one that nobody counted for needs it."""
    need_counts()
    mount = case.mount()
    mount.faults("look-at-all error:EIO")
    sandbox = mount.attach(guest)
    for number in range(3):
        (sandbox / f"branches/b{number}").mkdir()
    mount.faults("look-at-all error:EIO", "bpf-alone error:EIO")
    try:
        (sandbox / "branches/c").mkdir()
    except OSError:
        text = mount.error_of(sandbox / "branches")
        assert "processes of this machine" in text, text
    else:
        raise AssertionError("the rule that forbids the look did not reach it: this test shows nothing")


def test_kvm(case):
    """The microVM: KVM's own threads have no descriptors."""
    guest = MicroVm(case, "sbx1", mib=16, kind="memfd").booted()
    check(case, guest)
    guest.check_sane()


def test_qemu(case):
    """QEMU with a memfd."""
    guest = case.guest(mib=192)
    check(case, guest)
    guest.check_sane()
