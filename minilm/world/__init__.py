"""A small world for the assistant: tasks with right answers, texts about them, and simulated people who judge."""
