"""The multi-model front door."""
