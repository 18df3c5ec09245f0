"""Questions about gradients, layers and the optimiser."""

import numpy as np

from minilm import Tensor, layers, ops
from minilm.exercises.questions.question import Question
from minilm.model import Config, Transformer
from minilm.optim import AdamW


def steps_of_differences() -> dict[str, float]:
    x = 1.0
    return {f"error with h = {h:g}": abs((np.exp(x + h) - np.exp(x - h)) / (2 * h) - np.exp(x))
            for h in (1e-2, 6e-6, 1e-13)}


def scaled_input_of_rms_norm() -> dict[str, float]:
    rng = np.random.default_rng(0)
    x, weight, dy = rng.normal(size=(1, 8)), np.ones(8), rng.normal(size=(1, 8))
    numbers = {}
    for factor in (1, 10):
        leaf = Tensor(factor * x, requires_grad=True)
        y = layers.rms_norm(leaf, weight, 0.0)
        y.backward(dy)
        numbers[f"first output, input times {factor}"] = y.data[0, 0]
        numbers[f"length of dx, input times {factor}"] = float(np.linalg.norm(leaf.grad))
    return numbers


def loss_without_a_logarithm() -> dict[str, float]:
    numbers = {}
    for p in (0.001, 0.5):
        for words, loss in (("-log p", lambda z: -ops.log_softmax(z)[0]), ("-p", lambda z: -ops.softmax(z)[0])):
            z = Tensor(np.log([p, 1 - p]), requires_grad=True)
            loss(z).backward()
            numbers[f"gradient of {words} in the target's logit, p = {p}"] = z.grad[0]
    return numbers


def scores_without_their_scale() -> dict[str, float]:
    q, k = np.random.default_rng(0).normal(size=(2, 1, 1, 64, 64))
    v = np.eye(64)[None, None]                              # so the output is the weights
    weights = {"1/sqrt(K)": layers.attention(q, k, v, causal=False).data,
               "1": layers.attention(q, k, v, causal=False, scale=1.0).data}
    return {f"mean of the largest weight, scale {words}": float(P.max(axis=-1).mean()) for words, P in weights.items()}


def _fresh_model(vocab_size=50):
    return Transformer(Config(vocab_size=vocab_size, width=32, layers=2, heads=4, context=32), np.random.default_rng(0),
                       np.float64)


def padding_on_the_left() -> dict[str, float]:
    model = _fresh_model()
    tokens = np.random.default_rng(1).integers(50, size=(1, 8))
    padded = np.concatenate([np.zeros((1, 5), int), tokens], axis=1)
    mask = np.concatenate([np.zeros((1, 5), bool), np.ones((1, 8), bool)], axis=1)
    change = model(padded, mask).data[:, 5:] - model(tokens).data
    return {"largest logit": float(np.abs(model(tokens).data).max()), "largest change": float(np.abs(change).max())}


def first_loss() -> dict[str, float]:
    tokens = np.random.default_rng(1).integers(50, size=(8, 32))
    return {"loss of a fresh model, nats per token": float(-_fresh_model().log_probs(tokens).data.mean())}


def first_step_of_adam() -> dict[str, float]:
    numbers = {}
    for gradient in (1e-3, 1e3):
        p = Tensor(np.zeros(1), requires_grad=True)
        optimiser = AdamW({"p": p}, learning_rate=0.1)
        (p * gradient).sum().backward()
        optimiser.step()
        numbers[f"p after one step, gradient {gradient:g}"] = p.data[0]
    return numbers


QUESTIONS = (
    Question(
        "Which step h gives the best finite difference?",
        "You check the derivative of exp at x = 1 by (f(x+h) - f(x-h)) / (2h), in float64. Which of h = 1e-2, 6e-6 and "
        "1e-13 has the smallest error? Of what order is each error?",
        steps_of_differences,
        lambda n: n["error with h = 6e-06"] < 1e-9 < 1e-5 < n["error with h = 0.01"] < 1e-4 < n["error with h = 1e-13"],
        "The formula has an error of order h^2, and rounding adds one of order 1e-16 / h. The sum is smallest near "
        "h = 1e-5, the cube root of 1e-16. A smaller h is worse: 1e-13 is worse than 1e-2.",
        "minilm/gradcheck.py"),
    Question(
        "The input of RMSNorm is ten times as large. And its gradient?",
        "y = rms_norm(x), without eps. You multiply x by 10 and keep dL/dy. What happens to y? What happens to the "
        "length of dL/dx?",
        scaled_input_of_rms_norm,
        lambda n: abs(n["first output, input times 1"] - n["first output, input times 10"]) < 1e-12
        and abs(n["length of dx, input times 1"] / n["length of dx, input times 10"] - 10) < 1e-9,
        "y stays the same, because the norm divides the factor out. The gradient becomes a tenth: dx has the factor "
        "r = 1 / sqrt(mean(x^2)) in front. So the larger the numbers of the residual stream grow, the smaller are the "
        "gradients through the norms.",
        "minilm/layers.py, rms_norm"),
    Question(
        "Training on -p in place of -log p",
        "Somebody leaves out the logarithm and makes the probability p of the target large instead of log p. For a "
        "target with p = 0.001, how large is the gradient in the target's logit with each loss?",
        loss_without_a_logarithm,
        lambda n: abs(n["gradient of -log p in the target's logit, p = 0.001"] + 0.999) < 1e-9
        and abs(n["gradient of -p in the target's logit, p = 0.001"] + 0.001 * 0.999) < 1e-9,
        "d(-log p)/dz = -(1 - p), which is almost -1 where the model is wrong. d(-p)/dz = -p (1 - p): a token that the "
        "model thinks impossible gets almost no gradient. It is the logarithm that makes rare targets count.",
        "minilm/objectives/sft.py"),
    Question(
        "Attention without 1/sqrt(K)",
        "64 queries and 64 keys of K = 64 random numbers of order 1. With the scale 1/sqrt(K), the largest of the 64 "
        "weights of a query is about 0.1. How large is it with scale 1?",
        scores_without_their_scale,
        lambda n: n["mean of the largest weight, scale 1/sqrt(K)"] < 0.2
        and n["mean of the largest weight, scale 1"] > 0.7,
        "q.k is a sum of K products, so its standard deviation is sqrt(K) = 8. Differences of 8 in the logits make the "
        "softmax choose one key, and its gradient, P (dP - rowsum), is then almost 0. The scale keeps the logits of "
        "order 1 for every K.",
        "minilm/layers.py, attention"),
    Question(
        "Five tokens of padding on the left",
        "A sequence gets 5 tokens of padding in front. The mask hides them from attention, and all positions move by "
        "5. How much do the logits of the real tokens change, with rotary positions (RoPE)?",
        padding_on_the_left,
        lambda n: n["largest change"] < 1e-12 * n["largest logit"],
        "Not at all, up to rounding. With RoPE, q.k depends on the difference of two positions alone, and the padding "
        "moves both by 5. With learned absolute positions the logits would change.",
        "minilm/rotary.py"),
    Question(
        "The loss before the first step",
        "A fresh Transformer with a vocabulary of 50 scores random tokens. What is its loss, in nats per token?",
        first_loss, lambda n: abs(n["loss of a fresh model, nats per token"] - np.log(50)) < 0.2,
        "About log 50 = 3.91: with small initial weights, all logits are close to 0, and each token has a "
        "probability of about 1/50. If your first loss is far above log V, the initial weights are too large; far "
        "below it, the targets leak into the inputs.",
        "minilm/model.py"),
    Question(
        "The first step of Adam",
        "A parameter starts at 0, and the learning rate is 0.1. How far does the first step of Adam move it, if its "
        "gradient is 0.001? And if its gradient is 1000?",
        first_step_of_adam, lambda n: all(abs(value + 0.1) < 1e-5 for value in n.values()),
        "By 0.1 in both cases. In the first step m / (1 - b1) = g and v / (1 - b2) = g^2, so the direction is "
        "g / (|g| + eps), which is the sign of the gradient as long as |g| is far above eps = 1e-8. A loss that is "
        "multiplied by a constant therefore trains the same.",
        "minilm/optim.py"))
