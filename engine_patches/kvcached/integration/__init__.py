"""What engines call, one folder an engine."""
