"""Methods side by side: the same rewards, budget and noise, over several seeds."""
