"""The market maker's inventory: what the positions mean, the engine's recorder, the audit."""
