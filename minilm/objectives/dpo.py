"""Direct Preference Optimization (DPO): train the policy on comparisons, without a reward model.

Symbols, and how to read the code (@primitive, vjp, xp): objectives/__init__.py.

x is a prompt, y_w the preferred response (chosen), y_l the other one (rejected). log pi(y|x) is the sum of the
log-probs of the tokens of y, its EOS included; pi_ref(y|x) > 0 for every y. RLHF (policy_gradient.py) maximises,
for each prompt,

    J(pi) = E_{y ~ pi}[ r(x,y) ] - beta KL(pi || pi_ref)                    pi is short for pi(y|x)

1. The maximiser of J, the optimal policy, has a closed form:

    pi*(y|x) = pi_ref(y|x) exp(r(x,y) / beta) / Z(x),        Z(x) = sum_y pi_ref(y|x) exp(r(x,y) / beta)

Proof. Solve for the reward,  r(x,y) = beta log(pi*(y|x) / pi_ref(y|x)) + beta log Z(x),  and substitute it:

    J(pi) = E_{y ~ pi}[ beta log(pi*/pi_ref) + beta log Z(x) - beta log(pi/pi_ref) ]
          = beta log Z(x) + E_{y ~ pi}[ -beta log(pi/pi*) ]             because log pi_ref cancels
          = beta log Z(x) - beta KL(pi || pi*)

Z(x) does not depend on pi, and a KL divergence is at least 0, and 0 only at pi = pi*.

2. Every policy pi is optimal for some reward: r(x,y) = beta log(pi(y|x) / pi_ref(y|x)) + c(x), with any c(x).
With this reward, pi_ref exp(r/beta) = exp(c/beta) pi. The sum of this over y is Z(x) = exp(c/beta), so pi* = pi.
A policy therefore stands for a reward, up to c(x). beta log(pi/pi_ref) is called the implied reward of pi. The
difference of two rewards of one prompt does not contain c(x).

3. The Bradley-Terry loss (reward.py) learns a reward from comparisons, and uses only this difference. Substitute
the implied rewards:

    delta = [ log pi(y_w|x) - log pi_ref(y_w|x) ] - [ log pi(y_l|x) - log pi_ref(y_l|x) ]
    L     = -log sigmoid(beta delta)

L is the loss of one pair; dpo_loss is its mean over B pairs. Gradient:

    dL / d log pi(y_w|x) = -beta sigmoid(-beta delta)
    dL / d log pi(y_l|x) = +beta sigmoid(-beta delta)

because sigmoid' = sigmoid (1 - sigmoid) gives d/dz[-log sigmoid(z)] = -(1 - sigmoid(z)) = -sigmoid(-z). Here
z = beta delta, and the derivatives of delta are +1 and -1 for the two log-probs. sigmoid(-beta delta) is the
probability, under the implied rewards, that y_l is preferred to y_w.

4. RLHF and DPO have the same optimum under three conditions: preferences follow the Bradley-Terry model with the
reward r; comparisons are unlimited, and for each prompt the graph of compared pairs is connected (a chain of compared
pairs leads from any response to any other); pi is unrestricted (it can be any distribution). Let y be preferred to y'
with probability q = sigmoid(r(x,y) - r(x,y')), and let D be delta with y as y_w and y' as y_l. The expected loss is a
sum over the compared pairs, with positive weights, of the terms

    -q log sigmoid(beta D) - (1 - q) log sigmoid(-beta D)

A term is the cross-entropy of q and sigmoid(beta D). It is smallest only at sigmoid(beta D) = q, so at
beta D = r(x,y) - r(x,y'). pi* makes every term minimal at once, because beta log(pi*/pi_ref) = r - beta log Z(x)
(step 1). No policy has a smaller sum, and a policy with the same sum makes every term minimal, too. For such a policy,
beta log(pi/pi_ref) - r is the same for both responses of a compared pair. The chains connect all responses, so it is
the same for all y: r = beta log(pi/pi_ref) + c(x). By step 2, pi is pi*.

With flipped labels or finite data, DPO in general does not reach the pi* of the true r. It still has the same
optimum as RLHF with a reward model fitted to the same comparisons, if reward model and policy are unrestricted,
the graph of compared pairs is connected, and the best-fitting rewards are finite (they are not if, for example, one
response wins all its comparisons). This follows from steps 2 and 3. In practice RLHF and DPO then differ by the limits
of the two models, by training that stops early, and because RLHF samples from pi, while DPO sees only the compared
responses.

5. Both log-probs can fall while the loss falls, because the loss depends only on their difference. Let g_w and
g_l be grad log pi(y_w|x) and grad log pi(y_l|x), and <g, g'> = sum_i g_i g'_i an inner product. Then

    grad L  = -beta sigmoid(-beta delta) (g_w - g_l)
    d theta = -learning_rate grad L = eta (g_w - g_l),       eta = learning_rate beta sigmoid(-beta delta)

is a step of gradient descent on one pair (grad L: Rafailov et al., section 4). To first order in the learning
rate, a log-prob changes by the inner product of its gradient with d theta:

    log pi(y_w|x):  eta ( <g_w, g_w> - <g_w, g_l> )
    log pi(y_l|x):  eta ( <g_w, g_l> - <g_l, g_l> )

If <g_w, g_l> > <g_w, g_w>, log pi(y_w|x) falls. The Cauchy-Schwarz inequality, <g_w, g_l>^2 <= <g_w, g_w> <g_l, g_l>,
then gives <g_l, g_l> > <g_w, g_l>, so log pi(y_l|x) falls too. It falls more, because delta grows by
eta |g_w - g_l|^2 (tests/test_exact_dpo_gradient.py).

If pi = pi_ref, delta = 0 and L = log 2 (exactly, if policy and reference log-probs are equal bit for bit).
-log sigmoid(z) is computed as softplus(-z) = log(1 + exp(-z)), which is finite at every finite z.
Rafailov et al. 2023, arXiv:2305.18290: pi* is equation (4), the reward (5), L (7).
Tests: tests/test_dpo.py; where training ends, exactly, by enumeration: tests/test_exact_optimum.py.
"""

import numpy as np

from minilm import checks
from minilm.backend import array_module
from minilm.ops import stable_sigmoid, stable_softplus
from minilm.tensor import Tensor, primitive


@primitive
def dpo_loss(policy_chosen: Tensor, policy_rejected: Tensor, reference_chosen: np.ndarray,
             reference_rejected: np.ndarray, beta: float = 0.1, label_smoothing: float = 0.0):
    """The mean of the loss L above over B pairs, from log-probs summed over tokens, each (B,): a scalar.

    label_smoothing  0 <= eps < 1/2. Conservative DPO (Mitchell 2023, "A note on DPO with noisy
                     preferences"): the cross-entropy with the target 1 - eps,
                         mean[ -(1 - eps) log sigmoid(z) - eps log sigmoid(-z) ],     z = beta delta
                     For eps > 0 its minimum is at the finite z = log((1 - eps) / eps). It does not undo
                     flipped labels; robust_dpo_loss does. (TRL 1.16 has this option only for other losses,
                     such as 'robust'; with loss_type 'sigmoid', which is this loss, it has no effect.)
    Gradient of one pair in z: eps sigmoid(z) - (1 - eps) sigmoid(-z), which is -sigmoid(-z) for eps = 0.
    Raises ValueError for shapes other than (B,), B = 0, a reference that is not finite, beta not above 0, and eps out
    of range.
    """
    eps = checks.number("dpo_loss", "label_smoothing", label_smoothing, at_least=0, below=0.5)
    delta = _delta("dpo_loss", beta, policy_chosen, policy_rejected, reference_chosen, reference_rejected)
    B = delta.size
    z = beta * delta
    losses = (1 - eps) * stable_softplus(-z) + eps * stable_softplus(z)
    def vjp(dloss):
        dz = dloss * (eps * stable_sigmoid(z) - (1 - eps) * stable_sigmoid(-z)) / B
        return beta * dz, -beta * dz
    return _mean(losses), vjp


@primitive
def robust_dpo_loss(policy_chosen: Tensor, policy_rejected: Tensor, reference_chosen: np.ndarray,
                    reference_rejected: np.ndarray, beta: float = 0.1, flip_rate: float = 0.1):
    """DPO for labels that are flipped with probability eps = flip_rate < 1/2: a scalar.

        mean[ -(1 - eps) log sigmoid(z) + eps log sigmoid(-z) ] / (1 - 2 eps),       z = beta delta

    In expectation over the flips it is the loss on clean labels, if the flip rate is known: with L the loss of
    the true order and L' of the reversed one, the label is true with probability 1 - eps, so the expected loss is
    [ (1 - eps) ((1 - eps) L - eps L') + eps ((1 - eps) L' - eps L) ] / (1 - 2 eps) = L.
    Only this average over flips is at least 0. On a finite sample, with eps > 0, the loss is unbounded below:
    it keeps falling as delta of any pair grows.
    Gradient of one pair in z: -( (1 - eps) sigmoid(-z) + eps sigmoid(z) ) / (1 - 2 eps).
    Chowdhury et al. 2024, arXiv:2403.00409. Raises ValueError like dpo_loss.
    """
    eps = checks.number("robust_dpo_loss", "flip_rate", flip_rate, at_least=0, below=0.5)
    delta = _delta("robust_dpo_loss", beta, policy_chosen, policy_rejected, reference_chosen, reference_rejected)
    B = delta.size
    z = beta * delta
    losses = ((1 - eps) * stable_softplus(-z) - eps * stable_softplus(z)) / (1 - 2 * eps)
    def vjp(dloss):
        dz = -dloss * ((1 - eps) * stable_sigmoid(-z) + eps * stable_sigmoid(z)) / (1 - 2 * eps) / B
        return beta * dz, -beta * dz
    return _mean(losses), vjp


@primitive
def ipo_loss(policy_chosen: Tensor, policy_rejected: Tensor, reference_chosen: np.ndarray,
             reference_rejected: np.ndarray, beta: float = 0.1):
    """mean[ (delta - 1/(2 beta))^2 ], from log-probs summed over tokens, each (B,): a scalar.

    It gives delta a finite target. With DPO, delta grows without bound where y_w always wins.
    Derivation. Let mu be the distribution from which both responses y and y' were drawn, h = log(pi/pi_ref),
    and q the probability that y is preferred to y'. With y as y_w, delta is D = h(y) - h(y'). The expected loss is
        q (D - 1/(2 beta))^2 + (1 - q) (D + 1/(2 beta))^2 = (D - (2q - 1)/(2 beta))^2 + constant,
    averaged over y and y'. Exchanging y and y' changes the signs of D and of 2q - 1, so the square stays the same. The
    derivative of the average with respect to h(y) is 4 mu(y) E_{y' ~ mu}[D - (2q - 1)/(2 beta)], and 0 for every y if
        h(y) = E_{y' ~ mu}[(2q - 1)/(2 beta)] + constant = p(y)/beta + constant,
    with the win rate p(y) = E_{y' ~ mu}[q]. So the optimum is pi_ref exp(p/beta) / Z: pi* with p in place of the
    reward (tests/test_exact_optimum.py).
    At pi = pi_ref the loss is 1/(4 beta^2). Log-probs are summed, as in the paper; TRL averages them over tokens.
    Gradient of one pair in delta: 2 (delta - 1/(2 beta)).
    Azar et al. 2023, arXiv:2310.12036, (17); their tau is beta. Raises ValueError like dpo_loss.
    """
    delta = _delta("ipo_loss", beta, policy_chosen, policy_rejected, reference_chosen, reference_rejected)
    B = delta.size
    residual = delta - 1 / (2 * beta)
    def vjp(dloss):
        ddelta = 2 * dloss * residual / B
        return ddelta, -ddelta
    return (residual * residual).mean(), vjp


def length_normalised_dpo_loss(policy_chosen: Tensor, policy_rejected: Tensor, reference_chosen: np.ndarray,
                               reference_rejected: np.ndarray, chosen_lengths: np.ndarray,
                               rejected_lengths: np.ndarray, beta: float = 0.1) -> Tensor:
    """DPO on mean log-probs: each of the four log-probs in delta is divided by the length of its response.

    Log-probs summed over tokens, and lengths in tokens, all (B,). A longer response with the same mean log-probs does
    not change delta. beta multiplies a mean instead of a sum, so for a gradient of the same size it must be larger, by
    a factor of about the number of tokens.
    Lambert et al. 2024, arXiv:2411.15124, (6). Raises ValueError like dpo_loss, and for a length below 1: an empty
    response has no mean log-prob.
    """
    checks.same_shape("length_normalised_dpo_loss", policy_chosen=policy_chosen, policy_rejected=policy_rejected,
                      reference_chosen=reference_chosen, reference_rejected=reference_rejected,
                      chosen_lengths=chosen_lengths, rejected_lengths=rejected_lengths)
    xp = array_module(policy_chosen.data)
    def inverse(name, lengths):
        lengths = checks.finite("length_normalised_dpo_loss", name, lengths, "pair", at_least=1)
        return xp.asarray((1 / lengths).astype(policy_chosen.dtype))

    per_chosen = inverse("chosen_lengths", chosen_lengths)
    per_rejected = inverse("rejected_lengths", rejected_lengths)
    return dpo_loss(policy_chosen * per_chosen, policy_rejected * per_rejected,
                    xp.asarray(reference_chosen) * per_chosen, xp.asarray(reference_rejected) * per_rejected, beta=beta)


def dpo_metrics(policy_chosen: np.ndarray, policy_rejected: np.ndarray, reference_chosen: np.ndarray,
                reference_rejected: np.ndarray, beta: float = 0.1) -> dict[str, float]:
    """Metrics of B pairs under TRL's names, from arrays (B,).

    rewards/chosen, rewards/rejected  means of the implied rewards beta (log pi(y|x) - log pi_ref(y|x))
    rewards/margins     mean of the reward difference, chosen minus rejected
    rewards/accuracies  fraction of pairs with the larger implied reward for y_w. Equal ones count as
                        wrong, so it is 0 at the first step
    rewards/ties        fraction of pairs with equal implied rewards (TRL does not have it)
    logps/chosen, logps/rejected      means of log pi(y_w|x) and log pi(y_l|x)
    Raises ValueError for shapes other than (B,), B = 0, log-probs that are not finite, and beta not above 0.
    """
    checks.number("dpo_metrics", "beta", beta, above=0)
    policy_chosen, policy_rejected, reference_chosen, reference_rejected = checks.numbers(
        "dpo_metrics", "B", policy_chosen=policy_chosen, policy_rejected=policy_rejected,
        reference_chosen=reference_chosen, reference_rejected=reference_rejected)
    chosen = beta * (policy_chosen - reference_chosen)
    rejected = beta * (policy_rejected - reference_rejected)
    return {"rewards/chosen": float(chosen.mean()),
            "rewards/rejected": float(rejected.mean()),
            "rewards/margins": float((chosen - rejected).mean()),
            "rewards/accuracies": float((chosen > rejected).mean()),
            "rewards/ties": float((chosen == rejected).mean()),
            "logps/chosen": float(np.mean(policy_chosen)),
            "logps/rejected": float(np.mean(policy_rejected))}


def _delta(function, beta, policy_chosen, policy_rejected, reference_chosen, reference_rejected):
    """The difference of log-ratios in the formula above, (B,). Raises for arguments of `function` that are wrong."""
    checks.number(function, "beta", beta, above=0)
    checks.same_shape(function, axes="B", hint="pass log-probs summed over the tokens of each response",
                      policy_chosen=policy_chosen, policy_rejected=policy_rejected,
                      reference_chosen=reference_chosen, reference_rejected=reference_rejected)
    # With a reference of -inf the loss of a pair can be 0, and nothing would be learned from it.
    checks.numbers(function, "B", reference_chosen=reference_chosen, reference_rejected=reference_rejected)
    xp = array_module(policy_chosen, policy_rejected)
    return (policy_chosen - xp.asarray(reference_chosen)) - (policy_rejected - xp.asarray(reference_rejected))


def _mean(losses):
    """The mean. If all losses are equal, it is exactly their value, so the first loss of training is exactly log 2."""
    lowest = losses.min()
    return lowest + (losses - lowest).mean()
