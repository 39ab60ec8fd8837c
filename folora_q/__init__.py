"""folora-q: QLoRA that gates its updates by what they would make the model forget."""

__version__ = "0.2.0"
