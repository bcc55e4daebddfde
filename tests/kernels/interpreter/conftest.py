"""Collected only where Triton's interpreter is on: ``tests/kernels/test_triton_interpreter.py`` starts it."""

import os

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["test_*.py"]
