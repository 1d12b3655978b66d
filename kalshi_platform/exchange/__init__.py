"""The exchange's wire: signing, REST, frames, decoders, order book, channels, session, WebSocket.

Session, channels and book have no I/O: frames in, commands and notes out. Storing frames belongs in
`journal`, running a connection in `recorder`.
"""
