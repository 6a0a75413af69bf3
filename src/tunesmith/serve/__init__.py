"""A local HTTP server in OpenAI's shapes: what is asked (`protocol`), and how (`server`)."""
