"""The command line: parses, calls, prints. What a command does lives in the rooms below."""
