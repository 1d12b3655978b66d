"""Spreads, depth and imbalance of an hour of order books: Arrow tables in, Arrow tables out.

    frames, books
               the hour's frames in order, how long each level stood
    best       the best of each side after every frame
    ladder     what rests at and near the best, at the end of each second or wherever else
    spreads, depth, imbalance
               the three datasets, with their formulas
    replay     the books of an archived hour after every event, or whole at chosen instants
    columns    integers and floats to columns of the one schema

No I/O here, but that `replay` reads an archived hour; no database, no Dagster. Everything is computed in
columns: no loop per event. YES bids and NO bids are the two sides of one book: a NO bid at p is a YES
ask at 1 - p, counted once.
"""
