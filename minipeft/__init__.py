"""minipeft: parameter-efficient fine-tuning from scratch in plain PyTorch."""

from minipeft.errors import InputError

__all__ = ["InputError"]
__version__ = "0.1.0"
