"""The comparison of test_identity catches each way to break the protocol's order."""

from forkfs_test import rig

RUNS = 100
CAUGHT = 95
TIMEOUT = {"test_true_order": 300, "test_arm_before_pause": 300, "test_arm_after_resume": 300,
           "test_unprotect_before_copy": 300, "test_late_page": 300, "test_sweep_race": 300}


def wrong_branches(case, *rules):
    """Of RUNS branches under load, how many differ from their truth."""
    r = rig.Rig(case, mib=160, run=["load,mib=64,seq=1,random=1,disk=1"], disk="plain")
    wrong = 0
    for i in range(RUNS):
        branch = r.branch_with_truth(f"b{i}", *rules)
        assert rig.wait_settled(branch) == "ready", (branch / "status").read_text()
        wrong += r.difference(branch) != ""
        branch.rmdir()
    return wrong


def check_caught(case, mutant, *rules):
    """The mutant must be seen in nearly every run."""
    wrong = wrong_branches(case, f"mutant:{mutant} on", *rules)
    assert wrong >= CAUGHT, f"{mutant} was caught in {wrong} of {RUNS} runs only"


def test_true_order(case):
    """The control: without a mutant nothing is caught."""
    wrong = wrong_branches(case)
    assert wrong == 0, f"{wrong} of {RUNS} true branches differ"


def test_arm_before_pause(case):
    """Protecting before the VM is quiescent; a little earlier still, for the guest of a busy host to write something in between."""
    check_caught(case, "arm-before-pause", "qmp-stop delay:5")


def test_arm_after_resume(case):
    """Protecting when it runs again; the daemon gets its CPU a little late, for the guest to write something before."""
    check_caught(case, "arm-after-resume", "qmp-cont-reply delay:5")


def test_unprotect_before_copy(case):
    """Letting the writer go before the old bytes are out."""
    check_caught(case, "unprotect-before-copy")


def test_late_page(case):
    """One page is copied after it was let go."""
    check_caught(case, "late-page")


def test_sweep_race(case):
    """The pre-arm sweep races the fault handler for a page; it is slow enough for the guest to write beside it on a busy host."""
    check_caught(case, "sweep-race", "protect delay:1", "sweep-window delay:2")
