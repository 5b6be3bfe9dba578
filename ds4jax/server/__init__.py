"""The HTTP server: OpenAI's, Anthropic's and its own endpoints over one loaded model."""
