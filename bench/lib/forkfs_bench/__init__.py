"""The benchmarks of forkfs: see bench/run.sh and docs/bench.md. Python's standard library and tests/lib only."""
