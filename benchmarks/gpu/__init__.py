"""The steps of `benchmarks/gpu_check.py`, a file for each group."""
