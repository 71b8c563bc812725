"""What turns samples and their rewards into an update of the LoRA factors."""
