"""HTTP over an engine: OpenAI's interface, llama-server's and Anthropic's (extra `server`)."""
