"""An exchange of one's own: the demo, and a test double that speaks the real wire."""
