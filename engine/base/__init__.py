"""What every other package stands on: errors, flags, the terminal, files, devices, the host's memory."""
