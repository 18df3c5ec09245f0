"""A small world to become an assistant in: tasks, texts about them, and people who judge answers."""
