"""What the commands of kernels, engine and the scripts share."""
