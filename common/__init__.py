"""What every room may use: mistakes in one line, files whole or not at all, values of flags, processes."""
