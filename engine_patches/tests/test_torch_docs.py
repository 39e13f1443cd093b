"""The examples of docs/api/python.md that need torch run."""

from __future__ import annotations

import unittest

import test_docs


class TorchExamples(test_docs.Examples):
    TORCH = True


# Those without torch are another module's.
del test_docs

if __name__ == "__main__":
    unittest.main()
