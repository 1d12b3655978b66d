"""Audits that a person or a cron job runs from the command line; the checks are in `inventory`."""
