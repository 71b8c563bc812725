"""Methods side by side: what `compare` runs, and what it makes of it."""
