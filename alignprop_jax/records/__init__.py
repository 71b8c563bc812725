"""What a run writes: its folder, metrics, pictures, curves and weights."""
