"""Configuration: every option is declared once; flags, YAML recipes and Python arguments read the same field."""
