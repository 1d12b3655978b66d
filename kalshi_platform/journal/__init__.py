"""The append-only log of frames: format, reader, writer. It knows bytes only."""
