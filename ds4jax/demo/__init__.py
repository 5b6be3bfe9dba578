"""The demonstration model, a GGUF file, and its card."""
