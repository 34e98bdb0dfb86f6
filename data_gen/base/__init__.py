"""What every command of data_gen stands on: flags, errors, files, a guess at a text's language."""
