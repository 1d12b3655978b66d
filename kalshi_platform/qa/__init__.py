"""Quality sweeps that a person or a cron job runs from the command line."""
