"""KV cache memory that engines on one GPU share, lent to them by a kvbrokerd.

Importing this is cheap: no torch, no native code, no environment variable.
"""

__version__ = "0.1.0"
