"""Models from folders, files and the hub, in the layouts that people publish them in."""
