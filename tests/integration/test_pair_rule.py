"""Which opens of branch/ belong to one instant: the table of DESIGN's pair rule, by the number of pauses and the manifests' ids."""

import errno
import json
import os
import subprocess
import sys
import time

from forkfs_test import rig

LEASE = 1.0


def rigged(case, lease=30):
    """A small guest; generations that live `lease` seconds, as many triggers as one likes."""
    return rig.Rig(case, mib=128, options=f"lease={lease:g},branch-rate=0")


def manifest_id(path):
    """The id in a manifest."""
    return json.loads(path.read_text())["id"]


def test_same_shell(case):
    """Three commands of one shell read one instant."""
    r = rigged(case)
    case.shell(f"cd {r.sandbox}/branch; cp memory.bin {case.dir}/m; cp vmstate {case.dir}/v; cat manifest.json >{case.dir}/j")
    assert r.guest.stops() == 1, r.guest.stops()
    child = r.guest.child("child", case.dir / "m", case.dir / "v")
    child.go()
    child.check_runs(5)


def test_order_does_not_matter(case):
    """vmstate first, or the manifest first, is the same."""
    r = rigged(case)
    case.shell(f"cd {r.sandbox}/branch; cat vmstate manifest.json memory.bin >/dev/null")
    case.shell(f"cd {r.sandbox}/branch; cat manifest.json >/dev/null; cat memory.bin >/dev/null; cat vmstate >/dev/null")
    assert r.guest.stops() == 2, r.guest.stops()


def test_two_shells(case):
    """Two shells have two instants, also when their commands alternate."""
    r = rigged(case)
    script = ("cd {0}/branch; cat memory.bin >{1}.m; touch {1}.1; until [ -e {2}.1 ]; do sleep 0.01; done;"
              "cat vmstate >{1}.v; cat manifest.json >{1}.j")
    a, b = case.dir / "a", case.dir / "b"
    shells = [case.start("bash", "-c", script.format(r.sandbox, *pair), start_new_session=True) for pair in ((a, b), (b, a))]
    for shell in shells:
        assert shell.wait(timeout=60) == 0
    assert r.guest.stops() == 2, r.guest.stops()
    assert manifest_id(case.dir / "a.j") != manifest_id(case.dir / "b.j")
    for name in "ab":
        child = r.guest.child(f"child-{name}", case.dir / f"{name}.m", case.dir / f"{name}.v")
        child.go()
        child.check_runs(5)
        child.stop()


def test_read_twice(case):
    """Two cp of memory.bin are two snapshots, and the vmstate goes with the second."""
    r = rigged(case)
    case.shell(f"cd {r.sandbox}/branch; cp memory.bin {case.dir}/m; cp memory.bin {case.dir}/m2; cp vmstate {case.dir}/v2")
    assert r.guest.stops() == 2, r.guest.stops()
    child = r.guest.child("child", case.dir / "m2", case.dir / "v2")
    child.go()
    child.check_runs(5)


def test_one_process_opens_twice(case):
    """A process that opens a file again while its generation lives reads the same instant."""
    r = rigged(case)
    case.run(sys.executable, "-c", (
        "import hashlib, sys\n"
        "def digest():\n"
        "    with open(sys.argv[1], 'rb') as f: return hashlib.file_digest(f, 'sha1').digest()\n"
        "assert digest() == digest()\n"), r.sandbox / "branch/memory.bin", start_new_session=True)
    assert r.guest.stops() == 1, r.guest.stops()


def test_cp_r(case):
    """cp -r is one instant, with all three files."""
    r = rigged(case)
    case.shell(f"cp -r {r.sandbox}/branch {case.dir}/copy")
    assert r.guest.stops() == 1, r.guest.stops()
    assert sorted(os.listdir(case.dir / "copy")) == ["manifest.json", "memory.bin", "vmstate"]
    assert (case.dir / "copy/vmstate").stat().st_size > 1000
    assert manifest_id(case.dir / "copy/manifest.json")
    child = r.guest.child("child", case.dir / "copy/memory.bin", case.dir / "copy/vmstate")
    child.go()
    child.check_runs(5)


def test_slow_copy(case):
    """A copy that takes longer than the lease keeps its generation alive by reading."""
    r = rigged(case, LEASE)
    case.shell(f"cd {r.sandbox}/branch; for i in $(seq 0 7); do dd bs=16M count=1 status=none; sleep {LEASE * 0.4}; done "
               f"<memory.bin >{case.dir}/m && cp vmstate {case.dir}/v")
    assert r.guest.stops() == 1, r.guest.stops()
    child = r.guest.child("child", case.dir / "m", case.dir / "v")
    child.go()
    child.check_runs(5)


def test_mapped_child(case):
    """A child that keeps memory.bin mapped makes nobody's next snapshot stale, and its own bytes stay."""
    r = rigged(case, LEASE)
    keeper = case.start(sys.executable, "-c", (
        "import hashlib, mmap, os, sys\n"
        "f = os.open(sys.argv[1], os.O_RDONLY)\n"
        "m = mmap.mmap(f, 0, mmap.MAP_PRIVATE, mmap.PROT_READ)\n"
        "os.close(f)\n"
        "first = hashlib.sha1(m).digest()\n"
        "print('mapped', flush=True)\n"
        "sys.stdin.readline()\n"
        "m.madvise(mmap.MADV_DONTNEED)\n"
        "print(first == hashlib.sha1(m).digest(), flush=True)\n"), r.sandbox / "branch/memory.bin",
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert keeper.stdout.readline() == "mapped\n"
    time.sleep(LEASE * 2)
    for i in range(2):
        case.shell(f"cp {r.sandbox}/branch/memory.bin {case.dir}/m{i}")
    assert r.guest.stops() == 3, r.guest.stops()
    keeper.stdin.write("\n")
    keeper.stdin.flush()
    assert keeper.stdout.readline() == "True\n", "the mapped bytes have changed"


def test_torn_pair(case):
    """A key that read memory.bin and comes too late for vmstate is told so once, then gets a new instant."""
    r = rigged(case, LEASE)
    said = case.shell(f"cd {r.sandbox}/branch; cat memory.bin >/dev/null; sleep {LEASE * 2}; cat vmstate; echo first $?;"
                      "cat vmstate >/dev/null; echo second $?")
    assert os.strerror(errno.ESTALE) in said.err, said.err
    assert "first 1" in said.out and "second 0" in said.out, said.out
    assert r.guest.stops() == 2, r.guest.stops()


def test_torn_the_other_way(case):
    """The same for vmstate first; a file that was read already is a new snapshot without complaint."""
    r = rigged(case, LEASE)
    said = case.shell(f"cd {r.sandbox}/branch; cat vmstate >/dev/null; sleep {LEASE * 2}; cat memory.bin >/dev/null; echo first $?")
    assert "first 1" in said.out and os.strerror(errno.ESTALE) in said.err, said.out + said.err
    said = case.shell(f"cd {r.sandbox}/branch; cat vmstate >/dev/null; sleep {LEASE * 2}; cat vmstate >/dev/null; echo again $?")
    assert "again 0" in said.out, said.out + said.err
    assert r.guest.stops() == 3, r.guest.stops()


def test_crashed_reader(case):
    """A reader that is killed in the middle leaves nothing behind: others read on, its capture ends, the guest runs."""
    r = rigged(case, LEASE)
    script = f"dd if={r.sandbox}/branch/memory.bin bs=1M | (head -c 1M >/dev/null; echo some; read)"
    reader = case.start("bash", "-c", script,
                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert reader.stdout.readline() == "some\n"
    os.killpg(reader.pid, 9)
    case.shell(f"cp -r {r.sandbox}/branch {case.dir}/copy")
    assert r.guest.stops() == 2, r.guest.stops()
    deadline = time.monotonic() + LEASE * 3 + 20
    while json.loads((r.sandbox / "status").read_text())["in_flight"] != 0:
        assert time.monotonic() < deadline, (r.sandbox / "status").read_text()
        time.sleep(0.05)
    r.guest.check_runs()
