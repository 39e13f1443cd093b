"""Units: what the small machine's bytes stand for on the GPU that the demo imagines."""

from __future__ import annotations

from dataclasses import dataclass

MODEL = "llama-3.1-8b"
# The replayed engines keep 1/512 of the model's bytes, so that it all fits a laptop.
SCALE = 512

_GIB = 1 << 30


@dataclass(frozen=True)
class Units:
    token_bytes: int  # of a token in the scaled pool
    block_tokens: int

    def gib(self, scaled_bytes: float) -> float:
        """GiB of the unscaled model."""
        return scaled_bytes * SCALE / _GIB

    def bytes_of(self, tokens: int) -> int:
        return tokens * self.token_bytes

    def whole_blocks(self, tokens: float) -> int:
        """The bytes of as many whole blocks as `tokens` fill."""
        return self.bytes_of(int(tokens // self.block_tokens) * self.block_tokens)
