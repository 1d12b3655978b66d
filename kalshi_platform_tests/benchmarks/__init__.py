"""What the README states in figures, measured: each module is one benchmark."""
