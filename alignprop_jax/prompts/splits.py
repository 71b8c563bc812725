"""The two lists of prompts that a run has."""

TRAIN, UNSEEN = "train", "unseen"
