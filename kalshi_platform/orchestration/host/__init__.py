"""Dagster's host: its home folder, the code server, the webserver, the daemon, and the processes of runs."""
