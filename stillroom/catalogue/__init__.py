"""The recipes as things that one lists, runs, proves and publishes."""
