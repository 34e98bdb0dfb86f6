"""What a GPU does with the kernels: cases, peers, checks against fp64, clocks and plots."""
