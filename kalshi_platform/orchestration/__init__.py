"""Dagster only: assets, checks, sensors, schedules, jobs, resources."""
