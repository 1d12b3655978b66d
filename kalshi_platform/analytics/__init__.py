"""Spreads, depth and imbalance of an hour of order books: Arrow tables in, Arrow tables out.

    frames, books
               the hour's frames in order, and the runs of frames over which levels stood
    best       the best of each side after every frame
    ladder     sizes at and near the best price, at the end of each second or at other sampled frames
    spreads, depth, imbalance
               the three datasets, with their formulas
    replay     the books of an archived hour after every event, or whole at chosen instants
    columns    integers and floats to columns of the schema

No I/O except in `replay`, which reads an archived hour, and `hourly`, which also writes the datasets; no
Dagster. Everything is computed in columns: no loop per event. YES bids and NO bids are the two sides of one book: a NO bid at p is a YES
ask at 1 - p, counted once.
"""
