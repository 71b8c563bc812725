"""What a train step costs on a TPU, told by the TPU's compiler on a machine that has none."""
