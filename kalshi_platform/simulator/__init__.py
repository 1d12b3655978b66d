"""A simulated exchange with the real wire protocol, for demonstrations and tests; and the paper market maker."""
