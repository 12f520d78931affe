"""Serving from a sealed package: what PID 1 holds, what the engine opens, what the front is given."""
