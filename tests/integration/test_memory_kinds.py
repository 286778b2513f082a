"""Branches of a guest under load are right whatever its memory is made of and whatever the host does with it, and go on."""

import errno
import fcntl
import os
import pathlib
import tempfile
import time

from forkfs_test import case as kit
from forkfs_test import paging, rig, truth
from forkfs_test.guest import MIB as BYTES

RUN = ["counter", "load,mib=64,seq=1,random=1"]
HUGE_PAGES = pathlib.Path("/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages")
KSM = pathlib.Path("/sys/kernel/mm/ksm")
UNPRIVILEGED = pathlib.Path("/proc/sys/vm/unprivileged_userfaultfd")
THP = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")
MIB = 192


def borrow(case, path, value):
    """Change a setting of the host for the length of the test."""
    try:
        before = path.read_text().strip()
        path.write_text(value)
    except OSError as e:
        raise kit.Skip(f"{path}: {e.strerror}") from e
    if "[" in before:  # always [madvise] never
        before = before.split("[")[1].split("]")[0]
    case.on_end(lambda: path.write_text(before))


def last_tick(guest):
    """The number that the guest's counter said last."""
    return int(guest.console.all(r"^tick (\d+)$")[-1][1].group(1))


def check_continues(r):
    """A child of a new branch goes on at the tick at which the parent was."""
    before = last_tick(r.guest)
    branch = r.branch("parent")
    assert rig.wait_settled(branch) == "ready", (branch / "status").read_text()
    child = r.guest.child("child", branch / "memory.bin", branch / "vmstate")
    child.go()
    tick = int(child.console.wait(r"^tick (\d+)$", timeout=30).group(1))
    child.check_runs(30)
    child.check_sane()
    r.guest.check_runs(30)
    assert before < tick <= last_tick(r.guest), f"the child goes on at tick {tick}, the parent was at {before} before the branch"
    child.stop()
    branch.rmdir()


def check_modes(r, modes=("live", "live", "live", "full", "live")):
    """Branches, in flight and ready, each against its truth, and the guest goes on."""
    for i, mode in enumerate(modes):
        branch = r.branch_with_truth(f"b{i}", mode=mode)
        assert r.difference(branch) == "", f"branch {i} ({mode}) as it is captured"
        assert rig.wait_settled(branch) == "ready", (branch / "status").read_text()
        assert r.difference(branch) == "", f"branch {i} ({mode}), ready"
    r.guest.check_sane()
    r.guest.check_runs()


def check(case, track=False, **guest):
    """Live branches and a full one of such a guest; a child of the next one goes on."""
    r = rig.Rig(case, mib=MIB, run=RUN, attach=["--track"] if track else (), **guest)
    check_modes(r)
    check_continues(r)
    return r


def test_huge_pages(case):
    """A memfd of 2 MiB pages, with and without tracking."""
    before = int(HUGE_PAGES.read_text()) if HUGE_PAGES.exists() else None
    if before is None:
        raise kit.Skip("the kernel has no huge pages of 2 MiB")
    borrow(case, HUGE_PAGES, str(before + MIB // 2 + 4))
    if int(HUGE_PAGES.read_text()) < before + MIB // 2:
        raise kit.Skip(f"{MIB // 2} huge pages of 2 MiB cannot be reserved")
    check(case, backend="hugetlb", track=True)


def test_same_page_merging(case):
    """Anonymous memory that KSM merges: it would drop the protection, so the engine makes it unmergeable."""
    if not (KSM / "run").exists():
        raise kit.Skip("the kernel has no KSM")
    borrow(case, KSM / "pages_to_scan", "10000")
    borrow(case, KSM / "sleep_millisecs", "10")
    borrow(case, KSM / "run", "1")
    check(case, backend="ram")


def test_transparent_huge_pages(case):
    """Anonymous memory in large pages, which protection splits."""
    if not THP.exists():
        raise kit.Skip("the kernel has no transparent huge pages")
    borrow(case, THP, "always")
    check(case, backend="ram", track=True)


def test_plain_memory(case):
    """A VM that was given nothing but -m."""
    check(case, backend="plain")


def test_private_file(case):
    """A private mapping of a file: most pages are the file's until the guest writes them."""
    with tempfile.NamedTemporaryFile(dir="/dev/shm", prefix="forkfs-test-") as memory:
        memory.truncate(MIB * BYTES)
        check(case, memory=memory.name)


def check_unprivileged(case, rights):
    """The VMM has no rights: no capability, another user, and may make no userfaultfd by itself until it is given one."""
    device = os.open("/dev/userfaultfd", os.O_RDONLY | os.O_CLOEXEC)
    case.on_end(lambda: os.close(device))
    fcntl.flock(device, fcntl.LOCK_EX)  # what is lent below is lent to all VMMs of the machine, those of other tests too
    guest = case.guest(mib=MIB, run=RUN, rights=rights).booted()
    mount = case.mount()
    refused = mount.run("attach", "sbx1", "--qemu", guest.qmp_path, check=False)
    assert refused.code == 1 and "/dev/userfaultfd" in refused.err and "vm.unprivileged_userfaultfd=1" in refused.err, refused.err
    if rights == "nobody":
        mode = os.stat("/dev/userfaultfd").st_mode & 0o777
        os.chmod("/dev/userfaultfd", 0o666)
        case.on_end(lambda: os.chmod("/dev/userfaultfd", mode))
    else:
        borrow(case, UNPRIVILEGED, "1")
    r = rig.Rig(case, mount=mount, guest=guest)
    check_modes(r)
    check_continues(r)
    status = pathlib.Path(f"/proc/{guest.pid}/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in status if ":" in line)
    assert fields["Uid"].split()[0] != "0" and int(fields["CapEff"], 16) == 0, fields


def test_unprivileged(case):
    """A VMM that a user without rights has started; the device is lent to everybody."""
    check_unprivileged(case, "nobody")


def test_not_dumpable(case):
    """A VMM that gave its rights up: nobody but root may look into it. The sysctl lets it."""
    check_unprivileged(case, "dropped")


# ---- memory that is taken away from the VMM

def check_swapped(case, **guest):
    """As check(). Part of the memory is in swap when it is protected, and all of it again and again while it is captured."""
    paging.swap_on(case, 2 * MIB)
    r = rig.Rig(case, mib=MIB, run=RUN, **guest)
    before, part, done = paging.swapped_out(), MIB // 4 * BYTES, 0
    for i in range(10):
        # the truth is read in the pause, in half a second: no more than a part may have to come from swap then
        case.run(*truth.foreign_command(case, r.guest, r.truth))
        paging.page_out(r.guest.pid, r.guest.hva() + i % 4 * part, part)
        branch = r.branch_with_truth(f"b{i}", max_rate=MIB * BYTES)
        while rig.state(branch) == "writing":
            paging.page_out(r.guest.pid, r.guest.hva(), MIB * BYTES)
            time.sleep(0.05)
        said = (branch / "status").read_text()
        if rig.state(branch) == "ready":
            assert r.difference(branch) == "", f"branch {i}"
            done += 1
        else:  # swap was too slow for 500 ms: no branch, and no harm
            assert "watchdog" in said, said
        branch.rmdir()
        if done == 3:
            break
    assert done >= 2, f"{done} of 10 branches came to an end"
    paging.page_out(r.guest.pid, r.guest.hva(), MIB * BYTES)
    check_continues(r)
    assert paging.swapped_out() - before > part // 4096, "hardly anything was paged out"


def test_swapped(case):
    """Shared memory of a host that needs it."""
    check_swapped(case)


def test_swapped_private(case):
    """Anonymous memory of such a host."""
    check_swapped(case, backend="ram")


def balloon_to(r, mib):
    """Let the guest keep so much, and wait until it has given back the rest (or got it again)."""
    r.guest.qmp.execute("balloon", value=mib * BYTES)
    deadline = time.monotonic() + 60
    while r.guest.qmp.execute("query-balloon")["actual"] != mib * BYTES:
        assert time.monotonic() < deadline, r.guest.qmp.execute("query-balloon")
        time.sleep(0.01)


def check_balloon(case, **guest):
    """A balloon that grows beside a branch ends that branch and nothing else; before and after it they are right."""
    r = rig.Rig(case, mib=MIB, run=["counter", "load,mib=32,fill=1"], balloon=True, **guest)
    slow = rig.Making(r.sandbox / "branches" / "slow", max_rate=1 << 20, wait=False)  # in flight until the balloon comes
    assert slow.finish() is None, slow.error
    balloon_to(r, MIB - 64)
    assert rig.wait_settled(slow.path) == "failed"
    said = (slow.path / "status").read_text()
    assert "discarded" in said and "balloon" in said, said
    try:
        (slow.path / "memory.bin").read_bytes()
        raise AssertionError("a failed branch can be read")
    except OSError as e:
        assert e.errno == errno.EIO, e
    slow.path.rmdir()
    check_modes(r, ["live", "full"])
    balloon_to(r, MIB)
    branch = r.branch_with_truth("grown")
    assert r.difference(branch) == ""
    r.guest.check_sane()
    r.guest.check_runs()


def test_balloon(case):
    """Shared memory: a hole in the memfd, and MADV_REMOVE."""
    check_balloon(case)


def test_balloon_private(case):
    """Anonymous memory: MADV_DONTNEED."""
    check_balloon(case, backend="ram")
