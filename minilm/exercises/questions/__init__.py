"""The questions to predict, by subject."""

QUESTIONS = ()
