"""What the compiler makes of the kernels that ship: launches, machine code, and the rules it must keep."""
