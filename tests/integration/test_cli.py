"""The command `forkfs`: what people type, what they are told, and the exit codes scripts rely on."""

import json
import os
import pathlib
import pty
import select
import shutil
import signal
import socket
import subprocess
import threading
import time

from forkfs_test import processes

COMPLETION = pathlib.Path(__file__).resolve().parents[2] / "tools" / "completion" / "forkfs.bash"

# What a newcomer gets wrong: the words, and a part of the sentence. None of them reaches a mount.
WRONG_USAGE = [
    ([], "usage:"),
    (["--bogus"], "--bogus"),
    (["frobnicate"], "frobnicate"),
    (["knife", "a/b", "c"], "no command"),
    (["fork", "a/b"], "FORK"),
    (["fork", "a/b", "c", "--each", "-"], "--each"),
    (["fork", "a/b", "--each", "-", "--mailbox", "m={}"], "--each"),
    (["fork", "a/b", "--each", "-"], "names no fork"),
    (["ls", "--bogus"], "--bogus"),
    (["ls", "a", "b"], "one name"),
    (["status", "a/b/c"], "too many parts"),
    (["mount"], "directory"),
    (["mount", "/tmp", "-o", "no-such-option"], "no-such-option"),
    (["umount"], "directory"),
    (["attach"], "NAME"),
    (["attach", "x"], "--qemu"),
    (["attach", "x", "--pid", "1", "--qemu", "/s"], "only one of"),
    (["attach", "x", "--pid", "one"], "process id"),
    (["attach", "x", "--pid"], "needs a value"),
    (["attach", "x/y", "--pid", "1"], "sandbox"),
    (["attach", ".x", "--pid", "1"], ".x"),
    (["attach", "x", "--pid", "1", "--owner", "1"], "UID:GID"),
    (["attach", "x", "--firecracker", "/s", "--coop", "/t"], "only one"),
    (["branch", "x"], "BRANCH"),
    (["branch", "x", "a/b"], "a/b"),
    (["branch", "x", "b", "--live", "--diff"], "exclude"),
    (["branch", "x", "b", "--diff", "--no-wait"], "--live only"),
    (["branch", "x", "b", "--full", "--max-rate", "1M"], "--live only"),
    (["branch", "x", "b", "--max-rate", "fast"], "fast"),
    (["branch", "x", "b", "--store", "tape"], "tape"),
    (["wait"], "NAME/BRANCH"),
    (["wait", "x"], "NAME/BRANCH"),
    (["rm", "x/b", "x"], "NAME/BRANCH"),
    (["restore", "x"], "NAME/BRANCH"),
    (["restore"], "NAME/BRANCH"),
    (["restore", "x/b/c", "x/b"], "NAME/BRANCH/FORK each"),
    (["restore", "x/b/c", "x/b/d", "x/b/c"], "c is named twice"),
    (["restore", "x/b/c", "y/b/d"], "two branches"),
    (["restore", "x/b", "y/b", "--forks", "-"], "one NAME/BRANCH"),
    (["restore", "x/b", "--forks", "-"], "names no fork"),
    (["restore", "x/b/c", "x/b/d", "-n", "4000"], "too many"),
    (["restore", "x/b", "-n", "0"], "-n is a number"),
    (["restore", "x/b", "-n", "many"], "many"),
    (["restore", "x/b", "--attach", "a", "--paused"], "exclude"),
    (["restore", "x/b", "--track"], "--attach"),
    (["verify"], "NAME/BRANCH"),
    (["export", "x/b"], "FILE"),
    (["import", "f", "x"], "NAME/BRANCH"),
    (["import", "f", "x/b", "--store", "tape"], "tape"),
    (["inspect"], "one branch"),
    (["convert", "x/b"], "--to"),
    (["convert", "x/b", "--to", "memory"], "memory"),
    (["help", "nothing"], "nothing"),
    (["version", "x"], "arguments"),
    (["doctor", "x"], "names"),
]


def test_usage(case):
    """Wrong usage ends with 2 and says which word; help goes to stdout and ends with 0."""
    for words, part in WRONG_USAGE:
        result = case.run(case.forkfs(), *words, check=False)
        assert result.code == 2, f"forkfs {words}: {result.code} {result.err}"
        assert part in result.err and not result.out, f"forkfs {words}: {result.err}"
    listed = case.run(case.forkfs(), "help").out
    for command in ("mount", "umount", "attach", "detach", "ls", "status", "branch", "wait", "rm", "restore", "verify",
                    "export", "import", "convert", "inspect", "doctor"):
        assert f"  {command} " in listed
        assert case.run(case.forkfs(), command, "--help").out.startswith(f"usage: forkfs {command} ")
    assert case.run(case.forkfs(), "version").out.startswith("forkfs ")
    full = subprocess.run([case.forkfs(), "help"], stdin=subprocess.DEVNULL, stdout=open("/dev/full", "w"), stderr=subprocess.PIPE,
                          check=False)
    assert full.returncode == 1 and b"output" in full.stderr


def test_no_mount(case):
    """Without a mount the sentence says how to get one."""
    for given in (case.dir / "nowhere", case.dir):
        result = case.run(case.forkfs(), "ls", "--mount", given, check=False)
        assert result.code == 1 and f"forkfs mount {given}" in result.err, result.err
    environment = dict(os.environ, FORKFS=str(case.dir))
    assert str(case.dir) in case.run(case.forkfs(), "ls", check=False, env=environment).err


def test_doctor(case):
    """On a machine that runs these tests nothing fails, and every test it names was done."""
    answer = json.loads(case.run(case.forkfs(), "doctor", "--json").out)
    assert answer["ok"]
    said = {}
    for check in answer["checks"]:
        said.setdefault(check["name"], []).append(check)
        assert check["result"] in ("ok", "info", "warn"), check
        assert check["text"]
        assert check["remedy"] or check["result"] != "warn" or check["name"] == "KVM", check
    for name in ("kernel", "userfaultfd", "write protection", "FUSE", "passthrough", "write safety", "KVM", "KSM",
                 "hugetlb pool", "ptrace scope", "userfaultfd rights", "locked memory", "open files", "mappings", "memory"):
        assert name in said, f"no line for {name}"
    kinds = " ".join(check["text"] for check in said["write protection"])
    for kind in ("shared memfd page", "shared memfd, never touched page", "anonymous page", "anonymous, never touched page"):
        assert kind in kinds, kinds
    lines = case.run(case.forkfs(), "doctor").out.splitlines()
    assert sum(1 for line in lines if line[:4].strip() in ("ok", "info", "warn", "FAIL")) == len(answer["checks"])
    assert not any("forkfs-doctor" in line for line in open("/proc/mounts"))


def mount_in_background(case, directory, *options):
    """`forkfs mount` as a user does; the daemon is ended with the test."""
    result = case.run(case.forkfs(), "mount", directory, *options)
    case.on_end(lambda: processes.unmount_all(str(directory)))
    return result


def daemon_pid(directory):
    """The process that serves a mount."""
    return json.loads((directory / ".forkfs" / "capabilities").read_text())["pid"]


def test_mount_refusals(case):
    """A directory that is not fit is refused by a sentence, and nothing is mounted."""
    full, file, empty = case.dir / "full", case.dir / "file", case.dir / "empty"
    full.mkdir()
    (full / "something").write_text("")
    file.write_text("")
    empty.mkdir()
    for directory, part in ((case.dir / "none", "mkdir"), (full, "something"), (file, "no directory"), ("/proc", "proc")):
        result = case.run(case.forkfs(), "mount", directory, check=False)
        assert result.code == 1 and part in result.err, f"{directory}: {result.err}"
    mount_in_background(case, empty)
    result = case.run(case.forkfs(), "mount", empty, check=False)
    assert result.code == 1 and f"forkfs umount {empty}" in result.err, result.err
    pid = daemon_pid(empty)
    case.run(case.forkfs(), "umount", empty)
    assert not processes.alive(pid), "umount returned before the daemon had ended"
    result = case.run(case.forkfs(), "umount", empty, check=False)
    assert result.code == 1 and "no forkfs" in result.err, result.err


def test_mount_on_dead_mount(case):
    """What a killed daemon left is detached by the next mount."""
    directory = case.dir / "m"
    directory.mkdir()
    mount_in_background(case, directory)
    pid = daemon_pid(directory)
    os.kill(pid, signal.SIGKILL)
    assert processes.wait_gone(pid, 10)
    result = case.run(case.forkfs(), "ls", "--mount", directory, check=False)
    assert result.code == 1 and "daemon" in result.err and "gone" in result.err, result.err
    mount_in_background(case, directory)
    assert len(processes.mounts_under(str(directory))) == 1
    assert case.run(case.forkfs(), "ls", "--mount", directory).code == 0
    os.kill(daemon_pid(directory), signal.SIGKILL)
    case.run(case.forkfs(), "umount", directory)  # a dead one too
    assert not processes.mounts_under(str(directory))


def test_umount_busy(case):
    """A mount in use is left alone; the one who uses it is named."""
    directory = case.dir / "m"
    directory.mkdir()
    mount_in_background(case, directory)
    user = case.start("sleep", "60", cwd=directory)
    result = case.run(case.forkfs(), "umount", directory, check=False)
    assert result.code == 1 and f"sleep ({user.pid})" in result.err, result.err
    assert (directory / ".forkfs" / "version").exists()
    user.kill()
    user.wait()
    case.run(case.forkfs(), "umount", directory)


def test_umount_held_in_passing(case):
    """Who holds the mount in passing is waited for: it cannot be named, for a descriptor in a message is no process's."""
    directory = case.dir / "m"
    directory.mkdir()
    mount_in_background(case, directory)

    def hold():
        ours, theirs = socket.socketpair()
        held = os.open(directory, os.O_PATH)
        socket.send_fds(ours, [b"x"], [held])
        os.close(held)
        return ours, theirs

    def let_go(pair):
        for end in pair:
            end.close()

    pair = hold()
    result = case.run(case.forkfs(), "umount", directory, check=False)
    assert result.code == 1 and "processes that you may not see" in result.err, result.err
    let_go(pair)
    timer = threading.Timer(0.2, let_go, [hold()])
    timer.start()
    case.run(case.forkfs(), "umount", directory)
    timer.join()


def test_mount_helper(case):
    """mount(8) and fstab's way: mount.fuse.forkfs with the options they add."""
    directory, helper = case.dir / "m", case.dir / "sbin" / "mount.fuse.forkfs"
    directory.mkdir()
    helper.parent.mkdir()
    shutil.copy(case.forkfs(), helper)
    for words, code in ((["none"], 1), (["none", directory, "-o", "no-such-option"], 1), (["none", directory, "-N", "x"], 1),
                        (["none", "/proc"], 32), (["none", directory, "-f"], 0)):
        result = case.run(helper, *words, check=False)
        assert result.code == code, f"{words}: {result.code} {result.err}"
    case.run(helper, "none", directory, "-n", "-s", "-v", "-o", "rw,nosuid,nodev,noauto,_netdev,nofail,x-systemd.automount,branch-rate=5")
    case.run(case.forkfs(), "umount", directory)

    # mount(8) itself, with the helper where it looks for it, in a mount namespace of its own
    fstab = case.dir / "fstab"
    fstab.write_text(f"none {directory} fuse.forkfs noauto,x-y.z,branch-rate=7 0 0\n")
    case.run("unshare", "-m", "bash", "-ec", f"""
        umount_bin=$(command -v umount)
        mount --bind {helper.parent} /usr/sbin
        mount -t fuse.forkfs none {directory} -o rw,allow_other,nosuid
        test -e {directory}/.forkfs/version
        grep -q '{directory} fuse.forkfs' /proc/self/mounts
        {case.forkfs()} umount {directory}
        mount -T {fstab} {directory}
        test -e {directory}/.forkfs/version
        $umount_bin {directory}""", timeout=60)


def test_life_of_a_branch(case):
    """attach, ls, branch, status, wait, rm, detach: the whole round, as people and as scripts see it."""
    guest = case.guest().booted()
    mount = case.mount()
    assert len(mount.run("ls").out.splitlines()) == 1
    assert json.loads(mount.run("ls", "--json").out) == []

    # a relative socket, from the user's directory
    said = mount.run("attach", "sbx1", "--qemu", "qmp", cwd=guest.dir).out
    assert "qemu" in said and str(guest.pid) in said, said
    assert "running" in mount.run("ls").out
    status = json.loads(mount.run("status", "sbx1", "--json").out)
    assert status["pid"] == guest.pid and status["vmm"] == "qemu" and status["vmm_version"], status
    assert status["resets_vsock"] is False, status
    again = mount.run("attach", "sbx1", "--qemu", guest.qmp_path, check=False)
    assert again.code == 1 and "sbx1" in again.err, again.err
    assert guest.stops() == 0

    result = mount.run("branch", "sbx1", "b1")
    assert "paused for" in result.out and not result.err, (result.out, result.err)
    assert guest.stops() == 1
    status = json.loads(mount.run("branch", "sbx1", "b2", "--json").out)
    assert status["state"] == "ready" and status["pause_ns"] > 0, status
    result = mount.run("branch", "sbx1", "b1", check=False)
    assert result.code == 1 and "b1" in result.err, result.err
    assert guest.stops() == 2

    mount.run("branch", "sbx1", "b3", "--no-wait")
    mount.run("wait", "sbx1/b1", "sbx1/b3")
    assert [b["name"] for b in json.loads(mount.run("ls", "sbx1", "--json").out)] == ["b1", "b2", "b3"]
    assert all(b["state"] == "ready" for b in json.loads(mount.run("ls", "sbx1", "--json").out))
    assert "\npause: " in mount.run("status", "sbx1/b3").out
    everything = json.loads(mount.run("status", "--json").out)
    assert everything["sandboxes"][0]["name"] == "sbx1" and everything["capabilities"]["pid"] == mount.pid

    # several at once: the failure is named, the rest is done
    result = mount.run("rm", "sbx1/b1", "sbx1/none", "sbx1/b2", check=False)
    assert result.code == 1 and "'none'" in result.err and "b3" in result.err, result.err
    assert [b["name"] for b in json.loads(mount.run("ls", "sbx1", "--json").out)] == ["b3"]
    result = mount.run("wait", "sbx1/b1", check=False)
    assert result.code == 1 and "b1" in result.err, result.err

    for words in (["branch", "nobody", "b"], ["detach", "nobody"], ["ls", "nobody"], ["status", "nobody/b"], ["rm", "nobody/b"]):
        result = mount.run(*words, check=False)
        assert result.code == 1 and "sbx1" in result.err, result.err
    mount.run("detach", "sbx1")
    guest.check_runs()
    assert guest.protected() == 0
    assert guest.stops() == 3


def test_listing_takes_no_branch(case):
    """ls, status and the shell's completion never stop the VM."""
    guest = case.guest().booted()
    mount = case.mount()
    mount.attach(guest)
    mount.run("branch", "sbx1", "b1")
    before = guest.stops()
    for words in (["ls"], ["ls", "sbx1"], ["status"], ["status", "sbx1"], ["status", "sbx1/b1"], ["ls", "--json"]):
        mount.run(*words)
    script = f"""
        source {COMPLETION}
        compopt() {{ :; }}
        complete_line() {{
            COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=()
            _forkfs forkfs "${{COMP_WORDS[COMP_CWORD]}}" "${{COMP_WORDS[COMP_CWORD - 1]}}"
            echo "${{COMPREPLY[*]}}"
        }}
        export FORKFS={mount.path}
        complete_line forkfs ls ''
        complete_line forkfs rm sbx
        complete_line forkfs rm sbx1/"""
    assert case.shell(script).out.split() == ["sbx1", "sbx1/", "sbx1/b1"]
    assert guest.stops() == before


def test_attach_refusals(case):
    """What cannot be attached is refused by a sentence that names it; the daemon goes on."""
    mount = case.mount()
    sleeper = case.start("sleep", "60")
    gone = case.start("true")
    gone.wait()
    for words, part in ((["--pid", str(sleeper.pid)], "sleep"), (["--pid", str(gone.pid)], str(gone.pid)),
                        (["--qemu", "no-such-socket"], f"{case.dir}/no-such-socket")):
        result = mount.run("attach", "x", *words, check=False, cwd=case.dir)
        assert result.code == 1 and part in result.err, (words, result.err)
    assert json.loads(mount.run("ls", "--json").out) == []


def test_attach_by_pid(case):
    """--pid finds the socket in the VMM's command line."""
    guest = case.guest().booted()
    mount = case.mount()
    mount.run("attach", "sbx1", "--pid", str(guest.pid), "--track", "--owner", "root:root:rw")
    assert json.loads(mount.run("status", "sbx1", "--json").out)["tracking"] is True
    mount.run("branch", "sbx1", "b1")


def read_terminal(fd, until, timeout=20):
    """What comes from a terminal until the condition holds or it is closed."""
    text, deadline = b"", time.monotonic() + timeout
    while not until(text) and time.monotonic() < deadline:
        if not select.select([fd], [], [], 0.1)[0]:
            continue
        try:
            more = os.read(fd, 4096)
        except OSError:
            break
        if not more:
            break
        text += more
    return text.decode(errors="replace")


def test_waiting_on_a_terminal(case):
    """A bar while a capture is held back; Ctrl-C ends the waiting and not the branch."""
    guest = case.guest().booted()
    mount = case.mount()
    mount.attach(guest)
    hold = case.dir / "hold"
    mount.faults(f"settle hold:{hold}")
    main, other = pty.openpty()
    waiting = case.start(mount.binary, "branch", "sbx1", "b1", "--mount", mount.path, stdout=other, stderr=other, stdin=other,
                         start_new_session=True)
    os.close(other)
    text = read_terminal(main, lambda t: b"%" in t)
    assert "sbx1/b1 [" in text and "%" in text, text
    waiting.send_signal(signal.SIGINT)  # the copy is held: nothing else ends the wait
    assert waiting.wait(timeout=30) == -signal.SIGINT
    assert "goes on" in read_terminal(main, lambda t: b"goes on" in t)
    os.close(main)
    assert json.loads(mount.run("status", "sbx1/b1", "--json").out)["state"] == "writing"

    # on a pipe: nothing until the end, and a signal ends a plain `wait` too
    quiet = case.start(mount.binary, "wait", "sbx1/b1", "--mount", mount.path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert not select.select([quiet.stdout], [], [], 0.5)[0]
    quiet.send_signal(signal.SIGTERM)
    assert quiet.wait(timeout=30) == -signal.SIGTERM
    quiet.stdout.close()
    hold.write_text("")
    mount.faults()
    assert mount.run("wait", "sbx1/b1").out == ""
    assert json.loads(mount.run("status", "sbx1/b1", "--json").out)["state"] == "ready"


def test_bars_to_the_store(case):
    """On a terminal the bar goes on when the capture is complete and the branch is on its way to the store; so has a conversion one."""
    guest = case.guest().booted()
    mount = case.mount(options=f"store={case.dir}/store")
    mount.attach(guest)
    for number, (point, words, shown) in enumerate((("store-vmstate", ("branch", "sbx1", "b1"), b"to the store"),
                                                    ("store-sync", ("convert", "sbx1/b1", "--to", "packed"), b"sbx1/b1 "))):
        hold = case.dir / f"hold{number}"
        mount.faults(f"{point} hold:{hold}")
        main, other = pty.openpty()
        waiting = case.start(mount.binary, *words, "--mount", mount.path, stdout=other, stderr=other, stdin=other)
        os.close(other)
        text = read_terminal(main, lambda t, part=shown: b"100 %" in t and part in t)
        assert shown.decode() in text and "100 %" in text, text
        hold.touch()
        assert waiting.wait(timeout=30) == 0
        os.close(main)
    mount.faults()
    assert json.loads(mount.run("status", "sbx1/b1", "--json").out)["store"] == "packed"
