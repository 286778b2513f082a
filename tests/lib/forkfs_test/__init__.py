"""What the integration tests of forkfs are written with. Python's standard library only.

A test is a function `test_*(case)` in tests/integration/test_*.py; `case` is a `case.Case`: a private directory, guests,
mounts and commands that are all gone when the function returns, however it returns. See tests/README.md.
"""
