"""Everything that knows Dagster: assets, checks, sensors, schedules, jobs, resources."""
