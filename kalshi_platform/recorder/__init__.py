"""One shard's recording process: streamer, capture, market selection, trade backfill, background tasks.

Frames are written to the journal before anything acts on them. Decoding the journal into rows belongs in
`loading`, supervising the process in `orchestration`.
"""
