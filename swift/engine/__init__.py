"""Engines: what turns prompts into text."""
