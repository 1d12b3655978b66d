"""The platform's health: reports, verdicts, alerts, metrics and growth. Imports no Dagster."""
