"""What `infra/` holds is held against the platform and against real engines."""
