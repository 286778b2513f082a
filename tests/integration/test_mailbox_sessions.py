"""Whose payload is in whose snapshot: workers of one session, sessions, and keys at once, and an oracle that knows what each has asked for."""

import json

from forkfs_test.api import ApiRig
from forkfs_test.microvm import MicroVm

ROUNDS = 12
TIMEOUT = {"test_stress": 240}

# Two workers of one session, which is that of the process: both write the same mailbox, and read what their session reads next. Who is
# refused waits for the other; whoever was not must find its own. Every second round is read by a process of the worker's.
SESSION = """
import errno, json, os, subprocess, sys, time

box, memory, out, who, rounds = *sys.argv[1:5], int(sys.argv[5])
PAGE, SEQ, LENGTH, PAYLOAD, EPOCH = 0x50000, 256, 260, 264, 240


def write(payload):
    fd = os.open(box, os.O_WRONLY | os.O_TRUNC)
    try:
        os.write(fd, payload)
    finally:
        os.close(fd)


def read(number):
    if number % 2:
        page = subprocess.run(["dd", "if=" + memory, "bs=4096", "skip=80", "count=1", "status=none"], stdout=subprocess.PIPE, check=True).stdout
    else:
        fd = os.open(memory, os.O_RDONLY)
        page = os.pread(fd, 4096, PAGE)
        os.close(fd)
    length = int.from_bytes(page[LENGTH:LENGTH + 4], "little")
    seq = int.from_bytes(page[SEQ:SEQ + 4], "little")
    return [page[PAYLOAD:PAYLOAD + length].decode() if seq else None, page[EPOCH:EPOCH + 16].hex()]


def worker(name):
    with open(f"{out}.{name}", "w") as said:
        for n in range(rounds):
            payload = json.dumps({"who": f"{who}.{name}", "round": n})
            busy = 0
            while True:
                try:
                    write(payload.encode())
                    break
                except OSError as e:
                    if e.errno != errno.EBUSY:
                        raise
                    busy += 1
                    time.sleep(0.002)
            print(json.dumps([payload, *read(n), busy]), file=said)


def reader(name):  # never writes: what it reads has no payload at all
    with open(f"{out}.{name}", "w") as said:
        for n in range(2 * rounds):
            print(json.dumps([None, *read(n), 0]), file=said)


names = sys.argv[6:]
pids = []
for name in names:
    pid = os.fork()
    if not pid:
        (worker if name.startswith("w") else reader)(name)
        os._exit(0)
    pids.append(pid)
sys.exit(max(os.waitpid(pid, 0)[1] for pid in pids) >> 8)
"""


def test_stress(case):
    """Three sessions of two workers, a session that only reads, and two keys: who wrote finds its own payload, the others none; no epoch twice."""
    r = ApiRig(case, MicroVm(case, "sbx1", mib=16, kind="memfd", work=2, mailbox="config,s3cret"), case.mount(options="branch-rate=0,memory=unlimited"))
    box, now = r.sandbox / "mailboxes/config", r.sandbox / "branch/memory.bin"
    out = case.dir / "said"
    out.mkdir()

    def session(name, memory, *workers):
        return case.start("setsid", "-w", "python3", "-c", SESSION, box, memory, out / name, name, str(ROUNDS), *workers)

    everybody = [session(f"s{i}", now, "w0", "w1") for i in range(3)] + [session("plain", now, "r")] + \
                [session(f"key{i}", r.sandbox / f"branch@key{i}/memory.bin", "r") for i in range(2)]
    for p in everybody:
        assert p.wait(timeout=200) == 0
    epochs, busy = set(), 0
    files = sorted(out.iterdir())
    assert len(files) == 9, files
    for file in files:
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        assert len(lines) == (ROUNDS if ".w" in file.name else 2 * ROUNDS), file.name
        for wrote, found, epoch, refused in lines:
            assert found == wrote, f"{file.name} wrote {wrote} and found {found}"
            if wrote:
                assert epoch not in epochs, f"{file.name}: epoch {epoch} twice"
                epochs.add(epoch)
            busy += refused
    assert len(epochs) == 6 * ROUNDS
    print(f"{busy} writes waited for another worker of their session")
    assert r.guest.mails() == [], "the source has seen a payload"
    r.guest.check_runs(5)
