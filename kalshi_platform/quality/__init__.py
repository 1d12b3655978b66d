"""Whether the recording is right: continuity, parity of the stores, proof, crossed books."""
