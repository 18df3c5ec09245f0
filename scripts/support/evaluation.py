"""The examination at the end of the main job: what each stage answers to questions held out of all of them."""

import numpy as np

from minilm import data, evaluate
from minilm.world import tasks


class Evaluation:
    """Everything is measured on one sampled answer, at temperature 1, to each held-out question.

    The questions' wordings and contents are held out of every stage, except that what they ask about
    people is stated in the pretraining text. All models answer the same questions.
    """

    def __init__(self, job, instructed, reward_model, count):
        self.job, self.instructed, self.reward_model = job, instructed, reward_model
        self.questions = tasks.draw_questions(job.rng("held-out questions"), count, held_out=True)
        self.prompts = [data.encode_prompt(job.tokenizer, q.text) for q in self.questions]
        # Wins and learned rewards are relative to answers of the instructed model, in draws apart
        # from those that its own row is measured on.
        opponent = self.answers(instructed, "opponent")
        self.opponent_gold = job.judge(self.questions, opponent)[1]
        self.opponent_learned = self.predicted(opponent)

    def answers(self, model, draw="evaluation"):
        return self.job.sample(model, self.prompts, self.job.rng(draw))

    def predicted(self, responses):
        return evaluate.predicted_rewards(self.reward_model, self.prompts, responses)

    def row(self, stage, model, responses=None):
        """One row of the table, with standard errors. model None: responses come without a policy, no KL."""
        responses = self.answers(model) if responses is None else responses
        right, gold = self.job.judge(self.questions, responses)
        columns = {"task_accuracy": right, "gold_reward": gold,
                   "learned_reward": self.predicted(responses) - self.opponent_learned,
                   "win_rate": evaluate.wins(gold, self.opponent_gold)}
        if model is not None:
            columns["kl_sequence"] = evaluate.sequence_kl(model, self.instructed, self.prompts, responses)
        row = {"stage": stage}
        for name, values in columns.items():
            row[name], row[f"{name}_se"] = evaluate.mean_and_error(values)
        row["accuracy_by_task"] = {task: float(right[[q.task == task for q in self.questions]].mean())
                                   for task in tasks.TASKS if any(q.task == task for q in self.questions)}
        return row

    def best_of_n(self, n):
        """The row of the instructed model's answer that the reward model likes best of n. Its KL is a bound."""
        draws = [self.answers(self.instructed, f"best of {i}") for i in range(n)]
        best = np.argmax([self.predicted(responses) for responses in draws], axis=0)
        row = self.row("best_of_n", None, [draws[i][j] for j, i in enumerate(best)])
        return {**row, "n": n, "kl_sequence": evaluate.best_of_n_kl(n), "kl_sequence_se": 0.0, "kl_is_upper_bound": True}

    def completion_accuracy(self, model):
        """What a model knows that cannot hold a dialogue: the same questions as statements to complete."""
        tokenizer = self.job.tokenizer
        prompts = [[tokenizer.bos] + tokenizer.encode(tasks.statement(q)) for q in self.questions]
        responses = self.job.sample(model, prompts, self.job.rng("completions"))
        said = [data.decode_response(tokenizer, r).split(".")[0].strip() for r in responses]
        return evaluate.mean_and_error([s == q.answer for s, q in zip(said, self.questions)])

    def reward_model_accuracy(self):
        """How often the reward model ranks two of the instructed model's answers as the gold reward does.

        Pairs of equal gold reward are left out; if there are no others, it is chance.
        """
        gold = self.job.judge(self.questions, first := self.answers(self.instructed))[1] - self.opponent_gold
        learned = self.predicted(first) - self.opponent_learned
        differ = gold != 0
        if differ.sum() < 2:
            return 0.5, 0.5
        return evaluate.mean_and_error((learned[differ] > 0) == (gold[differ] > 0))

    def examples(self, models, count=6):
        """[{"question", "answer", and what each of models {stage: model} says, decoded greedily}]"""
        examples = [{"question": q.text, "answer": q.answer} for q in self.questions[:count]]
        for stage, model in models.items():
            said = self.job.sample(model, self.prompts[:count], self.job.rng("examples"), temperature=0.0)
            for example, response in zip(examples, said):
                example[stage] = data.decode_response(self.job.tokenizer, response)
        return examples

    def results(self, base, by_rlhf, by_dpo, main_beta, n):
        """All that is measured here. by_rlhf, by_dpo: {beta: policy}; the table shows those of main_beta."""
        frontier = {stage: [{"beta": beta, **self.row(stage, model)} for beta, model in policies.items()]
                    for stage, policies in (("rlhf", by_rlhf), ("dpo", by_dpo))}
        chosen = [row for rows in frontier.values() for row in rows if row["beta"] == main_beta]
        completion, completion_se = self.completion_accuracy(base)
        ranked, ranked_se = self.reward_model_accuracy()
        models = {"base": base, "instructed": self.instructed, "rlhf": by_rlhf[main_beta], "dpo": by_dpo[main_beta]}
        return {"rows": [self.row("base", base), self.row("instructed", self.instructed), self.best_of_n(n), *chosen],
                "frontier": frontier, "examples": self.examples(models),
                "base_completion_accuracy": completion, "base_completion_accuracy_se": completion_se,
                "reward_model_accuracy": ranked, "reward_model_accuracy_se": ranked_se,
                "held_out_questions": len(self.questions),
                "distinct_questions": len({q.text for q in self.questions})}
