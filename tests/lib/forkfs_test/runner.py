"""Run unit and integration tests one after the other and count: python3 -m forkfs_test.runner, called by tests/run.sh.

Each integration test runs in a session, a directory and a time limit of its own. After the limit the stacks of its daemon are
dumped and everything that belongs to it is killed.
"""

import argparse
import ast
import concurrent.futures
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid

from . import probe, processes
from .one import OPTIONAL, SKIPPED

TESTS = pathlib.Path(__file__).resolve().parents[2]
TIMEOUT = 120
# Test directories hold images of guest memory: on tmpfs when there is room for them.
ROOM = 6 << 30

printing = threading.Lock()
running = {}  # the directories of the tests that run now, by their ids


class Outcome:
    """The result of one test: passed, failed or skipped, and why."""

    def __init__(self, name, result, why="", seconds=0.0, output="", optional=False):
        self.optional = optional  # skipped for want of what no machine has to have
        self.name, self.result, self.why, self.seconds, self.output = name, result, why, seconds, output

    def show(self):
        """Print it as one line, and its output when it failed."""
        word = {"passed": "ok  ", "failed": "FAIL", "skipped": "SKIP:"}[self.result]
        with printing:
            if self.output and self.result == "failed":
                print(self.output.rstrip())
            print(f"{word} {self.name} ({self.seconds:.1f} s){': ' + self.why if self.why else ''}", flush=True)


def integration_tests():
    """Every test of tests/integration as (name, file, function, seconds, seconds with --long).

    A file says TIMEOUT = {"test_x": seconds, …} for what takes longer than usual, LONG_TIMEOUT for --long.
    """
    found = []
    for path in sorted((TESTS / "integration").glob("test_*.py")):
        limits = {"TIMEOUT": {}, "LONG_TIMEOUT": {}}
        functions = []
        for node in ast.parse(path.read_text(), str(path)).body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                functions.append(node.name)
            if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") in limits:
                limits[node.targets[0].id] = ast.literal_eval(node.value)
        for function in functions:
            limit = limits["TIMEOUT"].get(function, TIMEOUT)
            found.append((f"{path.stem[5:]}.{function[5:]}", path, function, limit,
                          limits["LONG_TIMEOUT"].get(function, limit)))
    return found


def test_directory(test_id):
    """A new private directory."""
    base = tempfile.gettempdir()
    if os.access("/dev/shm", os.W_OK) and shutil.disk_usage("/dev/shm").free > ROOM:
        base = "/dev/shm"
    return tempfile.mkdtemp(prefix=f"forkfs-test-{test_id[:8]}-", dir=base)


def clear_away(test_id, directory):
    """Kill and remove everything of a test that did not end by itself; the stacks of its daemons."""
    pids = processes.marked(test_id)
    text = "".join(f"--- stacks of {processes.describe(p)}\n{processes.stacks(p)}" for p in pids
                   if processes.is_daemon(p))
    daemons = [p for p in pids if processes.is_daemon(p)]
    left = processes.kill(daemons) + processes.kill(processes.marked(test_id))
    processes.unmount_all(directory)
    text += "".join(f"cannot be killed: {processes.describe(p)}\n" for p in left)
    shutil.rmtree(directory, ignore_errors=True)
    return text


def end_at_once(number, _frame):
    """Ctrl-C or SIGTERM: nothing of the tests that run now may be left."""
    for test_id, directory in list(running.items()):
        clear_away(test_id, directory)
    os._exit(128 + number)


def run_integration(test, long):
    """Run one integration test in a process of its own."""
    name, path, function, limit, long_limit = test
    if long:
        limit = long_limit
    test_id = uuid.uuid4().hex
    directory = test_directory(test_id)
    environment = dict(os.environ, PYTHONPATH=str(TESTS / "lib"), PYTHONDONTWRITEBYTECODE="1")
    environment[processes.MARKER] = test_id
    command = [sys.executable, "-m", "forkfs_test.one", str(path), function, directory] + (["long"] if long else [])
    start = time.monotonic()
    running[test_id] = directory
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment,
                                   start_new_session=True)
        try:
            status = process.wait(timeout=limit)
            more = ""
        except subprocess.TimeoutExpired:
            status = None
            more = clear_away(test_id, directory)
            process.wait()
        output.seek(0)
        text = output.read() + more
    del running[test_id]
    seconds = time.monotonic() - start
    last = text.strip().rsplit("\n", 1)[-1]
    if status == 0:
        return Outcome(name, "passed", seconds=seconds)
    if status in (SKIPPED, OPTIONAL):
        return Outcome(name, "skipped", last, seconds, optional=status == OPTIONAL)
    if status is None:
        return Outcome(name, "failed", f"timed out after {limit} s", seconds, text)
    if status < 0:
        text += clear_away(test_id, directory)
    return Outcome(name, "failed", f"see above (status {status})", seconds, text)


def unit_names(build):
    """Names of the tests that meson knows."""
    r = subprocess.run(["meson", "introspect", "--tests", build], stdout=subprocess.PIPE, text=True, check=True)
    return [t["name"] for t in json.loads(r.stdout)]


def run_unit(build, name):
    """Run one test of meson's."""
    start = time.monotonic()
    r = subprocess.run(["meson", "test", "--no-rebuild", "-C", build, "--print-errorlogs", name],
                       stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    seconds = time.monotonic() - start
    if r.returncode != 0:
        return Outcome(f"unit.{name}", "failed", f"see above (status {r.returncode})", seconds, r.stdout)
    with open(os.path.join(build, "meson-logs", "testlog.json"), encoding="utf-8") as f:
        results = [json.loads(line) for line in f if line.strip()]
    if any(t["result"] == "SKIP" for t in results):
        return Outcome(f"unit.{name}", "skipped", "the test program says it cannot run here", seconds)
    return Outcome(f"unit.{name}", "passed", seconds=seconds)


def finish(outcomes, complete):
    """Judge and count; the exit status. The failures once more, where they are found, and the last line is the counts."""
    able = not probe.reasons()
    count = {"passed": 0, "failed": 0, "skipped": 0}
    for o in outcomes:
        if o.result == "skipped" and able and not o.optional:
            print(f"FAIL {o.name}: skipped, although this machine can run it: {o.why}")
            o.result = "failed"
        count[o.result] += 1
    if complete:
        minimum = int((TESTS / "minimum.txt").read_text())
        if len(outcomes) < minimum:
            print(f"FAIL: {len(outcomes)} tests ran, tests/minimum.txt says at least {minimum}")
            count["failed"] += 1
    for o in outcomes:
        if o.result == "failed":
            said = [line for line in o.output.splitlines() if line.startswith(("AssertionError", "E  ", "[  ERROR"))]
            print(f"FAIL {o.name}: {o.why}", *said[:5], sep="\n    ")
    print(f"{count['passed']} passed, {count['failed']} failed, {count['skipped']} skipped")
    return 1 if count["failed"] else 0


def main():
    parser = argparse.ArgumentParser(prog="tests/run.sh", description="Build forkfs and run its tests.")
    parser.add_argument("-k", metavar="PATTERN", default="", help="only tests whose name contains PATTERN")
    parser.add_argument("-j", metavar="N", type=int, default=1, help="so many integration tests at once (default 1)")
    parser.add_argument("--list", action="store_true", help="name the tests and end")
    parser.add_argument("--long", action="store_true", help="1,000 branches instead of 100")
    parser.add_argument("--build", required=True, help=argparse.SUPPRESS)
    args = parser.parse_args()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, end_at_once)
    units = [n for n in unit_names(args.build) if args.k in f"unit.{n}"]
    tests = [t for t in integration_tests() if args.k in t[0]]
    if args.list:
        print(*[f"unit.{n}" for n in units], *[t[0] for t in tests], sep="\n")
        return 0
    outcomes = []
    for name in units:
        outcomes.append(run_unit(args.build, name))
        outcomes[-1].show()
    why = probe.reasons()
    if why:
        for test in tests:
            outcomes.append(Outcome(test[0], "skipped", "; ".join(why)))
            outcomes[-1].show()
        return finish(outcomes, not args.k)
    with concurrent.futures.ThreadPoolExecutor(args.j) as pool:
        for done in [pool.submit(run_integration, test, args.long) for test in tests]:
            outcomes.append(done.result())
            outcomes[-1].show()
    return finish(outcomes, not args.k)


if __name__ == "__main__":
    sys.exit(main())
