"""Branches of a guest under load are right whatever its memory is made of and whatever the host does with it."""

import pathlib

from forkfs_test import case as kit
from forkfs_test import rig

RUN = ["counter", "load,mib=64,seq=1,random=1"]
HUGE_PAGES = pathlib.Path("/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages")
KSM = pathlib.Path("/sys/kernel/mm/ksm")
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


def check(case, track=False, **guest):
    """Live branches, in flight and ready, then a full one; each against its truth, and the guest goes on."""
    r = rig.Rig(case, mib=MIB, run=RUN, attach=["--track"] if track else (), **guest)
    for i, mode in enumerate(["live", "live", "live", "full", "live"]):
        branch = r.branch_with_truth(f"b{i}", mode=mode)
        assert r.difference(branch) == "", f"branch {i} ({mode}) as it is captured"
        assert rig.wait_settled(branch) == "ready", (branch / "status").read_text()
        assert r.difference(branch) == "", f"branch {i} ({mode}), ready"
    r.guest.check_sane()
    r.guest.check_runs()
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
