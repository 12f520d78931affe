"""Tests of the evidence pack: each detector beside a server that leaks on purpose."""
