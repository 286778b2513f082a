"""One test: its directory, what it started, and that nothing of it is left."""

import os
import pathlib
import shutil
import subprocess
import time

from . import processes
from .guest import Guest
from .mount import Mount


class Skip(Exception):
    """This machine cannot run the test; the text says why."""


class Missing(Skip):
    """The test wants a program that no machine has to have; the text says how to get it."""


class Result:
    """What a command did."""

    def __init__(self, code, out, err, seconds):
        self.code, self.out, self.err, self.seconds = code, out, err, seconds


# A report of a sanitizer is the test's failure, whichever process of it made it, and whatever that does with its stderr.
SANITIZERS = ("ASAN_OPTIONS", "TSAN_OPTIONS", "UBSAN_OPTIONS")


def keep_reports(directory):
    """Let programs that were built with a sanitizer write their reports to files of this directory."""
    for name in SANITIZERS:
        given = os.environ.get(name)
        os.environ[name] = f"{given + ':' if given else ''}log_path={directory}/sanitizer:log_exe_name=1:print_stacktrace=1"


class Case:
    """What a test is given. All that is made through it is gone after `end`."""

    def __init__(self, directory, long):
        self.dir = pathlib.Path(directory)
        self.id = os.environ[processes.MARKER]
        self.long = long
        self._ends = []
        # what a killed daemon leaves for the next one is the test's, and goes with its directory
        os.environ["RUNTIME_DIRECTORY"] = str(self.dir / "run")
        keep_reports(self.dir)

    def on_end(self, function):
        """Call it at the end of the test, what was registered last first."""
        self._ends.append(function)

    def forkfs(self, release=False):
        """The forkfs binary: the build with fault points, or the release build."""
        return os.environ["FORKFS_RELEASE_BIN" if release else "FORKFS_BIN"]

    def tool(self, name):
        """A helper program of tests/lib."""
        return os.path.join(os.environ["FORKFS_BUILD"], "tests", "lib", name)

    def guest(self, name="sbx1", **options):
        """Boot a VM, see guest.Guest."""
        return Guest(self, name, **options)

    def mount(self, name="mnt", **options):
        """Mount forkfs, see mount.Mount."""
        return Mount(self, name, **options)

    def run(self, *command, check=True, timeout=60, **options):
        """Run a command to its end; a Result. A failure is the test's, unless check=False."""
        start = time.monotonic()
        options.setdefault("stdin", subprocess.DEVNULL)
        done = subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=timeout, check=False,
                              **options)
        result = Result(done.returncode, done.stdout, done.stderr, time.monotonic() - start)
        if check and result.code != 0:
            said = (result.err or result.out).strip()
            raise AssertionError(f"{' '.join(str(c) for c in command)}: exit status {result.code}: {said}")
        return result

    def start(self, *command, **options):
        """Start a command that is ended with the test at the latest; the Popen."""
        options.setdefault("stdin", subprocess.DEVNULL)
        process = subprocess.Popen([str(c) for c in command], **options)
        self.on_end(lambda: (process.kill(), process.wait()))
        return process

    def shell(self, script, timeout=60, check=True):
        """Run a bash script in a session of its own, as a user's terminal is one."""
        return self.run("bash", "-c", script, start_new_session=True, timeout=timeout, check=check, cwd=self.dir)

    def end(self):
        """Undo everything; a list of what went wrong or was left."""
        wrong = []
        while self._ends:
            function = self._ends.pop()
            try:
                function()
            except (AssertionError, OSError, subprocess.SubprocessError) as e:
                wrong.append(f"at the end: {e}")
        deadline = time.monotonic() + 10
        while processes.marked(self.id) and time.monotonic() < deadline:
            time.sleep(0.02)
        left = processes.marked(self.id)
        wrong += [f"a process is left: {processes.describe(p)}" for p in left]
        wrong += [f"a process cannot be ended: {processes.describe(p)}" for p in processes.kill(left)]
        wrong += [f"a mount is left: {m}" for m in processes.unmount_all(str(self.dir))]
        wrong += [f"{path.name}: {path.read_text(errors='replace')[:6000]}" for path in sorted(self.dir.glob("sanitizer.*"))]
        return wrong

    def remove(self):
        """Remove the directory, with all logs."""
        shutil.rmtree(self.dir)
