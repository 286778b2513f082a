"""Forks: payloads that a child finds when it wakes up, over a branch that stays as it was."""

import errno
import hashlib
import json
import os
import re
import struct
import threading

from forkfs_test import rig
from forkfs_test.rig import refused

PAGE = 4096
SEQ, LENGTH, PAYLOAD, EXTENSION = 256, 260, 264, 224
BIG = b'{"n":9007199254740993,"z":1, "a":{"b":[1.50,"\xc3\xa4"]}}'


def guest(case, *boxes, mib=96, **more):
    """A guest that publishes mailboxes, attached."""
    r = rig.Rig(case, mib=mib, run=["counter", *(f"mailbox,{b}" for b in boxes)], **more)
    start = 0
    while len(r.guest.console.all("^mailbox .* ready$")) < len(boxes):
        r.guest.console.wait("^mailbox|^tick", start=start)
        start = r.guest.console.mark()
    return r


def fork(branch, name):
    """Make a fork by mkdir."""
    path = branch / "forks" / name
    path.mkdir()
    return path


def settled(r, name="b1"):
    """A branch that is ready."""
    branch = r.branch(name)
    assert rig.wait_settled(branch) == "ready", (branch / "status").read_text()
    return branch


def digest(path):
    """Hash of a file's bytes."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else hashlib.sha256(f.read()).hexdigest()


def differences(a, b):
    """Offsets at which two files of one size differ."""
    with open(a, "rb") as f, open(b, "rb") as g:
        at, found = 0, []
        while True:
            x, y = f.read(1 << 20), g.read(1 << 20)
            assert len(x) == len(y)
            if not x:
                return found
            if x != y:
                found += [at + i for i in range(len(x)) if x[i] != y[i]]
            at += len(x)


def took(guest_, name, start=0):
    """What the guest says that it found in a mailbox: (epoch, payload)."""
    m = guest_.console.wait(rf"^mailbox {name} took \d+ epoch ([0-9a-f]+) flags \d+: (.*)$", timeout=60, start=start)
    return m.group(1), m.group(2)


def test_children(case):
    """Three children of one branch take a payload each, their own; source, branch and siblings stay as they were."""
    r = guest(case, "config,s3cret", "other,tok")
    branch = settled(r)
    before = digest(branch / "memory.bin")
    payloads = [f'{{"task":{i},"n":9007199254740993}}' for i in range(3)]
    for i, p in enumerate(payloads):
        (fork(branch, f"c{i}") / "mailboxes/config").write_text(p + "\n")
    epochs = set()
    for i, p in enumerate(payloads):
        f = branch / "forks" / f"c{i}"
        child = r.guest.child(f"child{i}", f / "memory.bin", f / "vmstate")
        child.go()
        epoch, payload = took(child, "config")
        assert payload == p, (payload, p)
        assert epoch == json.loads((f / "status").read_text())["epoch"].replace("-", "")
        epochs.add(epoch)
        assert not child.console.all("^mailbox other took")
        child.check_sane()
        child.stop()
    assert len(epochs) == 3
    assert digest(branch / "memory.bin") == before
    assert not r.guest.console.all("^mailbox .* took")
    r.guest.check_runs()


def test_exact_bytes(case):
    """A fork without payload is its branch; with one it differs in payload, length, seq and extension, and as documented."""
    r = guest(case, "config,s3cret")
    branch = settled(r)
    empty, full = fork(branch, "empty"), fork(branch, "full")
    assert differences(branch / "memory.bin", empty / "memory.bin") == []
    (full / "mailboxes/config").write_bytes(BIG)
    status = json.loads((full / "status").read_text())
    (at,) = status["overlay_pages"]
    assert status["overlay_bytes"] == PAGE and status["serving"] == "daemon"
    allowed = {*range(at + EXTENSION, at + 256), *range(at + SEQ, at + PAYLOAD + len(BIG))}
    found = differences(branch / "memory.bin", full / "memory.bin")
    assert found and set(found) <= allowed, sorted(set(found) - allowed)[:5]
    with open(full / "memory.bin", "rb") as f:
        f.seek(at)
        page = f.read(PAGE)
    assert page[PAYLOAD:PAYLOAD + len(BIG)] == BIG
    assert struct.unpack_from("<II", page, SEQ) == (1, len(BIG))
    assert page[240:256].hex() == status["epoch"].replace("-", "")
    assert (full / "vmstate").read_bytes() == (branch / "vmstate").read_bytes()
    manifest = json.loads((full / "manifest.json").read_text())
    assert manifest["fork"]["epoch"] == status["epoch"] and manifest["id"] == status["branch_id"]
    assert [m["name"] for m in manifest["fork"]["mailboxes"]] == ["config"]
    whole = case.dir / "whole"
    case.run("cp", "-r", str(full), str(whole))
    assert digest(whole / "memory.bin") == digest(full / "memory.bin")


def test_writing(case):
    """Bytes accumulate, are checked by the write that brings them, published by close, and read back as they were."""
    r = guest(case, "config,s3cret", "second,t")
    f = fork(settled(r), "c1")
    box = f / "mailboxes/config"
    assert sorted(os.listdir(f / "mailboxes")) == ["config", "second"]
    assert box.read_bytes() == b""
    for data in (b'{"a":1}\n', b' \n{ "z" : 12345678901234567890123, "a":"\\u00e4"}\n\n', b"{}"):
        box.write_bytes(data)
        assert box.read_bytes() == data and box.stat().st_size == len(data)
    fd = os.open(box, os.O_WRONLY | os.O_TRUNC)
    for c in b'{"one":"byte"}\n':
        assert os.write(fd, bytes([c])) == 1
    assert box.read_bytes() == b"{}", "published before it was closed"
    os.close(fd)
    assert box.read_bytes() == b'{"one":"byte"}\n'
    # closed without a write, or half-way: as it was
    os.close(os.open(box, os.O_WRONLY | os.O_TRUNC))
    fd = os.open(box, os.O_WRONLY)
    os.write(fd, b'{"half":')
    refused(errno.EINVAL, os.close, fd)
    assert box.read_bytes() == b'{"one":"byte"}\n'
    assert "8 bytes" in r.mount.error_of(f / "mailboxes")
    # a shell of the tree's users
    case.run("bash", "-c", f"printf '%s\\n' '{{' '\"lines\":[1,' '2]}}' > {box}")
    assert json.loads(box.read_text()) == {"lines": [1, 2]}
    box.unlink()
    assert box.read_bytes() == b"" and json.loads((f / "status").read_text())["overlay_bytes"] == 0
    refused(errno.ENOENT, box.unlink)


def write_once(path, data, flags=os.O_WRONLY | os.O_TRUNC):
    """One write(2); the handle is closed whatever comes."""
    fd = os.open(path, flags)
    try:
        os.write(fd, data)
    finally:
        os.close(fd)


def test_refused(case):
    """What can't be a payload fails in write(2), and nothing of it is left."""
    r = guest(case, "config,s3cret")
    branch = settled(r)
    f = fork(branch, "c1")
    box = f / "mailboxes/config"
    box.write_text('{"keep":1}')
    for bad in (b"[]", b"null", b"7", b'{"a":}', b'{"a":1}{}', b'{"a":"\xff"}', b"{'a':1}", b'{"a":1} x', b'{"a":NaN}'):
        refused(errno.EINVAL, write_once, box, bad)
    refused(errno.EFBIG, write_once, box, b'{"a":"' + b"x" * 8200)
    refused(errno.EFBIG, write_once, box, b'{"a":"' + b"x" * 5000)
    fits = b'{"a":"' + b"x" * (3832 - 8) + b'"}'
    assert len(fits) == 3832
    refused(errno.EFBIG, write_once, box, fits[:10] + b"x" + fits[10:])
    assert "3832" in r.mount.error_of(f / "mailboxes")
    assert box.read_text() == '{"keep":1}'
    write_once(box, fits + b"\n")
    assert box.read_bytes() == fits + b"\n"
    refused(errno.ENOENT, write_once, f / "mailboxes/nobody", b"{}")
    assert "nobody" in r.mount.error_of(f / "mailboxes")
    refused(errno.EINVAL, os.open, box, os.O_WRONLY | os.O_APPEND)
    refused(errno.ENOENT, os.stat, f / "mailboxes/a b")
    refused(errno.ENOENT, os.stat, f / "mailboxes" / ("n" * 65))
    refused(errno.ENOENT, os.stat, f / "mailboxes/.git")
    # once it was read it never changes
    with open(f / "memory.bin", "rb") as memory:
        memory.read(1)
    refused(errno.EBUSY, write_once, box, b"{}")
    refused(errno.EBUSY, box.unlink)
    assert box.read_bytes() == fits + b"\n"
    refused(errno.EEXIST, fork, branch, "c1")
    refused(errno.EINVAL, fork, branch, "c 1")
    f.rmdir()
    refused(errno.ENOENT, os.stat, box)
    fork(branch, "c2")
    branch.rmdir()
    refused(errno.ENOENT, os.stat, branch)


def test_tokens(case):
    """Two of a name: the token says which, in the name or in the xattr; alone the name is refused with both offsets."""
    r = guest(case, "config,abc", "config,abcd", "one,t,stale=2")
    f = fork(settled(r), "c1")
    boxes = f / "mailboxes"
    assert sorted(os.listdir(boxes)) == ["config:abc", "config:abcd", "one:t"]
    refused(errno.ENOTUNIQ, write_once, boxes / "config", b"{}")
    assert len(re.findall(r"0x[0-9a-f]+000\b", r.mount.error_of(boxes))) == 2, r.mount.error_of(boxes)
    refused(errno.ENOTUNIQ, write_once, boxes / "one:t", b"{}")
    assert len(re.findall(r"0x[0-9a-f]+000\b", r.mount.error_of(boxes))) == 3
    refused(errno.ENOENT, write_once, boxes / "config:ab", b"{}")
    write_once(boxes / "config:abc", b'{"to":"abc"}')
    os.setxattr(boxes / "config", "user.forkfs.token", b"abcd")
    assert os.getxattr(boxes / "config", "user.forkfs.token") == b"abcd"
    write_once(boxes / "config", b'{"to":"abcd"}')
    refused(errno.EINVAL, os.setxattr, boxes / "config", "user.forkfs.token", b"x" * 129)
    refused(errno.EINVAL, os.setxattr, boxes / "config", "user.forkfs.token", b" ")
    os.removexattr(boxes / "config", "user.forkfs.token")
    refused(errno.ENODATA, os.getxattr, boxes / "config", "user.forkfs.token")
    child = r.guest.child("child", f / "memory.bin", f / "vmstate")
    child.go()
    said = {took(child, "config")[1]}
    start = child.console.mark()
    while len(said) < 2:
        said |= {m.group(1) for _, m in child.console.all(r"^mailbox config took .*: (.*)$")}
        if len(said) < 2:
            child.console.wait(r"^mailbox config took|^tick", timeout=60, start=start)
            start = child.console.mark()
    assert said == {'{"to":"abc"}', '{"to":"abcd"}'}


def test_in_flight(case):
    """A fork of a branch whose capture goes on: found and read as when it is complete."""
    r = guest(case, "config,s3cret", "load-me,t")
    rig.request(r.sandbox / "ctl", branch={"name": "slow", "max_rate": 1 << 20})
    branch = r.sandbox / "branches/slow"
    assert rig.state(branch) == "writing"
    f = fork(branch, "c1")
    (f / "mailboxes/config").write_text('{"early":1}')
    child = r.guest.child("child", f / "memory.bin", f / "vmstate")
    child.go()
    assert took(child, "config")[1] == '{"early":1}'


def test_two_writers(case):
    """Writers of one mailbox at once: what is there afterwards is whole, and one of theirs."""
    r = guest(case, "config,s3cret")
    f = fork(settled(r), "c1")
    box = f / "mailboxes/config"
    texts = [b'{"writer":%d,"filler":"' % i + bytes([97 + i]) * 3000 + b'"}' for i in range(2)]
    wrong = []

    def write(text):
        for _ in range(60):
            fd = os.open(box, os.O_WRONLY | os.O_TRUNC)
            for at in range(0, len(text), 1000):
                os.write(fd, text[at:at + 1000])
            os.close(fd)
            if box.read_bytes() not in texts:
                wrong.append(box.read_bytes())

    writers = [threading.Thread(target=write, args=(t,)) for t in texts]
    for w in writers:
        w.start()
    for w in writers:
        w.join()
    assert not wrong and box.read_bytes() in texts
    (at,) = json.loads((f / "status").read_text())["overlay_pages"]
    with open(f / "memory.bin", "rb") as m:
        m.seek(at + LENGTH)
        (length,) = struct.unpack("<I", m.read(4))
        assert m.read(length) == box.read_bytes()


def test_ctl(case):
    """All payloads of a request, or none; the bytes of each as they stand in it."""
    r = guest(case, "config,s3cret", "other,tok")
    branch = settled(r)
    ctl = r.sandbox / "ctl"

    def ask(text):
        fd = os.open(ctl, os.O_RDWR)
        try:
            os.write(fd, text)
            return json.loads(os.read(fd, 1 << 16))
        finally:
            os.close(fd)

    said = ask(b'{"fork":{"name":"c1","branch":"b1","mailboxes":[{"name":"config","token":"s3cret","payload": ' + BIG
               + b' ,"wait_for_ack":true},{"payload":{"z":1,"a":2},"name":"other:tok"}]}}\n')
    assert [m["name"] for m in said["fork"]["mailboxes"]] == ["config", "other"]
    assert said["fork"]["mailboxes"][0]["ack_timeout_ms"] == 5000
    f = branch / "forks/c1"
    assert (f / "mailboxes/config").read_bytes() == BIG
    assert (f / "mailboxes/other").read_bytes() == b'{"z":1,"a":2}'
    good = '{"name":"config","payload":{}}'
    for code, boxes in ((errno.ENOENT, f'{good},{{"name":"absent","payload":{{}}}}'), (errno.EINVAL, f"{good},{good}"),
                        (errno.EINVAL, f'{good},{{"name":"other","payload":[]}}'), (errno.EINVAL, '{"name":"config"}'),
                        (errno.EINVAL, '{"name":"config:s3cret","payload":{}},' + good),
                        (errno.EINVAL, '{"name":"config","payload":{},"ack_timeout_ms":-1}'),
                        (errno.EINVAL, '{"name":"config","payload":{},"ack_timeout_ms":30001}'),
                        (errno.EINVAL, '{"name":"config","payload":{},"token":" "}'),
                        (errno.EINVAL, '{"name":" config","token":"s3cret","payload":{}}'),
                        (errno.ENOENT, '{"name":"config","token":"s3cre","payload":{}}'),
                        (errno.EFBIG, '{"name":"config","payload":{"a":"' + "x" * 3825 + '"}}'),
                        (errno.E2BIG, ",".join(f'{{"name":"n{i}","payload":{{}}}}' for i in range(17))),
                        (errno.ENOENT, ",".join(f'{{"name":"n{i}","payload":{{}}}}' for i in range(16)))):
        refused(code, ask, f'{{"fork":{{"branch":"b1","name":"c2","mailboxes":[{boxes}]}}}}'.encode())
    assert os.listdir(branch / "forks") == ["c1"]
    refused(errno.EEXIST, ask, b'{"fork":{"branch":"b1","name":"c1"}}')
    refused(errno.ENOENT, ask, b'{"fork":{"branch":"b2","name":"c1"}}')
    ask(b'{"fork":{"branch":"b1","name":"c3","mailboxes":[{"name":"config","payload":{},"ack_timeout_ms":30000}]}}')
    assert sorted(os.listdir(branch / "forks")) == ["c1", "c3"]


def in_memory(path, payload):
    """Is that payload in a fork frame of this memory?"""
    with open(path, "rb") as f:
        while page := f.read(PAGE):
            if page.startswith(b"HYPEMAN_FORK_MAILBOX_V1\0") and page[PAYLOAD:PAYLOAD + len(payload)] == payload:
                return True
    return False


def test_now(case):
    """A payload written into the sandbox's mailboxes is in the branch that the same session reads next, and in no other."""
    r = guest(case, "config,s3cret", "other,tok")
    box, snap = r.sandbox / "mailboxes", case.dir / "snap"
    snap.mkdir()
    stops = r.guest.stops()
    assert sorted(os.listdir(box)) == ["config", "other"] and box.joinpath("config").read_bytes() == b""
    refused(errno.ENOENT, write_once, box / "nobody", b"{}")
    refused(errno.EINVAL, write_once, box / "config", b"[]")
    assert r.guest.stops() == stops, "looking, or what was refused, has stopped the guest"
    case.shell(f"""
        echo '{{"task":7}}' > {box}/config || exit 1
        echo '{{"task":8}}' > {box}/other || exit 1
        [ "$(cat {box}/config)" = '{{"task":7}}' ] || exit 2
        cp -r {r.sandbox}/branch {snap}/one || exit 3
        cp {r.sandbox}/branch/memory.bin {snap}/plain || exit 4
        echo '{{"task":9}}' > {box}/config || exit 5
        rm {box}/config || exit 6
        ! rm {box}/config || exit 7
        cp {r.sandbox}/branch/memory.bin {snap}/taken-back""")
    assert in_memory(snap / "one/memory.bin", b'{"task":7}') and in_memory(snap / "one/memory.bin", b'{"task":8}')
    for name in ("plain", "taken-back"):
        for payload in (b'{"task":7}', b'{"task":8}', b'{"task":9}'):
            assert not in_memory(snap / name, payload), f"{payload} is in {name}"
    child = r.guest.child("child", snap / "one/memory.bin", snap / "one/vmstate")
    child.go()
    assert took(child, "config")[1] == '{"task":7}' and took(child, "other")[1] == '{"task":8}'
    assert not r.guest.console.all("took")


def test_sessions(case):
    """Two sessions, two workers of one session, branch@KEY: nobody gets another's payload, and none is lost in silence."""
    r = guest(case, "config,s3cret")
    box, snap = r.sandbox / "mailboxes/config", case.dir / "snap"
    snap.mkdir()
    workers = [case.start("setsid", "bash", "-c", f"""
        for i in 1 2 3; do
            echo '{{"worker":{w},"round":'$i'}}' > {box} || exit 1
            cp {r.sandbox}/branch/memory.bin {snap}/{w}.$i || exit 2
        done""") for w in range(2)]
    for w in workers:
        assert w.wait(timeout=90) == 0
    for w in range(2):
        for i in (1, 2, 3):
            assert in_memory(snap / f"{w}.{i}", b'{"worker":%d,"round":%d}' % (w, i)), (w, i)
    # one session: what another process has staged and nobody has read
    case.shell(f"""
        bash -c "echo '{{}}' > {box}; true"
        bash -c "echo '{{\\"b\\":1}}' > {box}" 2>/dev/null && exit 1
        cp {r.sandbox}/branch@KEY/memory.bin {snap}/key || exit 2
        rm {box} && echo '{{"b":2}}' > {box} && cp {r.sandbox}/branch/memory.bin {snap}/b || exit 3""")
    assert not in_memory(snap / "key", b"{}") and in_memory(snap / "b", b'{"b":2}')


def test_never_torn(case):
    """A payload whose snapshot ended before it was read is told of, once."""
    r = guest(case, "config,s3cret", options="lease=1")
    box = r.sandbox / "mailboxes/config"
    case.shell(f"""
        bash -c "echo '{{}}' > {box}" || exit 1
        until grep -q '"generations": *0,*$' {r.sandbox}/status; do sleep 0.1; done
        cat {r.sandbox}/branch/memory.bin > /dev/null && exit 2
        cat {r.sandbox}/branch/memory.bin > /dev/null || exit 3""")


def test_command(case):
    """forkfs fork and forkfs rm: payloads byte for byte, whatever the file or the token; bad usage is 2, a refusal 1."""
    r = guest(case, "config,s3=c{r", "other,tok")
    branch = settled(r)
    file = case.dir / "payload"
    file.write_bytes(BIG + b"\n")
    r.mount.run("fork", "sbx1/b1", "c1", "--mailbox", f"config:s3=c{{r=@{file}", "--mailbox", 'other={"z":1, "a":2}', "--ack", "0")
    f = branch / "forks/c1"
    assert (f / "mailboxes/config").read_bytes() == BIG
    assert (f / "mailboxes/other").read_bytes() == b'{"z":1, "a":2}'
    said = json.loads(r.mount.run("fork", "sbx1/b1", "c2", "--json").out)
    assert said["name"] == "c2" and said["mailboxes"] == []
    for code, args in ((2, ["c3", "--mailbox", "config"]), (2, ["c3", "--mailbox", "config=7"]), (2, ["c3", "--mailbox", "config={"]),
                       (2, ["c3", "--ack", "30001"]), (2, ["c3", "--ack", "-1"]), (2, ["c 3"]), (1, ["c1"]),
                       (1, ["c3", "--mailbox", "nobody={}"]), (1, ["c3", "--mailbox", f"config=@{case.dir}/absent"])):
        done = r.mount.run("fork", "sbx1/b1", *args, check=False)
        assert done.code == code, (args, done)
    r.mount.run("rm", "sbx1/b1/c1", "sbx1/b1/c2")
    assert os.listdir(branch / "forks") == []
    assert r.mount.run("rm", "sbx1/b1/c1", check=False).code == 1


def test_killed(case):
    """A daemon killed between write and close, or at the close: the guest runs, and no payload is half there."""
    r = guest(case, "config,s3cret")
    box = fork(settled(r), "c1") / "mailboxes/config"
    for point in ("fs-mailbox-write", "fs-mailbox-flush"):
        r.mount.faults(f"{point} kill")
        try:
            write_once(box, b'{"lost":1}')
        except OSError as e:
            assert e.errno in (errno.ENOTCONN, errno.ECONNABORTED), e
        else:
            raise AssertionError("the daemon was not killed")
        r.mount.clear_dead()
        r.guest.check_runs()
        r.mount = case.mount(name=point)
        r.sandbox = r.mount.attach(r.guest)
        box = fork(settled(r), "c1") / "mailboxes/config"
        assert box.read_bytes() == b""
        write_once(box, b'{"again":1}')
        assert box.read_bytes() == b'{"again":1}'


def test_writing_while_branching(case):
    """Forks of ready branches are written while branches are taken and removed: each fork has its own payload, whole."""
    r = guest(case, "config,s3cret")
    stop, wrong = threading.Event(), []

    def branches():
        n = 0
        while not stop.is_set():
            n += 1
            try:
                rig.wait_settled(r.branch(f"t{n}"))
                (r.sandbox / "branches" / f"t{n}").rmdir()
            except OSError as e:
                wrong.append(f"branch {n}: {e}")

    base = settled(r)
    taker = threading.Thread(target=branches)
    taker.start()
    try:
        for i in range(30):
            f = fork(base, f"c{i}")
            write_once(f / "mailboxes/config", b'{"n":%d}\n' % i)
            (at,) = json.loads((f / "status").read_text())["overlay_pages"]
            with open(f / "memory.bin", "rb") as m:
                m.seek(at + PAYLOAD)
                if m.read(20).rstrip(b"\0") != b'{"n":%d}' % i:
                    wrong.append(f"fork {i}")
    finally:
        stop.set()
        taker.join()
    assert not wrong, wrong
    r.guest.check_runs()
