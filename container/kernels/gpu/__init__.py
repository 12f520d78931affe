"""Operators for accelerators in Triton, each beside a plain reference; importing a kernel needs Triton."""
