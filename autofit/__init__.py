"""autofit: the auto-tuning QLoRA trainer."""

__version__ = "0.1.0"
