"""Journal ranges to rows to stores; sealing hours."""
