"""The shipped kernels as the compiler makes them: launches, machine code, and the rules that the code must keep."""
