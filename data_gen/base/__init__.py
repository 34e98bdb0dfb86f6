"""What every command of data_gen uses: flags, errors, files, a guess at a text's language."""
