#!/bin/bash
# Where the programs are is where the test runs.
exec python3 -B tests/integration/on_demand_test.py
