"""The evaluation at the end of assistant.py: every model answers questions that no stage was trained on."""

import numpy as np

from minilm import data, evaluate
from minilm.model import RewardModel, Transformer
from minilm.world import tasks
from support.job import Job
from support.tables import LOWER_TEMPERATURE
from support.terminal import progress

EXAMPLES = 6


class Evaluation:
    """Measurements on one sampled answer, at temperature 1 (one row: LOWER_TEMPERATURE), to each held-out question.

    Wording and content of these questions are held out of every stage, with one exception: the pretraining text
    states the facts about people. All models answer the same questions. Win rates and proxy rewards are relative to
    the opponent: answers of the SFT model, drawn independently of the answers that its own row is measured on.
    """

    def __init__(self, job: Job, sft: Transformer, reward_model: RewardModel, count: int):
        self.job = job
        self.sft = sft
        self.reward_model = reward_model
        self.questions = tasks.draw_questions(job.rng("held-out questions"), count, held_out=True)
        self.prompts = job.encode_questions(self.questions)

    def results(self, base: Transformer, by_rlhf: dict, by_dpo: dict, main_beta: float, n: int) -> dict:
        """All measurements. by_rlhf, by_dpo: {beta: policy}; the table has the policies of main_beta, and best of n."""
        models = {"base": base, "sft": self.sft, "rlhf": by_rlhf[main_beta], "dpo": by_dpo[main_beta]}
        sets_of_answers = 6 + n + len(by_rlhf) + len(by_dpo)
        with progress("evaluation", sets_of_answers, unit="sampling answers, part") as self.advance:
            opponent = self._answers(self.sft, "opponent")
            self.opponent_gold = self.job.judge(self.questions, opponent)[1]
            self.opponent_proxy = self._proxy_rewards(opponent)
            frontier = {stage: [{"beta": beta, **self._row(stage, model)} for beta, model in policies.items()]
                        for stage, policies in (("rlhf", by_rlhf), ("dpo", by_dpo))}
            of_main_beta = [row for rows in frontier.values() for row in rows if row["beta"] == main_beta]
            rows = [self._row("base", base), self._row("sft", self.sft),
                    self._row("sft_lower_temperature", self.sft, temperature=LOWER_TEMPERATURE),
                    self._best_of_n(n), *of_main_beta]
            completion, completion_se = self._completion_accuracy(base)
            ranked, ranked_se = self._reward_model_accuracy()
        return {"rows": rows, "frontier": frontier, "examples": self._examples(models),
                "base_completion_accuracy": completion, "base_completion_accuracy_se": completion_se,
                "reward_model_accuracy": ranked, "reward_model_accuracy_se": ranked_se,
                "held_out_questions": len(self.questions),
                "distinct_questions": len({q.text for q in self.questions})}

    def _answers(self, model, draw="evaluation", temperature=1.0):
        answers = self.job.sample(model, self.prompts, self.job.rng(draw), temperature)
        self.advance()
        return answers

    def _proxy_rewards(self, responses):
        return evaluate.predicted_rewards(self.reward_model, self.prompts, responses)

    def _row(self, stage, model, responses=None, temperature=1.0):
        """One row of the table, with standard errors. model None: given responses, without a policy and its KL."""
        responses = self._answers(model, temperature=temperature) if responses is None else responses
        right, gold = self.job.judge(self.questions, responses)
        columns = {"task_accuracy": right, "gold_reward": gold,
                   "proxy_reward": self._proxy_rewards(responses) - self.opponent_proxy,
                   "win_rate": evaluate.wins(gold, self.opponent_gold)}
        if model is not None:
            columns["kl_sequence"] = evaluate.sequence_kl(model, self.sft, self.prompts, responses,
                                                           temperature=temperature)
        row = {"stage": stage}
        for name, values in columns.items():
            row[name], row[f"{name}_se"] = evaluate.mean_and_error(values)
        row["accuracy_by_task"] = {task: float(right[[q.task == task for q in self.questions]].mean())
                                   for task in tasks.TASKS if any(q.task == task for q in self.questions)}
        return row

    def _best_of_n(self, n):
        """The row of the SFT model's answer with the highest proxy reward among n. Its KL is an upper bound."""
        draws = [self._answers(self.sft, f"best of {i}") for i in range(n)]
        best = np.argmax([self._proxy_rewards(responses) for responses in draws], axis=0)
        row = self._row("best_of_n", None, [draws[i][j] for j, i in enumerate(best)])
        return {**row, "n": n, "kl_sequence": evaluate.best_of_n_kl(n), "kl_sequence_se": 0.0,
                "kl_is_upper_bound": True}

    def _completion_accuracy(self, model):
        """Knowledge of a model that was trained on no dialogue: the questions as statements to complete."""
        tokenizer = self.job.tokenizer
        prompts = [[tokenizer.bos] + tokenizer.encode(tasks.statement(q)) for q in self.questions]
        responses = self.job.sample(model, prompts, self.job.rng("completions"))
        self.advance()
        completions = [data.decode_response(tokenizer, r).split(".")[0].strip() for r in responses]
        return evaluate.mean_and_error([text == q.answer for text, q in zip(completions, self.questions)])

    def _reward_model_accuracy(self):
        """The fraction of pairs of SFT answers that the proxy reward ranks as the gold reward does.

        Pairs of equal gold reward are left out; without any other pair the result is 0.5, chance.
        """
        first = self._answers(self.sft)
        gold_difference = self.job.judge(self.questions, first)[1] - self.opponent_gold
        proxy_difference = self._proxy_rewards(first) - self.opponent_proxy
        differ = gold_difference != 0
        if differ.sum() < 2:
            return 0.5, 0.5
        return evaluate.mean_and_error((proxy_difference[differ] > 0) == (gold_difference[differ] > 0))

    def _examples(self, models):
        """[{"question", "answer", stage: [text, finished] of each of models {stage: model}}], each from another task.

        Decoding is greedy.
        """
        first_of_task = {}
        for question, prompt in zip(self.questions, self.prompts):
            first_of_task.setdefault(question.task, (question, prompt))
        questions, prompts = zip(*list(first_of_task.values())[:EXAMPLES])
        examples = [{"question": q.text, "answer": q.answer} for q in questions]
        for stage, model in models.items():
            responses = self.job.sample(model, prompts, self.job.rng("examples"), temperature=0.0)
            for example, reading in zip(examples, self.job.read(responses)):
                example[stage] = list(reading)
        return examples
