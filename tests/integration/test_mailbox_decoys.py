"""What looks like a mailbox in a Linux guest's memory and is none, or is one too many: never taken for the guest's own, never guessed."""

import errno
import json
import re

from forkfs_test import rig

PAGE = 4096
MAGIC = b"HYPEMAN_FORK_MAILBOX_V1\0"


def marker(name, token):
    """What a frame begins with, its token's NUL included."""
    return MAGIC + name.encode() + b"\0" + token.encode() + b"\0"


def places(path, what):
    """Offsets of these bytes in a file, at whatever place."""
    data, found, at = path.read_bytes(), [], -1
    while (at := data.find(what, at + 1)) >= 0:
        found.append(at)
    return found


def at_pages(path, what):
    """Those of them that are at a page."""
    return [at for at in places(path, what) if at % PAGE == 0]


def write(fork, box, payload):
    """Put a payload into a mailbox of a fork; the errno of a refusal, 0 otherwise."""
    try:
        (fork / "mailboxes" / box).write_bytes(payload)
    except OSError as e:
        return e.errno
    return 0


def refusal(r, fork, box):
    """The offsets that a refusal names, and how many there are."""
    assert write(fork, box, b"{}") == errno.ENOTUNIQ
    said = r.mount.error_of(fork / "mailboxes")
    assert f"'{box}'" in said, said
    return [int(o, 16) for o in re.findall(r"0x[0-9a-f]+", said)], int(re.search(r"is there (\d+) times", said).group(1))


def branch_of(r, name):
    """A branch that is ready, and a fork of it."""
    branch = r.branch(name)
    assert rig.wait_settled(branch) == "ready"
    (branch / "forks/c").mkdir()
    return branch / "memory.bin", branch / "forks/c"


def test_decoys(case):
    """Stale copies are refused with their offsets; other tokens, other places and half frames don't confuse; the guest gets what is its own."""
    r = rig.Rig(case, mib=128, run=[
        "counter", "mailbox,config,s3cret", "decoy,unaligned,config,s3cret", "decoy,straddling,config,s3cret",
        "decoy,aligned,config,s3cret-and-more", "decoy,aligned,config,s3", "decoy,unterminated,config,s3cret", "decoy,aligned,config2,s3cret",
        "mailbox,freed,t", "decoy,freed,freed,t", "mailbox,cached,t", "decoy,cached,cached,t"])
    for said, times in (("mailbox config ready", 1), ("mailbox freed ready", 1), ("mailbox cached ready", 1), ("decoy unaligned ready", 1),
                        ("decoy straddling ready", 1), ("decoy aligned ready", 3), ("decoy unterminated ready", 1), ("decoy freed ready", 1),
                        ("decoy cached ready", 1)):
        start = 0
        while len(r.guest.console.all(f"^{said}$")) < times:
            r.guest.console.wait(f"^{said}$|^tick", timeout=90, start=start)
            start = r.guest.console.mark()
    memory, fork = branch_of(r, "b1")

    # all of it is there: one page that is the guest's own, one copy behind the beginning of its page, and one that begins at the end of a
    # page; where in memory its other part is, the guest's kernel has decided
    own = at_pages(memory, marker("config", "s3cret"))
    assert len(own) == 1, own
    assert any(at % PAGE == 8 for at in places(memory, marker("config", "s3cret")))
    assert any(at % PAGE == PAGE - 20 for at in places(memory, MAGIC[:20]))
    longer, shorter = at_pages(memory, marker("config", "s3cret-and-more")), at_pages(memory, marker("config", "s3"))
    assert len(longer) == len(shorter) == 1
    assert len(at_pages(memory, MAGIC + b"config\0x")) == 1
    offsets, count = refusal(r, fork, "config")
    assert sorted(offsets) == sorted(own + longer + shorter) and count == 3
    for box in ("config:s3c", "config:s3cret-and", "config:x", "confi"):
        assert write(fork, box, b"{}") == errno.ENOENT, box

    # the page cache, and pages that the kernel has had back, hold whole frames
    cached = at_pages(memory, marker("cached", "t"))
    assert len(cached) == 2
    assert refusal(r, fork, "cached") == (cached, 2)
    freed = at_pages(memory, marker("freed", "t"))
    assert len(freed) > 1
    offsets, count = refusal(r, fork, "freed:t")
    assert count == len(freed) and len(offsets) > 1 and offsets == freed[:len(offsets)]
    assert json.loads((fork / "status").read_text())["overlay_pages"] == []

    assert write(fork, "config:s3cret", b'{"task":1}') == 0
    assert json.loads((fork / "status").read_text())["overlay_pages"] == own
    child = r.guest.child("child", fork / "memory.bin", fork / "vmstate")
    child.go()
    assert child.console.wait(r"^mailbox config took \d+ epoch \w+ flags 1: (.*)$", timeout=60).group(1) == '{"task":1}'
    child.check_sane()


def test_last_page(case):
    """A frame in the last page of memory is one like any other, up to the last byte of its payload; behind it there is nothing."""
    r = rig.Rig(case, mib=96, run=["counter"])
    size = 96 << 20
    frame = (marker("last", "t")).ljust(PAGE, b"\0")
    r.guest.qmp.execute("stop")
    with open(r.guest.memfd(), "rb+", buffering=0) as memory:
        memory.seek(size - PAGE)
        was = memory.read(PAGE)
        memory.seek(size - PAGE)
        memory.write(frame)
    memory, fork = branch_of(r, "b1")
    with open(r.guest.memfd(), "rb+", buffering=0) as own:
        own.seek(size - PAGE)
        own.write(was)
    r.guest.qmp.execute("cont")
    assert at_pages(memory, marker("last", "t")) == [size - PAGE]
    payload = b'{"a":"' + b"x" * (3832 - 8) + b'"}'
    assert write(fork, "last", payload + b"\n") == 0
    assert json.loads((fork / "status").read_text())["overlay_pages"] == [size - PAGE]
    said = (fork / "memory.bin").read_bytes()
    assert len(said) == size and said[-len(payload):] == payload and said[:-PAGE] == memory.read_bytes()[:-PAGE]
    assert write(fork, "last:t", b'{"a":"' + b"x" * 3832 + b'"}') != 0
    r.guest.check_runs()
    # the page is the guest's again: a new branch has no such mailbox
    _, fork = branch_of(r, "b2")
    assert write(fork, "last", b"{}") == errno.ENOENT
