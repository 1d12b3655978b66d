"""Exporters: a market of the archive in the files that a backtesting engine reads itself.

    hftbacktest       event arrays (.npz) for each market and day
    nautilus          NautilusTrader's ParquetDataCatalog
    levels            what both are made of: changes of one book in YES terms
    sidecar           a JSON file beside them: gaps, terms, fees, result

Both write one book in YES terms. From where a book is stale it is cleared until its next snapshot.
"""
