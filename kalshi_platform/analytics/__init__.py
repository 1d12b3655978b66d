"""Spreads, depth and imbalance of an hour of order books: Arrow tables in, Arrow tables out.

    books      the hour's frames in order, how long each level stood, the best of each side
    ladder     what rests at and near the best, at the end of each second
    spreads, depth, imbalance
               the three datasets, with their formulas
    columns    integers and floats to columns of the one schema

No I/O here, no database, no Dagster. Everything is computed in columns: no loop per event. YES bids
and NO bids are the two sides of one book: a NO bid at p is a YES ask at 1 - p, counted once.
"""
