"""The door: PID 1, HTTP, dialects, privacy."""
