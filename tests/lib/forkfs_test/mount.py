"""A private mount: the forkfs daemon of a test, in the foreground of the test's own process tree."""

import errno
import os
import pathlib
import select
import signal
import subprocess
import time

from . import processes


class Mount:
    """`forkfs mount` on a directory of the test. Paths are built with `/`: mount / "sbx1" / "branch"."""

    def __init__(self, case, name="mnt", options="", release=False, binary=None, environment=None, rules=()):
        self.case = case
        self.binary = binary or case.forkfs(release)
        self.path = case.dir / name
        self.path.mkdir(exist_ok=True)
        self.fault_file = case.dir / f"{name}.faults"
        self.faults(*rules)
        self.log_path = case.dir / f"{name}.log"
        if environment is None:
            environment = {"FORKFS_FAULT_FILE": str(self.fault_file)}
        command = [self.binary, "mount", str(self.path), "-f"] + (["-o", options] if options else [])
        with open(self.log_path, "ab") as log:
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                                            env={**os.environ, **environment})
        self.pid = self.process.pid
        case.on_end(self.stop)
        self._wait_mounted()

    def _wait_mounted(self, timeout=20):
        deadline = time.monotonic() + timeout
        with open("/proc/self/mounts") as mounts:
            changed = select.poll()
            changed.register(mounts, select.POLLERR | select.POLLPRI)
            while str(self.path) not in processes.mounts_under(str(self.path)):
                if self.process.poll() is not None or time.monotonic() > deadline:
                    raise AssertionError(f"forkfs mount did not work: {self.log()}")
                changed.poll(100)
        os.stat(self.path)

    def __truediv__(self, part):
        return self.path / part

    def log(self):
        """What the daemon has said."""
        return self.log_path.read_text(errors="replace")

    def faults(self, *rules):
        """Put these rules, and no others, in force in a daemon built with fault points."""
        fresh = pathlib.Path(f"{self.fault_file}.new")
        fresh.write_text("".join(r + "\n" for r in rules))
        fresh.rename(self.fault_file)

    def run(self, *args, **options):
        """A forkfs command on this mount, see Case.run."""
        return self.case.run(self.binary, args[0], "--mount", str(self.path), *args[1:], **options)

    def attach(self, guest, name=None, *options):
        """Attach to a guest's VM; the sandbox's directory."""
        name = name or guest.name
        socket = getattr(guest, "attach_options", None) or ["--qemu", guest.qmp_path]
        self.run("attach", name, *socket, *options)
        return self.path / name

    def error_of(self, path):
        """The sentence in user.forkfs.error, empty when there is none."""
        try:
            return os.getxattr(path, "user.forkfs.error").decode()
        except OSError as e:
            if e.errno in (errno.ENODATA, errno.ENOENT):
                return ""
            raise

    def helpers(self):
        """The daemon's helper processes."""
        return [p for p in processes.marked(self.case.id)
                if int((processes.stat_fields(p) or [0, 0])[1]) == self.pid]

    def kill(self, number=signal.SIGKILL):
        """Send a signal to the daemon, if it still lives."""
        if self.process.poll() is None:
            os.kill(self.pid, number)

    def clear_dead(self):
        """After the daemon was killed: wait for its end and detach the dead mount."""
        self.process.wait(timeout=10)
        processes.unmount_all(str(self.path))

    def stop(self):
        """Unmount as a user does; the daemon and its helpers must have ended afterwards."""
        if self.process.poll() is None:
            helpers = self.helpers()
            os.kill(self.pid, signal.SIGCONT)
            done = subprocess.run([self.binary, "umount", str(self.path)], stdin=subprocess.DEVNULL,
                                  capture_output=True, text=True, timeout=30, check=False)
            if done.returncode != 0:
                raise AssertionError(f"forkfs umount: {done.stderr.strip()}")
            if not processes.wait_gone(self.pid, 10):
                raise AssertionError(f"the daemon did not end after umount:\n{processes.stacks(self.pid)}")
            left = [processes.describe(p) for p in helpers if not processes.wait_gone(p, 5)]
            assert not left, f"helpers left after umount: {left}"
        code = self.process.wait()
        assert code in (0, -signal.SIGKILL, -signal.SIGSEGV, -signal.SIGABRT), f"the daemon ended with {code}: {self.log()[-2000:]}"
