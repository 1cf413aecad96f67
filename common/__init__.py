"""What every package may use: errors in one line, complete files, values of flags, processes."""
