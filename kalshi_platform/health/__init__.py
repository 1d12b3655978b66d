"""Telling people and machines how the platform is: alerts, metrics, growth. Knows no Dagster."""
