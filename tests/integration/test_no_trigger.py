"""Looking around takes no branch: the VM is never stopped by it."""

import os

from forkfs_test import rig

LOOKS = [
    "ls -lR --color=always .", "ls -la branch branches", "find . -type f", "find . -size +1k -newer /etc/passwd", "stat branch/*",
    "stat -f branch/memory.bin", "du -a .", "du --apparent-size -s .", "compgen -f branch/ | wc -l", "compgen -G 'branch/*'",
    "test -r branch/memory.bin", "test -s branch/vmstate || true", "! ls branch/nothing branches/nothing",
    "file=branch/memory.bin; [ -e $file ]", "cat status state", "getfattr -d -m - branch/memory.bin || true",
]


def test_looking(case):
    """ls, find, stat, du, completion, walkers: no pause; cat of vmstate: one."""
    r = rig.Rig(case, mib=128)
    for look in LOOKS:
        case.run("bash", "-c", look, cwd=r.sandbox)
        assert r.guest.stops() == 0, f"'{look}' stopped the VM"
    for directory, _, names in os.walk(r.mount.path):
        for name in names:
            os.lstat(os.path.join(directory, name))
    assert r.guest.stops() == 0, "os.walk stopped the VM"
    case.shell(f"cat {r.sandbox}/branch/vmstate >/dev/null")
    assert r.guest.stops() == 1, f"reading vmstate should be one pause, is {r.guest.stops()}"
