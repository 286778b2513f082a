"""Mailboxes of the microVM on KVM: a hundred forks of one branch, and what its guest makes of damaged and repeated ones."""

import ctypes
import hashlib
import json
import os
import pathlib
import re

from forkfs_test import children, rig
from forkfs_test.api import ApiRig
from forkfs_test.microvm import MicroVm

MIB = 16
PAGE, CRC, EPOCH, SEQ, PAYLOAD = 4096, 224, 240, 256, 264


def guest(case):
    """A microVM that publishes a mailbox, attached; a settled branch of it."""
    r = ApiRig(case, MicroVm(case, "sbx1", mib=MIB, kind="memfd", mailbox="config,s3cret"))
    branch = r.branch("b1")
    assert rig.wait_settled(branch) == "ready"
    return r, branch


def fork(branch, name, payload):
    """Make a fork; its epoch as hex digits."""
    path = branch / "forks" / name
    path.mkdir()
    (path / "mailboxes/config").write_text(payload + "\n")
    return json.loads((path / "status").read_text())["epoch"].replace("-", "")


def digest(path):
    """Hash of a file's bytes."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_hundred(case):
    """A hundred forks of one branch: each child finds its own payload and epoch and nothing else; branch, source, siblings are as before."""
    r, branch = guest(case)
    before = digest(branch / "memory.bin")
    want = {f"c{i}": f'{{"task":{i},"n":9007199254740993}}' for i in range(100)}
    epochs = {name: fork(branch, name, payload) for name, payload in want.items()}
    assert len(set(epochs.values())) == len(want)
    some = {name: digest(branch / "forks" / name / "memory.bin") for name in ("c0", "c42", "c99")}
    started = {}
    for name, payload in want.items():
        (child,), _ = children.run_micro(r.mount, f"sbx1/b1/{name}")
        assert child.said["fork"] == name, child.said
        assert child.mail() == (epochs[name], payload), (name, child.mails())
        child.status("pause")  # or each would take a CPU
        child.drop()
        started[name] = child
    assert digest(branch / "memory.bin") == before
    for name, was in some.items():
        assert digest(branch / "forks" / name / "memory.bin") == was, name
    for name in ("c99", "c0"):
        started[name].status("resume")
        started[name].visit_all(MIB, 1)
        started[name].status("pause")
    for name, child in started.items():
        assert child.mails() == [(epochs[name], want[name])], (name, child.mails())
        child.check_sane()
        child.drop()
    assert r.guest.mails() == []
    r.guest.check_runs()


def test_one_command(case):
    """A hundred forks of one branch by one command: a child and a line for each, its own payload and sockets, one image; -n of each."""
    r, branch = guest(case)
    before = digest(branch / "memory.bin")
    want = {f"c{i}": f'{{"task":{i},"n":9007199254740993}}' for i in range(100)}
    epochs = {name: fork(branch, name, payload) for name, payload in want.items()}
    targets = [f"sbx1/b1/{name}" for name in want]
    found, result = children.run_micro(r.mount, targets[0], *targets[1:], "--paused")
    assert [c.said["fork"] for c in sorted(found, key=lambda c: c.said["child"])] == list(want)
    assert sorted(c.said["child"] for c in found) == list(range(1, 101)) and not result.err
    assert len({json.dumps(c.said["sockets"]) for c in found}) == len({c.dir for c in found}) == 100
    assert all(c.said["branch"] == "sbx1/b1" and c.said["state"] == "paused" for c in found)
    images = {where for c in found for where in re.findall(r"^\S+ rw-p \S+ (\S+ [1-9]\d*)  .*(?:memfd|memory\.bin)", c.maps(), re.M)}
    if json.loads((r.mount.path / ".forkfs/capabilities").read_text())["passthrough"]:
        assert len(images) == 1, images
    for child in found:
        name = child.said["fork"]
        child.status("resume")
        assert child.mail() == (epochs[name], want[name]), (name, child.mails())
        child.status("pause")  # or each would take a CPU
        child.drop()
    # names from a file, and more than one child of each
    few = case.dir / "few"
    few.write_text("c7\n\nc3\n")
    found, _ = children.run_micro(r.mount, "sbx1/b1", "--forks", few, "-n", "2", "--attach", "web")
    told = sorted((c.said["child"], c.said["fork"], c.said["sandbox"]) for c in found)
    assert told == [(1, "c7", "web-1"), (2, "c7", "web-2"), (3, "c3", "web-3"), (4, "c3", "web-4")], told
    for child in found:
        assert child.mail() == (epochs[child.said["fork"]], want[child.said["fork"]])
        child.visit_all(MIB, 1)
        child.status("pause")
        child.drop()
    with open(few, encoding="ascii") as names:
        found, _ = children.run_micro(r.mount, "sbx1/b1", "--forks", "-", stdin=names)
    assert sorted(c.mail() for c in found) == sorted((epochs[n], want[n]) for n in ("c3", "c7"))
    assert digest(branch / "memory.bin") == before
    r.guest.check_runs()


def test_one_of_many(case):
    """Of several forks each child has what its own fork asks for; one that fails is ended and named by its fork, the others stay."""
    r, _ = guest(case)
    for name, waits in (("a", True), ("b", False), ("c", True)):
        rig.request(r.sandbox / "ctl", fork={"branch": "b1", "name": name, "mailboxes": [
            {"name": "config", "payload": {"task": name}, "wait_for_ack": waits, "ack_timeout_ms": 20000}]})
    targets = [f"sbx1/b1/{name}" for name in "abc"]
    found, _ = children.run_micro(r.mount, *targets)
    acks = {c.said["fork"]: [a["state"] for a in c.said.get("acks", [])] for c in found}
    assert acks == {"a": ["applied"], "b": [], "c": ["applied"]}, acks
    for child in found:
        assert json.loads(child.mail()[1])["task"] == child.said["fork"]
        child.stop()
    # whom nobody waits for hears so in a note of its own
    found, _ = children.run_micro(r.mount, *targets, "--paused")
    notes = {c.said["fork"]: [n for n in c.said.get("notes", []) if "ACK" in n] for c in found}
    assert not notes["b"] and len(notes["a"]) == len(notes["c"]) == 1 and "fork a" in notes["a"][0], notes
    for child in found:
        child.stop()
    vmm = case.dir / "vmm"
    vmm.write_text(f'#!/bin/sh\ncase "$*" in *--nth=2) echo no luck >&2; exit 3 ;; esac\nexec {case.tool("../microvm/microvm")} "$@"\n')
    vmm.chmod(0o755)
    found, result = children.run(r.mount, *targets, "--vmm", vmm, kind=children.MicroChild, vmm=[*children.MICRO, "--nth={number}"], check=False)
    assert result.code == 1 and "child 2, of fork b: " in result.err and "no luck" in result.err, result.err
    assert {c.said["fork"]: json.loads(c.mail()[1])["task"] for c in found} == {"a": "a", "c": "c"}
    assert len(children.vms(case)) == 2, children.vms(case)


def test_many_refused(case):
    """What is not several forks of one branch is refused before anything is started, with the word that is wrong."""
    r, branch = guest(case)
    for name in ("a", "b"):
        fork(branch, name, '{"task":1}')
    other = r.branch("b2")
    assert rig.wait_settled(other) == "ready"
    fork(other, "a", '{"task":1}')
    names = case.dir / "names"

    def refused(code, part, *words, text=""):
        names.write_text(text)
        found, result = children.run_micro(r.mount, *words, check=False)
        assert not found and result.code == code and part in result.err, (words, result)
        children.nothing_left(case)

    refused(1, "has no fork 'nobody'", "sbx1/b1/a", "sbx1/b1/nobody")
    refused(1, "has no fork 'nobody'", "sbx1/b1", "--forks", names, text="a\nnobody\n")
    refused(2, "two branches", "sbx1/b1/a", "sbx1/b2/a")
    refused(2, "NAME/BRANCH/FORK each", "sbx1/b1/a", "sbx1/b1")
    refused(2, "fork a is named twice", "sbx1/b1/a", "sbx1/b1/b", "sbx1/b1/a")
    refused(2, "fork b is named twice", "sbx1/b1", "--forks", names, text="b\na\nb")
    refused(2, "line 2", "sbx1/b1", "--forks", names, text="a\n../b\n")
    refused(2, "names no fork", "sbx1/b1", "--forks", names, text="\n")
    refused(2, "goes with one NAME/BRANCH", "sbx1/b1", "sbx1/b2", "--forks", names, text="a\n")
    refused(2, "too many parts", "sbx1/b1/a", "--forks", names, text="a\n")
    refused(1, "can't be read", "sbx1/b1", "--forks", case.dir / "nowhere")
    refused(2, "are too many", "sbx1/b1/a", "sbx1/b1/b", "-n", "2049")


def test_made_by_one_command(case):
    """`forkfs fork --each`: a fork for each line with its payload byte for byte, all checked before the first is made."""
    r, branch = guest(case)
    payloads = {f"c{i}": f'{{"z":{i}, "n":9007199254740993,"a":"x y"}}' for i in range(50)}
    text = "".join(f"{name} config:s3cret={payload}\n" for name, payload in payloads.items()) + "\nbare\n"
    names = case.dir / "names"

    def fork_each(text, *options, check=True):
        names.write_text(text)
        with open(names, encoding="ascii") as given:
            return r.mount.run("fork", "sbx1/b1", "--each", "-", *options, stdin=given, check=check)

    made = [json.loads(line) for line in fork_each(text, "--json").out.splitlines()]
    assert len({m["epoch"] for m in made}) == len(made) == 51
    assert [[m["name"] for m in one["mailboxes"]] for one in made] == [["config"]] * 50 + [[]]
    for name, payload in payloads.items():
        assert (branch / "forks" / name / "mailboxes/config").read_text() == payload, name
    assert not os.listdir(branch / "forks/bare/mailboxes") or not (branch / "forks/bare/mailboxes/config").read_text()
    by_epoch = {m["epoch"].replace("-", ""): payload for m, payload in zip(made, payloads.values())}
    found, _ = children.run_micro(r.mount, *[f"sbx1/b1/{name}" for name in ("c7", "c8", "c49")])
    for child in found:
        epoch, payload = child.mail()
        assert by_epoch[epoch] == payload == payloads[child.said["fork"]]
        child.stop()
    for text, code, part in (("n1 config={}\nn2 config={\n", 2, "line 2"), ("n1\nn2\nn1\n", 2, "line 3"), ("n1\n.n2\n", 2, "line 2"), ("\n", 2, "no fork"),
                             (f"n1 config=@{names}.not\n", 1, "line 1")):
        result = fork_each(text, check=False)
        assert result.code == code and part in result.err and not result.out, (text, result)
        assert not (branch / "forks/n1").exists(), text
    # whom the guest has no mailbox for is seen when it is made: those before it stay, with their lines
    result = fork_each("n1 config={}\nn2 nobody={}\nn3 config={}\n", check=False)
    assert result.code == 1 and "fork n2: " in result.err and result.out.startswith("sbx1/b1/n1: epoch "), result
    assert (branch / "forks/n1").exists() and not (branch / "forks/n2").exists() and not (branch / "forks/n3").exists()
    r.guest.check_runs()


def resident(pid):
    """KiB of a process that are in memory."""
    return int(re.search(r"^Rss:\s+(\d+) kB", pathlib.Path(f"/proc/{pid}/smaps_rollup").read_text(), re.M).group(1))


def test_found_running(case):
    """Mailboxes of a running VM are found in every kind of memory, and pages that nobody has touched stay so."""
    mount = case.mount()
    for kind in ("memfd", "anonymous", "thp"):
        vm = MicroVm(case, kind, mib=MIB, kind=kind, mailbox="config,s3cret").booted()
        vm.status("pause")  # what grows then, we have made grow
        sandbox = mount.attach(vm)
        before = resident(vm.pid)
        assert os.listdir(sandbox / "mailboxes") == ["config"], kind
        assert resident(vm.pid) == before, kind
        vm.status("resume")
        branch = sandbox / "branches/b1"
        branch.mkdir()
        assert rig.wait_settled(branch) == "ready"
    # a child has most of its memory in a file only, and the pages of its fork beside it
    fork(branch, "c1", '{"task":1}')
    (child,), _ = children.run_micro(mount, f"{kind}/b1/c1", "--attach", "child")
    assert child.mail()[1] == '{"task":1}'
    child.status("pause")
    before = child.maps().count("\n"), resident(child.pid)
    assert os.listdir(mount.path / "child/mailboxes") == ["config"]
    assert (child.maps().count("\n"), resident(child.pid)) == before
    # a frame that the guest has taken back is not there any more
    vm.status("pause")
    hva = vm.status()["hva"]
    with open(f"/proc/{vm.pid}/mem", "rb+", buffering=0) as memory:
        for page in range(0, MIB << 20, PAGE):
            memory.seek(hva + page)
            if memory.read(8) == b"HYPEMAN_":
                memory.seek(hva + page)
                memory.write(b"x")
    assert os.listdir(mount.path / f"{kind}/mailboxes") == []


class Iovec(ctypes.Structure):
    """struct iovec"""

    _fields_ = [("base", ctypes.c_void_p), ("len", ctypes.c_size_t)]


def write_memory(pid, at, data):
    """What the VMM's process writes is caught as what it writes itself is."""
    libc = ctypes.CDLL(None, use_errno=True)
    local = Iovec(ctypes.cast(ctypes.create_string_buffer(data, len(data)), ctypes.c_void_p), len(data))
    done = libc.process_vm_writev(pid, ctypes.byref(local), 1, ctypes.byref(Iovec(at, len(data))), 1, 0)
    assert done == len(data), os.strerror(ctypes.get_errno())


def test_found_in_flight(case):
    """A branch in flight is searched as it was at its instant, whatever was written since, and is not captured by that."""
    mib = 64
    mount = case.mount()
    for kind in ("memfd", "anonymous"):
        vm = MicroVm(case, kind, mib=mib, kind=kind, work=4, fill=1, mailbox="config,s3cret").booted()
        sandbox, hva = mount.attach(vm), vm.status()["hva"]
        with open(f"/proc/{vm.pid}/mem", "rb", buffering=0) as memory:
            memory.seek(hva)
            whole = memory.read(mib << 20)
        at = whole.index(b"HYPEMAN_FORK_MAILBOX_V1\0config\0")
        spare = [(mib - 20 + i << 20) + i * PAGE for i in range(4)]  # filled, and never looked at by the guest
        write_memory(vm.pid, hva + spare[0], whole[at:at + PAGE].replace(b"config\0", b"second\0"))
        rig.request(sandbox / "ctl", branch={"name": "slow", "max_rate": 1 << 20})
        branch = sandbox / "branches/slow"
        # afterwards the one goes, and others come
        write_memory(vm.pid, hva + spare[0], bytes(PAGE))
        for i in (1, 2):
            write_memory(vm.pid, hva + spare[i], whole[at:at + PAGE])
        write_memory(vm.pid, hva + spare[3], whole[at:at + PAGE].replace(b"config\0", b"third\0"))
        (branch / "forks/c").mkdir()
        assert sorted(os.listdir(branch / "forks/c/mailboxes")) == ["config", "second"], kind
        said = json.loads((branch / "status").read_text())
        assert said["state"] == "writing" and said["captured_bytes"] < mib << 19, said
        (branch / "forks/c/mailboxes/second").write_text('{"task":2}')
        running = os.listdir(sandbox / "mailboxes")
        assert "third" in running and "second" not in running, running
        branch.rmdir()
        vm.check_runs()


def test_acknowledges(case):
    """The guest acknowledges in its page what wants that, and nothing else; a child of the child does so again."""
    r, branch = guest(case)
    target = r.sandbox
    for n in range(2):
        rig.request(target / "ctl", fork={"branch": "b1", "name": "c", "mailboxes": [
            {"name": "config", "payload": {"generation": n}, "wait_for_ack": True}]})
        (child,), _ = children.run_micro(r.mount, f"{target.name}/b1/c", "--attach", f"g{n}")
        (ack,) = child.said["acks"]
        assert (ack["mailbox"], ack["state"]) == ("config", "applied"), child.said
        assert not sum(child.said["acks_ignored"].values()), child.said
        assert f'"generation": {n}}}' in child.mail()[1]
        target = r.mount.path / f"g{n}"
        branch = target / "branches/b1"
        branch.mkdir()
        assert rig.wait_settled(branch) == "ready"
    fork(branch, "plain", '{"generation":2}')
    (child,), _ = children.run_micro(r.mount, f"{target.name}/b1/plain")
    assert child.mail()[1] == '{"generation":2}' and "acks" not in child.said


def test_generations(case):
    """A fork's child takes a payload of its own fork: each generation its own, and its parent's never again."""
    r, branch = guest(case)
    epoch = fork(branch, "c0", '{"generation":0}')
    target, says = "sbx1/b1/c0", (epoch, '{"generation":0}')
    for n in range(1, 4):
        (child,), _ = children.run_micro(r.mount, target, "--attach", f"g{n}")
        assert child.mail() == says
        branch = r.mount.path / f"g{n}/branches/b"
        branch.mkdir()
        assert rig.wait_settled(branch) == "ready"
        assert child.mails() == [says], child.mails()
        child.stop()
        target, says = f"g{n}/b/c", (fork(branch, "c", f'{{"generation":{n}}}'), f'{{"generation":{n}}}')
    (child,), _ = children.run_micro(r.mount, target)
    assert child.mail() == says
    child.visit_all(MIB, 1)
    assert child.mails() == [says], child.mails()


def test_distrusts(case):
    """The guest takes no payload whose checksum is wrong, and notices one that it had before."""
    r, branch = guest(case)
    epoch = fork(branch, "c1", '{"task":1}')
    (at,) = json.loads((branch / "forks/c1/status").read_text())["overlay_pages"]
    (child,), _ = children.run_micro(r.mount, "sbx1/b1/c1")
    assert child.mail() == (epoch, '{"task":1}')
    frame = (branch / "forks/c1/memory.bin").read_bytes()[at:at + PAGE]
    child.status("pause")
    memory = os.open(f"/proc/{child.pid}/mem", os.O_RDWR)
    try:
        hva = child.status()["hva"] + at
        said = [(epoch, '{"task":1}')]
        assert os.pread(memory, 4, hva + SEQ) == bytes(4), "the guest has not freed its mailbox"
        for flip in (None, CRC, CRC + 8, EPOCH, SEQ + 4, PAYLOAD, PAYLOAD + 9):
            again = bytearray(frame)
            if flip is not None:
                again[flip] ^= 1
            os.pwrite(memory, bytes(again), hva)
            child.status("resume")
            said.append(("again", '{"task":1}') if flip is None else ("damaged", ""))
            assert child.mail(len(said)) == said[-1], (flip, child.mails())
            child.status("pause")
        assert child.mails() == said, child.mails()
    finally:
        os.close(memory)
    child.check_sane()
