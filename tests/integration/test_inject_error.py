"""Each step of attach and branch fails once: the guest runs on, nothing stays protected, the next branch is good."""

import os

from forkfs_test import faults, rig

TIMEOUT = {"test_every_step": 900}
# Each point fails at its first pass, then at its second, …: attach and branch share some.
PASSES = 3
# So many different rules one daemon remembers; also a daemon that lived through many failures is worth a look.
PER_DAEMON = 25
# A protocol with fewer points than this has not been built with them.
FEWEST = 20


def attempt(mount, guest, name):
    """Attach and take a branch; how far it came, and whether the branch settled well."""
    result = mount.run("attach", guest.name, "--qemu", guest.qmp_path, check=False, timeout=30)
    if result.code != 0:
        assert result.err.strip(), "attach failed without a sentence"
        return "attach failed"
    branch = mount / guest.name / "branches" / name
    try:
        branch.mkdir()
    except OSError as e:
        return f"mkdir failed ({e.strerror}): {mount.error_of(branch.parent) or mount.error_of(mount / guest.name)}"
    return rig.wait_settled(branch, 30)


def check_step(mount, guest, fds, rule):
    """Fail by one rule, then take a good branch. The outcome, and whether the rule fired."""
    said = len(mount.log())
    mount.faults(rule)
    outcome = attempt(mount, guest, "bad")
    # a point in the injecting process is not in the daemon's log
    fired = outcome != "ready" or "fault point" in mount.log()[said:]
    mount.faults()
    guest.check_runs()
    assert rule.startswith("fs-") or not outcome.endswith(": "), f"{outcome}: without a sentence"
    if outcome == "attach failed":
        guest.check_free(fds)
        mount.attach(guest)
    branch = mount / guest.name / "branches" / "good"
    branch.mkdir()
    assert rig.wait_settled(branch) == "ready", f"after {rule}: {(branch / 'status').read_text()}"
    for name in os.listdir(branch.parent):
        os.rmdir(branch.parent / name)
    mount.run("detach", guest.name)
    guest.check_free(fds)
    return outcome, fired


def test_every_step(case):
    """`POINT@N error:EIO` for every point and its first passes."""
    guest = case.guest(mib=128, run=["counter", "load,mib=32,rate=5000"]).booted()
    mount, fds, tried, failed, wrong = None, guest.fds(), 0, set(), []
    for point in faults.passed(case, guest):
        for n in range(1, PASSES + 1):
            if tried % PER_DAEMON == 0:
                if mount:
                    mount.stop()
                mount = case.mount(f"mnt-{point}-{n}", options="log=debug")
            tried += 1
            try:
                outcome, fired = check_step(mount, guest, fds, f"{point}@{n} error:EIO")
            except (AssertionError, OSError) as e:
                wrong.append(f"{point}@{n}")
                print(f"{point}@{n}: WRONG: {e}")
                mount.run("detach", guest.name, check=False)
                fds, tried = guest.fds(), 0  # go on with a new daemon
                break
            print(f"{point}@{n}: {outcome}{'' if fired else ', not passed'}")
            if outcome != "ready":
                failed.add(point)
            if not fired:
                break
    assert not wrong, f"{len(wrong)} steps end badly: {wrong}"
    assert len(failed) >= FEWEST, f"only {len(failed)} points have failed a branch: are there fault points in this build?"
