"""The ops of a training step: one op, one file, from its formula to its public function."""
