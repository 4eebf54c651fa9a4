"""TuFT: a multi-tenant LoRA fine-tuning server that speaks the Tinker service API."""

__version__ = "0.1.0"
