"""The objectives, one file each, in the order of reading: sft, reward, kl, policy_gradient, kl_in_the_loss, dpo.

Each file has the same order: the formula and its gradient with the proof, the loss, its variants, the
metrics, private helpers. The functions take log-probs and rewards, never a model. Numbers that need a gradient
come as Tensors; references, masks, old log-probs and advantages are plain arrays.

To read a file you need the first 13 lines of tensor.py: `@primitive` turns a function of arrays that returns
(output, vjp) into a function of Tensors. The annotation Tensor says what the caller passes; inside the function
the argument is an array. vjp maps the gradient of the output to one gradient for each of the
first arguments; the references and masks after them get none. A function without @primitive works on the
Tensors themselves. xp is NumPy, or CuPy for arrays on a GPU (backend.py): read it as np. stable_sigmoid and
stable_softplus are the sigmoid and log(1 + exp), without overflow (ops.py). The functions of checks.py raise an error
for a wrong argument; otherwise they return the argument (a mask as booleans). same_shape returns the shape.

Symbols in every file:

    x, y          a prompt, a complete response to it
    t             counts the columns of log_probs. y_t is the token that column t scores: a token of y where the mask
                  is 1, of the prompt or of padding where it is 0. y_<t: the tokens of y before it
    y_w, y_l      the preferred response (`chosen` in code), the other one (`rejected`)
    pi, pi_ref    the policy, and the fixed reference; both are above 0 for every response, as a softmax is.
                  Inside a sum or an expectation over y, pi is short for pi(y|x)
    E[f]          sum_y pi(y|x) f(x,y), the expectation for one prompt; other distributions are written below it
    theta         the parameters of pi;  grad is the gradient with respect to theta
    log pi(y_t)   short for log pi(y_t | x, y_<t), an entry of `log_probs`. In README.md it is log π_t, and in sft.py
                  log pi(s_t), where t counts from the start of the prompt
    log pi(y|x)   the log-prob of the response: sum_t m_t log pi(y_t), the sum over the tokens of y
    r(x,y)        the reward;  beta: the weight of the KL penalty
    k1            log pi(y|x) - log pi_ref(y|x): an estimate of KL(pi || pi_ref) from one y drawn from pi
    R             r - beta k1, the reward minus the KL penalty;  J = E[R], the objective of RLHF
    b, A          the baseline, and the advantage A = R - b
    m_t           the mask: 1 on the tokens of a response, 0 on prompt and padding
    T             the number of columns of log_probs and mask, one for each predicted token: n tokens have
                  T = n - 1, because the first one is not predicted. Prompt positions may be among them; the
                  mask removes them. (In plain.py T counts the columns of the tokens: log_probs are (B,T-1).)
    B             sequences or pairs in a batch
    P, K, N       prompts, samples for each prompt, N = P K samples in all: a row is one sampled response

A complete response ends with an EOS token, which is one of its tokens, or at the limit of its length. So generation
always ends with exactly one complete response. The probabilities pi(y|x) of all complete responses therefore add up
to 1, and sum_y grad pi(y|x) = grad 1 = 0. The proofs use this.

How to add an objective: .github/CONTRIBUTING.md. Whether the expected gradient of an estimator is the
gradient that you mean: minilm.exact.gradients.compare_with_exact_gradient.
"""
