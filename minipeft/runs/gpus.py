"""GPUs to plan for, by their data sheets: memory, bandwidth, dense FLOP/s; and the share of these that is reached."""

from __future__ import annotations

from dataclasses import dataclass

UTILIZATION = 0.4  # of the peak FLOP/s in training; well-tuned stacks reach 0.3 to 0.5. An assumption
BANDWIDTH_USED = 0.5  # of the peak bandwidth in decoding. An assumption
RESERVED = 1.5e9  # bytes of context, allocator and fragmentation that a plan does not count. An assumption


@dataclass(frozen=True)
class GPU:
    """A GPU's data sheet."""

    memory: float  # bytes
    bandwidth: float  # bytes per second
    bf16: float  # dense FLOP/s with float32 accumulation
    fp32: float  # without TF32, which the trainer does not turn on

    @property
    def room(self) -> float:
        """Bytes that a run may plan with."""
        return self.memory - RESERVED

    def train_seconds(self, flops: float, dtype: str) -> float:
        """Seconds for the FLOPs of training in this dtype ("bfloat16", "float32")."""
        return flops / (UTILIZATION * (self.fp32 if dtype == "float32" else self.bf16))

    def decode_seconds(self, tokens: float, weight_bytes: float) -> float:
        """Seconds to decode so many tokens one after the other: each reads all weights once, for a batch of prompts."""
        return tokens * weight_bytes / (BANDWIDTH_USED * self.bandwidth)


GPUS = {
    "H200": GPU(141e9, 4.8e12, 989e12, 67e12),
    "H100": GPU(80e9, 3.35e12, 989e12, 67e12),
    "A100-80": GPU(80e9, 2.04e12, 312e12, 19.5e12),
    "A100-40": GPU(40e9, 1.56e12, 312e12, 19.5e12),
    "L40S": GPU(48e9, 0.864e12, 362e12, 91.6e12),
    "4090": GPU(24e9, 1.01e12, 165e12, 82.6e12),
    "L4": GPU(24e9, 0.3e12, 121e12, 30.3e12),
}
