"""Strings to token ids and back; text from outside never becomes a control token."""
