"""What the figures were taken on, how much memory is left, and the busy loops that load it."""

import contextlib
import datetime
import os
import pathlib
import resource
import shutil
import subprocess
import tempfile
import time
import uuid

from forkfs_test import case as case_module
from forkfs_test import guest, processes

GIB = 1 << 30
MARGIN = 2 * GIB


class ToolError(Exception):
    """A command that was measured failed."""


def tool():
    """The benchmarks' own program."""
    return os.path.join(os.environ["FORKFS_BUILD"], "bench", "bench-tool")


def tool_numbers(*arguments, **options):
    """The numbers that bench-tool prints."""
    done = subprocess.run([tool(), *[str(a) for a in arguments]], stdin=subprocess.DEVNULL, capture_output=True, text=True,
                          check=False, **options)
    if done.returncode != 0:
        raise ToolError(f"bench-tool {arguments[0]}: {done.stderr.strip()}")
    return [int(n) for n in done.stdout.split()]


def timed(*command, **options):
    """Nanoseconds that a command takes, from its start to its end. It has a session of its own, as a user's shell is one."""
    done = subprocess.run([tool(), "run", *[str(c) for c in command]], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                          stderr=subprocess.PIPE, text=True, check=False, start_new_session=True, **options)
    lines = done.stderr.strip().splitlines()
    if done.returncode != 0 or len(lines) != 1:
        raise ToolError(f"{' '.join(str(c) for c in command)}: exit status {done.returncode}: {done.stderr.strip()}")
    return int(lines[0])


def available():
    """Bytes of memory that can still be used."""
    for line in pathlib.Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("/proc/meminfo has no MemAvailable")


def enough_memory(record, what, need):
    """True when `need` bytes can be spent; otherwise it is noted."""
    have = available()
    if have >= need + MARGIN:
        return True
    record.note(f"{what} left out: it needs {need / GIB:.1f} GiB and {MARGIN / GIB:.0f} to spare, "
                f"{have / GIB:.1f} are available")
    return False


def describe():
    """The machine in a dictionary."""
    def first_line(*command):
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.split("\n")[0]

    model = [line.split(":", 1)[1].strip() for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines()
             if line.startswith("model name")]
    commit = first_line("git", "-C", str(pathlib.Path(__file__).resolve().parents[3]), "describe", "--always", "--dirty")
    ns, size = tool_numbers("memcpy", GIB, 2)
    return {"date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"), "cpus": os.cpu_count(),
            "cpu": model[0] if model else "?", "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * 4096 / GIB, 1),
            "kernel": os.uname().release, "qemu": first_line("qemu-system-x86_64", "--version"),
            "accelerator": "TCG" if "tcg,thread=multi" in guest.accelerator() else "KVM",
            "forkfs": first_line(os.environ["FORKFS_BIN"], "--version"), "source": commit or "?",
            "memcpy_two_threads_gbs": round(size / ns, 2), "load_average": os.getloadavg()[0]}


def at_work(vm):
    """Wait until each program of a guest is at work: its memory is then present."""
    for program in vm.run:
        said = vm.console.wait(rf"^{program.split(',')[0]} [1-9]|^ended:|Out of memory", timeout=120)
        assert said.string.startswith(program.split(",")[0]), f"{program}: the guest says {said.string}"


def busy_seconds():
    """CPU seconds that the machine has worked since it started."""
    with open("/proc/stat", encoding="ascii") as f:
        user, nice, system, _, _, irq, softirq = [int(n) for n in f.readline().split()[1:8]]
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def own_seconds(case_id):
    """CPU seconds of this process, of what it started and has ended, and of the living processes of a case."""
    total = sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    for pid in processes.marked(case_id):
        fields = processes.stat_fields(pid)
        total += sum(int(n) for n in fields[11:15]) / os.sysconf("SC_CLK_TCK") if fields else 0
    return total


@contextlib.contextmanager
def bench_case(record, bench, name):
    """A Case of the tests' kit: its VMs, mounts, processes and files are gone at the end. On tmpfs.

    What others used of the machine's CPU time meanwhile is a sample of it: it says how far the figures can be trusted.
    """
    os.environ[processes.MARKER] = uuid.uuid4().hex
    case = case_module.Case(tempfile.mkdtemp(prefix="forkfs-bench-", dir="/dev/shm"), False)
    start, busy, own = time.monotonic(), busy_seconds(), own_seconds(case.id)
    try:
        yield case
        spent = (busy_seconds() - busy) - (own_seconds(case.id) - own)
        record.add(bench, name, "host", 0,
                   others_percent=max(0, 100 * spent / (time.monotonic() - start) / os.cpu_count()))
    except BaseException:
        for log in case.dir.glob("*.log"):
            print(f"--- {log.name}", *log.read_text(errors="replace").splitlines()[-10:], sep="\n")
        raise
    finally:
        wrong = case.end()
        shutil.rmtree(case.dir, ignore_errors=True)
        if wrong:
            print("left behind:", *wrong, sep="\n  ")


@contextlib.contextmanager
def busy_loops(count):
    """So many processes that keep a CPU busy."""
    loops = [subprocess.Popen([tool(), "spin"], stdin=subprocess.DEVNULL) for _ in range(count)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()
