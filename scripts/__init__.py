"""Verbs a person types, and the little they share. Composes the rooms; holds no logic of theirs."""
