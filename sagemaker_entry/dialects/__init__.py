"""Protocols without I/O: body bytes to a generation request, outcomes to reply bytes."""
