"""Prompts, what they ask for, and their token ids."""
