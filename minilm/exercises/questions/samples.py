"""Questions about samples: policy gradients, KL estimators, PPO, best-of-n. Expectations are sums over all outcomes."""

import itertools

import numpy as np

from minilm import Tensor, ops
from minilm.exact import enumerable, expectations
from minilm.exercises.questions.question import Question
from minilm.objectives import kl
from minilm.objectives.policy_gradient import advantages, policy_gradient_loss, ppo_clip_loss


def _world():
    """log pi, log pi_ref and rewards of four responses, (1,4) each."""
    rng = np.random.default_rng(0)
    log_pi, log_ref = np.log(rng.dirichlet(np.ones(4), size=(2, 1)))
    return log_pi, log_ref, rng.normal(size=(1, 4))


def _in_the_logits(log_pi, gradient):
    """A gradient in log pi (1,4) as one in the logits: d log pi(y) / d logit(i) = 1[y = i] - pi(i)."""
    return gradient - np.exp(log_pi) * gradient.sum()


def _expected(log_pi, loss, samples):
    """The expected gradient of a loss over samples, in the logits."""
    found = expectations.gradient_over_samples(loss, log_pi[..., None], np.ones((1, 4, 1)), samples)
    return _in_the_logits(log_pi, found[..., 0])


def mean_of_all_as_baseline() -> dict[str, float]:
    log_pi, _, rewards = _world()

    def loss(log_probs, drawn):
        A = advantages(rewards[:, drawn[0]], np.zeros((1, 2)), 0.0, "mean")
        return policy_gradient_loss(log_probs, A.reshape(-1), np.ones((2, 1)))

    exact = _in_the_logits(log_pi, enumerable.objective_gradient(log_pi, log_pi, rewards, 0.0))
    found = -_expected(log_pi, loss, samples=2)
    return {"expected gradient / true gradient, first logit": found[0, 0] / exact[0, 0],
            "expected gradient / true gradient, second logit": found[0, 1] / exact[0, 1]}


def ten_more_reward() -> dict[str, float]:
    log_pi, _, rewards = _world()
    pi = np.exp(log_pi[0])
    numbers = {}
    for baseline, more in itertools.product(("none", "leave_one_out"), (0, 10)):
        mean, square = np.zeros(4), 0.0
        for y in itertools.product(range(4), repeat=2):
            A = advantages(rewards[:, y] + more, np.zeros((1, 2)), 0.0, baseline)[0]
            g = (A[:, None] * (np.eye(4)[list(y)] - pi)).mean(axis=0)
            mean += pi[list(y)].prod() * g
            square += pi[list(y)].prod() * (g @ g)
        words = f"baseline {baseline}, rewards + {more}"
        numbers[f"length of the expected gradient, {words}"] = float(np.linalg.norm(mean))
        numbers[f"its standard deviation, {words}"] = float(np.sqrt(square - mean @ mean))
    return numbers


def spread_within_a_group() -> dict[str, float]:
    rewards = np.array([[0.0, 1.0], [0.0, 0.1]])
    numbers = {}
    for baseline in ("leave_one_out", "group"):
        A = advantages(rewards, np.zeros((2, 2)), 0.0, baseline)
        numbers[f"A of the better response, {baseline}, rewards 0 and 1"] = A[0, 1]
        numbers[f"A of the better response, {baseline}, rewards 0 and 0.1"] = A[1, 1]
    return numbers


def k1_as_a_loss() -> dict[str, float]:
    log_pi, log_ref, _ = _world()

    def loss(log_probs, drawn):
        return ops.sum(kl.k1(log_probs, log_ref[:, drawn[0]].T))

    gradient = np.exp(log_pi) * (log_pi - log_ref + 1)
    return {"length of the gradient of KL(pi || pi_ref)": float(np.linalg.norm(_in_the_logits(log_pi, gradient))),
            "length of the expected gradient of k1": float(np.linalg.norm(_expected(log_pi, loss, samples=1)))}


def k3_in_float32() -> dict[str, float]:
    policy, reference = np.array([[-1.0], [-1.0001]], np.float32)
    u = policy - reference
    exact = np.expm1(-np.float64(u)) + np.float64(u)
    return {"u, the difference of two float32 numbers": u[0], "k3, in float64": exact[0],
            "k3 of minilm, in float32": kl.k3(policy, reference).data[0],
            "exp(-u) - 1 + u, in float32": (np.exp(-u) - np.float32(1) + u)[0]}


def beyond_the_clip() -> dict[str, float]:
    numbers = {}
    for ratio, A in itertools.product((1.5, 0.5), (1.0, -1.0)):
        leaf = Tensor(np.log([[ratio]]), requires_grad=True)
        ppo_clip_loss(leaf, np.zeros((1, 1)), np.array([A]), np.ones((1, 1)), 0.2).backward()
        numbers[f"dL/dlog pi, ratio {ratio}, A = {A:+g}"] = leaf.grad[0, 0] + 0.0      # -0 becomes 0
    return numbers


def price_of_best_of_n() -> dict[str, float]:
    log_pi = np.full((1, 2000), -np.log(2000))
    scores = np.arange(2000.0)[None]
    return {f"KL of best-of-{n} from pi, in nats": enumerable.divergence(enumerable.best_of_n(log_pi, scores, n),
                                                                         log_pi)[0] for n in (2, 4, 16)}


QUESTIONS = (
    Question(
        "The mean of all samples as baseline",
        "K = 2 responses to a prompt. As baseline you subtract the mean reward of both. What is the expected policy "
        "gradient, as a multiple of the true one?",
        mean_of_all_as_baseline, lambda n: all(abs(value - 0.5) < 1e-12 for value in n.values()),
        "One half, in every entry. The mean contains the response's own reward: R - mean = (1 - 1/K) (R - mean of the "
        "others), and 1 - 1/K is 1/2. Leave-one-out has no such factor. A learning rate can absorb it.",
        "minilm/objectives/policy_gradient.py"),
    Question(
        "Ten more reward for everybody",
        "You add 10 to all rewards, and draw two responses. What happens to the expected policy gradient, and to the "
        "standard deviation of its estimate: without a baseline, and with leave-one-out?",
        ten_more_reward,
        lambda n: len({round(value, 9) for words, value in n.items() if "expected" in words}) == 1
        and n["its standard deviation, baseline none, rewards + 10"]
        > 5 * n["its standard deviation, baseline none, rewards + 0"]
        and abs(n["its standard deviation, baseline leave_one_out, rewards + 10"]
                - n["its standard deviation, baseline leave_one_out, rewards + 0"]) < 1e-9,
        "The expectation is the same in all four cases, because E[b grad log pi] = 0 for a constant b. Without a "
        "baseline the estimate becomes many times noisier. With leave-one-out the 10 cancels in every sample.",
        "minilm/objectives/policy_gradient.py"),
    Question(
        "Rewards 0 and 1, rewards 0 and 0.1",
        "Two prompts with two responses each. The rewards are 0 and 1 for the first prompt, 0 and 0.1 for the "
        "second. How large are the advantages of the better responses with leave-one-out, and how large with GRPO's "
        "normalisation by the standard deviation of the group (of a sample: with K - 1 = 1 in its denominator)?",
        spread_within_a_group,
        lambda n: abs(n["A of the better response, leave_one_out, rewards 0 and 1"]
                      / n["A of the better response, leave_one_out, rewards 0 and 0.1"] - 10) < 1e-9
        and abs(n["A of the better response, group, rewards 0 and 1"]
                - n["A of the better response, group, rewards 0 and 0.1"]) < 0.01,
        "With leave-one-out 1 and 0.1. Divided by the standard deviation both are about 1 / sqrt(2) = 0.707: a "
        "difference that hardly matters weighs as much as a large one. So the expected gradient is not that of the "
        "expected reward.",
        "minilm/objectives/policy_gradient.py, advantages"),
    Question(
        "The log-ratio as a loss",
        "k1 = log pi(y) - log pi_ref(y) of a sample y from pi is an unbiased estimate of KL(pi || pi_ref). Somebody "
        "adds it to the loss and differentiates. What is the expected gradient?",
        k1_as_a_loss, lambda n: n["length of the expected gradient of k1"] < 1e-12
        and n["length of the gradient of KL(pi || pi_ref)"] > 0.1,
        "0. The gradient of k1 is grad log pi(y), whose expectation under pi is sum_y grad pi(y) = grad 1 = 0: the "
        "reference does not even occur in it. The samples depend on the policy, and differentiating the estimate "
        "leaves this out. In the reward, as -beta k1, it has the right gradient.",
        "minilm/objectives/kl.py"),
    Question(
        "k3 of two almost equal policies",
        "Two log-probs in float32 differ by about u = log pi - log pi_ref = 1e-4, and k3 = exp(-u) - 1 + u is about "
        "u^2 / 2 = 5e-9. What does float32 give for exp(-u) - 1 + u, computed as it stands?",
        k3_in_float32, lambda n: abs(n["u, the difference of two float32 numbers"] - 1e-4) < 1e-7
        and abs(n["k3 of minilm, in float32"] / n["k3, in float64"] - 1) < 0.01
        and abs(n["exp(-u) - 1 + u, in float32"] / n["k3, in float64"] - 1) > 0.5,
        "Nothing that has a correct digit. exp(-u) is rounded to a multiple of 6e-8, which is ten times the result: "
        "the difference of two such numbers is 0 or wrong by far more than itself. expm1(-u) computes exp(-u) - 1 "
        "without this rounding.",
        "minilm/objectives/kl.py"),
    Question(
        "Beyond PPO's clip",
        "epsilon = 0.2. The ratio pi/pi_old of a token is 1.5 or 0.5, and its advantage +1 or -1. In which of the "
        "four cases is the gradient of the clipped loss 0?",
        beyond_the_clip, lambda n: n["dL/dlog pi, ratio 1.5, A = +1"] == 0 == n["dL/dlog pi, ratio 0.5, A = -1"]
        and n["dL/dlog pi, ratio 1.5, A = -1"] == 1.5 and n["dL/dlog pi, ratio 0.5, A = +1"] == -0.5,
        "Where the ratio has already moved in the direction of the advantage: 1.5 with +1, and 0.5 with -1. In the "
        "other two cases the token has moved the wrong way, and the gradient, -ratio A, brings it back. The clip is "
        "one-sided; it does not keep the ratio within 0.8 and 1.2.",
        "minilm/objectives/policy_gradient.py, ppo_clip_loss"),
    Question(
        "The price of best-of-n",
        "You keep the best of n responses, all scores being different. How far is this distribution from pi, as a KL "
        "divergence: log n?",
        price_of_best_of_n,
        lambda n: all(0.99 < n[f"KL of best-of-{k} from pi, in nats"] / (np.log(k) - (k - 1) / k) <= 1
                      for k in (2, 4, 16)),
        "log n - (n-1)/n, almost one nat below log n if n is large. This is an upper bound, nearly reached where every "
        "single response is improbable, as here. Twice as many responses cost at most log 2 nats more.",
        "minilm/exact/enumerable.py, best_of_n"))
