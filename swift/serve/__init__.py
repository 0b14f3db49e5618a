"""The OpenAI server: protocol, routes, and the process in which the engine runs."""
