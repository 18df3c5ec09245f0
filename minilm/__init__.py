"""minilm: how a language model becomes an assistant. The definitions are in plain.py."""

from minilm import ops
from minilm.tensor import Tensor, no_grad, primitive

__all__ = ["Tensor", "no_grad", "ops", "primitive"]
__version__ = "0.2.0"
