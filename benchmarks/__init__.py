"""Benchmarks: ``python -m benchmarks.bench_NAME [--quick] [--threads N] [--output PATH]``."""
