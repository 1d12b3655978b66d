"""The wire: signing, frames, REST, and the session and book core without I/O."""
