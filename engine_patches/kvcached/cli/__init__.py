"""What operators and their tools use: kvctl, kvtop, and the 24-byte view."""
