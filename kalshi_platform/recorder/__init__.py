"""Capture and journal: what the exchange sent, kept before anybody acts on it."""
