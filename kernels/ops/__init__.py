"""The ops of a training step. One file holds one op, from its formula to its public function."""
