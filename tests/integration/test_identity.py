"""A branch is, byte by byte, what foreign hands read while the guest was held stopped at the branch's instant."""

from forkfs_test import rig

LOAD = "load,mib=96,seq=1,random=1"
LONG_TIMEOUT = {"test_no_disk": 1200, "test_disk": 1200, "test_disk_iothread": 1200, "test_private_memory": 1200}


def compare_branches(case, count, **guest):
    """Take so many branches under load, read in flight, settled, or both; none may differ from its truth."""
    r = rig.Rig(case, mib=192, **guest)
    wrong = []
    for i in range(count):
        kind = "pmem" if i % 4 == 3 else "mem"
        branch = r.branch_with_truth(f"b{i}", kind=kind)
        said = r.difference(branch, kind) if i % 3 != 1 else ""
        settled = rig.wait_settled(branch)
        assert settled == "ready", (branch / "status").read_text()
        said = said or (r.difference(branch, kind) if i % 3 != 0 else "")
        if said:
            wrong.append(f"branch {i} ({kind}): {said}")
        branch.rmdir()
    r.guest.check_sane()
    r.guest.check_runs()
    assert not wrong, f"{len(wrong)} of {count} branches are wrong: {wrong[:5]}"


def test_no_disk(case):
    """Two vCPUs write memory, in order and at random."""
    compare_branches(case, 300 if case.long else 35, run=[LOAD])


def test_disk(case):
    """And a virtio disk is read into guest memory and written."""
    compare_branches(case, 300 if case.long else 30, run=[LOAD + ",disk=1"], disk="plain")


def test_disk_iothread(case):
    """And the disk's work is done by an iothread of the VMM."""
    compare_branches(case, 300 if case.long else 30, run=[LOAD + ",disk=1"], disk="iothread")


def test_private_memory(case):
    """Guest memory that is anonymous instead of a memfd."""
    compare_branches(case, 100 if case.long else 10, run=[LOAD], backend="ram")
