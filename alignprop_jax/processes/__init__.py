"""Formulas of one step of a process, and of its probability; no networks."""
