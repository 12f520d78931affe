"""Triton's kernels on a CPU: interpreted (tests/conftest.py), and compiled for a device that is not there."""
