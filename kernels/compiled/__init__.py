"""What the compiler makes of the shipped kernels: launches, machine code, and the rules that the code must keep."""
