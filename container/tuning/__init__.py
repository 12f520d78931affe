"""Adapters made from the customer's data."""
