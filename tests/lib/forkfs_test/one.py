"""Run one test function in this process: python3 -m forkfs_test.one FILE FUNCTION DIRECTORY [long].

Exit status 0: passed; 77: skipped, the reason in the last line; 78: skipped for want of something optional; 1: failed. Started by runner.py in a session of its own.
"""

import importlib.util
import os
import pathlib
import sys
import traceback

from . import case as case_module
from . import processes

SKIPPED = 77
OPTIONAL = 78


def load(path):
    """A test file as a module."""
    spec = importlib.util.spec_from_file_location(pathlib.Path(path).stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def show_logs(directory):
    """The ends of the logs of a failed test."""
    for path in sorted([*directory.glob("*.log"), *directory.glob("vm-*/console"), *directory.glob("vm-*/stderr")]):
        text = path.read_text(errors="replace").splitlines()[-25:]
        if text:
            print(f"--- {path.relative_to(directory)}", *text, sep="\n")


def main():
    path, function, directory = sys.argv[1:4]
    case = case_module.Case(directory, "long" in sys.argv[4:])
    status = 0
    try:
        getattr(load(path), function)(case)
    except case_module.Missing as e:
        status, why = OPTIONAL, str(e)
    except case_module.Skip as e:
        status, why = SKIPPED, str(e)
    except BaseException:  # whatever it is: the daemon's stacks and the clean-up must come
        status = 1
        traceback.print_exc(file=sys.stdout)
        for pid in processes.marked(case.id):
            if processes.is_daemon(pid):
                print(f"--- stacks of the daemon {pid}", processes.stacks(pid), sep="\n")
    wrong = case.end()
    if status == 1:
        show_logs(case.dir)
    if wrong:
        status = 1
        print(*wrong, sep="\n")
    case.remove()
    if status in (SKIPPED, OPTIONAL):
        print(why)
    sys.stdout.flush()
    os._exit(status)  # reader threads of consoles may still sit in a read


if __name__ == "__main__":
    main()
