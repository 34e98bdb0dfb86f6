"""The base of all other packages: errors, flags, the terminal, files, devices, the host's memory."""
