"""Models and tokenizers: what they are comes from their own files, never from a list of names."""
