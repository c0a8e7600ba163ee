"""Circuits: what modules are wired to, with scores that intervention checks."""
