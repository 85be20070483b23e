"""Models to and from Hugging Face and OpenAI."""
