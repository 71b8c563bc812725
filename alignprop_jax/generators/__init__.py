"""The models that can be tuned, a folder each, behind the protocol of `core.generator`."""
