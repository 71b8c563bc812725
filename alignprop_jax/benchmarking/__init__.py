"""This package and its peer at the same work, each in processes of its own."""
