"""The examination at the end of the main job: what each stage answers to questions held out of all of them."""

import numpy as np

from minilm import data, evaluate
from minilm.world import tasks


class Evaluation:
    """Everything is measured on one sampled answer, at temperature 1, to each held-out question."""

    def __init__(self, job, instructed, reward_model, count):
        self.job, self.instructed, self.reward_model = job, instructed, reward_model
        self.questions = tasks.draw_questions(job.rng("held-out questions"), count, held_out=True)
        self.prompts = [data.encode_prompt(job.tokenizer, q.text) for q in self.questions]
        # The opponent's answers, and the level of the learned reward: of the instructed model, in
        # draws apart from those that its own row is measured on.
        opponent = self.answers(instructed, "opponent")
        _, self.opponent_gold = job.judge(self.questions, opponent)
        self.zero = self.predicted(opponent).mean()

    def answers(self, model, draw="evaluation", temperature=1.0):
        return self.job.sample(model, self.prompts, self.job.rng(draw), temperature)

    def predicted(self, responses):
        return evaluate.predicted_rewards(self.reward_model, self.prompts, responses, self.job.tokenizer.pad)

    def row(self, stage, model, responses=None, kl=None):
        """One row of the table. kl: a number, where the policy's log-probs are not known."""
        responses = self.answers(model) if responses is None else responses
        right, gold = self.job.judge(self.questions, responses)
        if kl is None:
            k1 = evaluate.sequence_kl(model, self.instructed, self.prompts, responses, self.job.tokenizer.pad)
        row = {"stage": stage}
        for name, values in (("task_accuracy", right), ("gold_reward", gold),
                             ("learned_reward", self.predicted(responses) - self.zero),
                             ("win_rate", evaluate.wins(gold, self.opponent_gold)),
                             ("kl_sequence", k1 if kl is None else np.full(2, kl))):
            row[name], row[f"{name}_se"] = evaluate.mean_and_error(values)
        return row

    def best_of_n(self, n):
        """The instructed model's answer that the reward model likes best of n. KL: the upper bound."""
        draws = [self.answers(self.instructed, f"best of {i}") for i in range(n)]
        best = np.argmax([self.predicted(responses) for responses in draws], axis=0)
        return [draws[i][j] for j, i in enumerate(best)], evaluate.best_of_n_kl(n)

    def completion_accuracy(self, model):
        """What a model knows that cannot hold a dialogue: the same questions as statements to complete."""
        tokenizer = self.job.tokenizer
        prompts = [[tokenizer.bos] + tokenizer.encode(tasks.statement(q)) for q in self.questions]
        responses = self.job.sample(model, prompts, self.job.rng("completions"))
        said = [data.decode_response(tokenizer, r).split(".")[0].strip() for r in responses]
        return evaluate.mean_and_error([s == q.answer for s, q in zip(said, self.questions)])
