"""Which mean over tokens: of each response (GRPO), of the batch (DAPO), a constant (Dr. GRPO) or the sum?

Claim. The sum and a constant have the direction of the true gradient; the mean of each response has another one, and
makes wrong responses longer. The mean over a batch has a smaller bias; dividing by the standard deviation of the group
is a bias of its own.

Test. (1) A world of 15 responses of at most 3 tokens out of 3, all listed; a random Transformer, a random reward for
each response, beta 0, K = 2 samples. For four means and four baselines the exact expected gradient of the loss, a sum
over all pairs of responses, against the exact gradient of E[r]: the sine of the angle between them, and the quotient of
their lengths. (2) Training by the policy gradient, 64 samples a step, on responses of at most 5 tokens out of 4, all
listed, so that expected lengths are exact. The model is first finetuned on responses whose first token is random, of
random length. Task "answer": a response is right (reward 1, otherwise 0) if its first token is the last one of the
prompt; its further tokens have no effect on the reward. Task "equal": every response has the reward -1, and there is no
baseline; the true gradient is 0.

Rule. The sum and a constant have the direction of the true gradient with every baseline but the standard deviation of
the group (sine below 1e-6); with the leave-one-out baseline the mean of each response has not (above 0.05), and the
mean over the batch is nearer to it; the sum with the standard deviation has another direction (above 0.05); and in
training the mean of each response ends with longer wrong responses than the sum, and with longer responses in the task
"equal". Effects of a seed: sines, their difference, and differences of expected lengths in tokens; margin 0.

Limits. The answer was worded after the run; the rule and its margins were not changed. In a first run of 6 seeds both
comparisons of a sine with 0.05 were undecided: the bias differs much between random rewards, and in some it is 0.03.
The number of seeds was then set to 16, before any of the 10 further ones was run; these alone give 0.29 [0.13, 0.45]
for the mean of each response and 0.29 [0.11, 0.46] for the standard deviation. Shorter right responses with the mean of
each response were expected and are undecided. Whether the bias matters for the reward in the end is not tested, and no
run was trained to its end. An empty response, EOS alone, is wrong and has one token, so that wrong responses are
shorter at the start and lengths change with every mean; the rule compares with the sum. The bias vanishes if all
lengths are equal. AdamW divides by the size of gradients, so that a constant changes nothing here; with plain gradient
descent it changes the learning rate. Responses have at most 5 tokens and those of reasoning models thousands; the size
of the effect there is not known. With a centred baseline, equal rewards give the gradient 0 with every mean: the task
"equal" is one without a baseline.

Source. Dr. GRPO: Liu et al. 2025, arXiv:2503.20783; GRPO: Shao et al. 2024, arXiv:2402.03300, (3); DAPO: Yu et al.
2025, arXiv:2503.14476.

Figure. Expected length of wrong responses in the task "answer" (left), of right responses (middle) and of all responses
in the task "equal" (right) against the step, in tokens, one line for each mean as the average over the seeds and one
faint line per seed.
"""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "lecture"))       # for common
from common.experiment import COLOURS, Comparison, Conclusion, curve, mean, mean_range, run, spread

# isort: split
import numpy as np

from minilm.exact.bias import bias
from minilm.exact.enumerable import EnumerableWorld, expectation
from minilm.objectives.policy_gradient import advantages, policy_gradient_loss
from minilm.stages.rlhf import train_rlhf
from minilm.stages.sft import train_sft
from minilm.stages.train_state import TrainState
from minilm.tensor import no_grad
from worlds.random_policies import random_policies, world_of

LONGEST, EOS = 5, 0
GOES_ON = 0.6                                               # probability of a further token in a demonstration
MODEL = {"vocab_size": 4, "width": 16, "layers": 1, "heads": 2, "context": 16}
PROMPTS = [[1, 1], [1, 2], [1, 3]]                          # the last token is the answer
MEANS = {"sum": None, "constant": float(LONGEST), "batch": "batch", "response": "response"}
BASELINES = ("none", "leave_one_out", "mean", "group")
LOO, GROUP = "leave_one_out", "group"
# Runs of the task "answer": (mean, baseline).
RUNS = [*((name, LOO) for name in MEANS), ("response", GROUP)]
EQUAL = ("sum", "batch", "response")                         # the means of the task "equal"
EVERY = 10                                                  # steps between two exact lengths
QUANTITIES = ("length", "wrong", "right", "reward")
SIZES = {"quick": {"seeds": 3, "tuning": 10, "steps": 10}, "default": {"seeds": 16, "tuning": 150, "steps": 60}}


def estimator(baseline, token_mean):
    """The policy gradient with this baseline and this mean, for bias()."""
    def loss(log_probs, drawn):
        A = advantages(drawn.rewards, drawn.kl, 0.0, baseline).reshape(-1)
        return policy_gradient_loss(log_probs, A, drawn.mask, token_mean)
    return loss


def exact_biases(rng):
    """{(mean, baseline, samples): (sine, ratio)} of the expected gradient against the true one."""
    policy, = random_policies(rng, 1)
    cases = [(3, 2, name, baseline) for name in MEANS for baseline in BASELINES]
    cases += [(2, K, name, LOO) for K in (2, 4) for name in ("batch", "response")]
    rewards = {longest: rng.normal(size=world_of(longest).shape) for longest in (2, 3)}
    found = {}
    for longest, K, name, baseline in cases:
        compared = bias(estimator(baseline, MEANS[name]), world_of(longest), policy, policy, rewards[longest], 0.0, K)
        sine = np.sqrt(max(0.0, 1 - compared.cosine ** 2))
        found[f"{name}, {baseline}, K {K}, at most {longest} tokens"] = [sine, compared.ratio]
    return found


class Lengths:
    """Exact expected lengths of a policy's responses: of all, of the wrong and of the right ones; and its reward."""

    def __init__(self):
        self.world = EnumerableWorld(PROMPTS, MODEL["vocab_size"], LONGEST, EOS)
        self.right = np.array([[response[0] == prompt[-1] for response in self.world.responses] for prompt in PROMPTS])
        self.lengths = self.world.mask.sum(axis=-1)

    def __call__(self, model):
        with no_grad():
            log_pi = self.world.log_probs(model).data.astype(np.float64)

        def mean_length(which):
            return (expectation(log_pi, self.lengths * which) / expectation(log_pi, which * 1.0)).mean()
        return [mean_length(np.ones_like(self.right)), mean_length(~self.right), mean_length(self.right),
                expectation(log_pi, self.right * 1.0).mean()]


def demonstrations(rng, count):
    """Prompts and responses: a first token that is right by chance, and a length that does not depend on it."""
    prompts = [PROMPTS[i] for i in rng.integers(len(PROMPTS), size=count)]
    lengths = np.minimum(rng.geometric(1 - GOES_ON, size=count), LONGEST - 1)
    return prompts, [[*rng.integers(1, MODEL["vocab_size"], size=n).tolist(), EOS] for n in lengths]


def answer(prompts, responses):
    return np.array([float(response[0] == prompt[-1]) for prompt, response in zip(prompts, responses)])


def equal(prompts, responses):
    return np.full(len(prompts), -1.0)


def measure(experiment, seed, tuning, steps):
    rng = np.random.default_rng(seed)
    results = {"exact": exact_biases(rng)}
    start, lengths = experiment.transformer(rng, **MODEL), Lengths()
    for _ in train_sft(TrainState(start, rng), *demonstrations(rng, 4000), tuning, 64, 3e-3):
        pass
    tasks = [("answer", answer, *names) for names in RUNS] + [("equal", equal, name, "none") for name in EQUAL]
    for task, reward, name, baseline in tasks:
        policy = start.copy()
        path = [lengths(policy)]
        state = TrainState(policy, np.random.default_rng(seed), weight_decay=0.0)       # the same draws in every run
        stage = train_rlhf(state, start, reward, PROMPTS, steps, 8, 8, LONGEST, EOS, 0.0, 3e-3, baseline=baseline,
                           token_mean=MEANS[name])
        for step, _ in enumerate(stage, 1):
            if step % EVERY == 0:
                path.append(lengths(policy))
        results[f"{task}, {name}, {baseline}"] = np.transpose(path)                     # (quantities, points)
    return results


def exact(seeds, name, baseline, i=0, K=2, longest=3):
    """The sine (i = 0) or the quotient of lengths (1) of each seed."""
    return [s["exact"][f"{name}, {baseline}, K {K}, at most {longest} tokens"][i] for s in seeds]


def at_end(seeds, task, name, baseline, quantity):
    return np.array([s[f"{task}, {name}, {baseline}"][QUANTITIES.index(quantity)][-1] for s in seeds])


def longer(seeds, task, first, second, quantity):
    """The difference of expected lengths at the end between two runs (mean, baseline)."""
    return at_end(seeds, task, *first, quantity) - at_end(seeds, task, *second, quantity)


def conclude(seeds, size):
    unbiased = [[exact(seeds, name, baseline) for name in ("sum", "constant")] for baseline in BASELINES[:-1]]
    sine = {name: np.array(exact(seeds, name, LOO)) for name in MEANS}
    wrong = longer(seeds, "answer", ("response", LOO), ("sum", LOO), "wrong")
    same = longer(seeds, "equal", ("response", "none"), ("sum", "none"), "length")
    rule = [Comparison("largest sine of the sum and a constant, three baselines", np.max(unbiased, axis=(0, 1)),
                       below=1e-6),
            Comparison("sine of the mean of each response, leave-one-out", sine["response"], above=0.05),
            Comparison("sine of the mean of each response minus that of the batch, leave-one-out",
                       sine["response"] - sine["batch"], above=0),
            Comparison("sine of the sum with the standard deviation of the group", exact(seeds, "sum", GROUP),
                       above=0.05),
            Comparison("length of wrong responses, mean of each response minus sum (tokens)", wrong, above=0),
            Comparison("length with equal rewards of -1, mean of each response minus sum (tokens)", same, above=0)]
    findings = [Comparison("length of right responses, mean of each response minus sum (tokens)",
                           longer(seeds, "answer", ("response", LOO), ("sum", LOO), "right"), below=0),
                Comparison("length of wrong responses, mean of the batch minus sum (tokens)",
                           longer(seeds, "answer", ("batch", LOO), ("sum", LOO), "wrong"), above=-0.2, below=0.2),
                Comparison("length of wrong responses, GRPO (mean of each response, standard deviation) minus the sum "
                           "with leave-one-out (tokens)",
                           longer(seeds, "answer", ("response", GROUP), ("sum", LOO), "wrong"), above=0),
                Comparison("sine of the mean of the batch with 2 samples minus that with 4, leave-one-out",
                           np.subtract(*(exact(seeds, "batch", LOO, K=K, longest=2) for K in (2, 4))), above=0)]
    numbers = {f"{what}, {name}": spread(s["exact"][name][i] for s in seeds) for name in seeds[0]["exact"]
               for i, what in enumerate(("sine", "ratio"))}
    numbers |= {f"{quantity} at the end, {name}": spread(s[name][i][-1] for s in seeds) for name in seeds[0]
                if name != "exact" for i, quantity in enumerate(QUANTITIES)}
    table = [["mean over tokens", *(f"{what}, {baseline}" for baseline in BASELINES for what in ("sine", "ratio"))]]
    table += [[name, *(mean_range(exact(seeds, name, baseline, i)) for baseline in BASELINES for i in (0, 1))]
              for name in MEANS]
    details = [["training: task, mean, baseline", *QUANTITIES]]
    details += [[name, *(mean_range([s[name][i][-1] for s in seeds]) for i in range(len(QUANTITIES)))]
                for name in seeds[0] if name != "exact"]
    words = (f"The expected gradient of the mean of each response has an angle of "
             f"{np.degrees(np.arcsin(sine['response'])).mean():.0f} degrees to the true one, of the batch "
             f"{np.degrees(np.arcsin(sine['batch'])).mean():.0f}, of the sum and a constant 0. After training, wrong "
             f"responses have {mean(at_end(seeds, 'answer', 'response', LOO, 'wrong'))} tokens with the mean of each "
             f"response and {mean(at_end(seeds, 'answer', 'sum', LOO, 'wrong'))} with the sum.")
    legend = ("Sine of the angle between the expected gradient and the true one, and the quotient of their lengths; "
              "K = 2. Mean over the seeds [least, greatest]. Lengths are expectations at the end of training.")
    return Conclusion(rule, words, numbers, table, findings=findings, legend=legend, details=details)


def draw(figure, seeds, size):
    steps = np.arange(0, size["steps"] + 1, EVERY)
    panels = (("answer", "wrong", "Wrong responses"), ("answer", "right", "Right responses"),
              ("equal", "length", "All rewards -1, no baseline"))
    for axis, (task, quantity, title) in zip(figure.subplots(1, 3), panels):
        i = QUANTITIES.index(quantity)
        runs = RUNS if task == "answer" else [(name, "none") for name in EQUAL]
        for name, baseline in runs:
            colour = COLOURS[4 if baseline == GROUP else list(MEANS).index(name)]
            label = {"sum": "sum", "constant": "constant (Dr. GRPO)", "batch": "mean of the batch (DAPO)",
                     "response": "mean of each response"}[name] + (", group std (GRPO)" if baseline == GROUP else "")
            curve(axis, steps, [s[f"{task}, {name}, {baseline}"][i] for s in seeds], label, colour, marker="",
                  linestyle="--" if name == "constant" else "-")
        axis.set(title=title, xlabel="step", ylabel="expected length (tokens)")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=9)


if __name__ == "__main__":
    sys.exit(run(__file__, __doc__, measure, conclude, draw, SIZES, figure_size=(11, 4.6)))
