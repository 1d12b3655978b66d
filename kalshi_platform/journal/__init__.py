"""The append-only log of received frames: format, reader, writer, identity and lock.

The room handles bytes and record numbers only. What a frame means belongs in `exchange`; what rows it
becomes belongs in `loading`.
"""
