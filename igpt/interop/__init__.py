"""Imports models of Hugging Face and OpenAI, and exports models for transformers."""
