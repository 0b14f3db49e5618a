"""Starting a command in several processes, watching them, and saying well what went wrong."""
