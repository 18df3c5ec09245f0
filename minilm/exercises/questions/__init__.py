"""The questions to predict, by subject."""

from minilm.exercises.questions import gradients, preferences, samples

QUESTIONS = (*gradients.QUESTIONS, *preferences.QUESTIONS, *samples.QUESTIONS)
