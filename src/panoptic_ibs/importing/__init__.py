"""Reading the checkpoints of other programs: their names of tensors, and what their shapes say about the network."""

from .imported import Comparison, Imported, compare, import_checkpoint

__all__ = ["Comparison", "Imported", "compare", "import_checkpoint"]
