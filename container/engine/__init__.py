"""Tokens in, tokens out: scheduling, KV bookkeeping, prefix cache. Standard library only."""
