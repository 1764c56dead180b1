"""MING-MOE: a bilingual medical language model with sparse LoRA experts, and the app that serves it.

Importing this package is light: torch, numba and gradio load only where they are used.
"""

__version__ = "0.1.0"
