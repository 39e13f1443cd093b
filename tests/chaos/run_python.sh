#!/bin/sh
# So that a Python program is a test.
exec python3 -B "$@"
