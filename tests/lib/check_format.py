#!/usr/bin/env python3
"""Check that every C file is what clang-format 14 (Debian 12's) makes of it: other versions make other lines.

Usage: check_format.py SOURCE_ROOT. Names the files that differ and fails if there are any; exit status 77 without that clang-format.
"""

import pathlib
import re
import shutil
import subprocess
import sys

MAJOR = 14


def formatter():
    """The clang-format of that version, or None."""
    for name in (f"clang-format-{MAJOR}", "clang-format"):
        path = shutil.which(name)
        said = subprocess.run([path, "--version"], capture_output=True, text=True, check=True).stdout if path else ""
        if re.search(rf"version {MAJOR}\.", said):
            return path
    return None


def main():
    """Run the check; the exit status."""
    root = pathlib.Path(sys.argv[1])
    tool = formatter()
    if not tool:
        print(f"SKIP: no clang-format {MAJOR}: apt-get install clang-format-{MAJOR}")
        return 77
    files = sorted(p for top in ("bench", "engine", "examples", "fs", "tests", "tools") for e in ("c", "h") for p in (root / top).rglob(f"*.{e}"))
    wrong = [str(p.relative_to(root)) for p in files
             if subprocess.run([tool, "--style=file", str(p)], capture_output=True, check=True).stdout != p.read_bytes()]
    for name in wrong:
        print(f"{name} is not formatted: {tool} -i {name}")
    print(f"{len(files)} files, {len(wrong)} to be formatted")
    return 1 if wrong or not files else 0


if __name__ == "__main__":
    sys.exit(main())
