"""Tests of `infra/` against the platform and real engines."""
