"""Native code, each operator beside a plain reference."""
