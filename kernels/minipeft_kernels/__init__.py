"""The fused LoRA linear: one function, four paths, one meaning."""
