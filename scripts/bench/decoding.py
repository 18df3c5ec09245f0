"""Sampling by minilm and by transformers: the work that generate.py and align.py time.

Each function gives (step, check) for serve() of library_process.py. prompts is (B,T). A step draws `new` tokens for
each at temperature 1, and no response ends early. minilm's check saves its tokens to the file `drawn`, and the others
score these tokens one by one through their caches.
"""

import numpy as np


def by_minilm(model, prompts, new, drawn, workers, temperature=1.0):
    """temperature: of the tokens that are compared."""
    from minilm.generate import generate
    rng = np.random.default_rng(1)
    prompts = prompts.tolist()

    def step(temperature=1.0):
        return generate(model, prompts, new, rng, eos=None, temperature=temperature, workers=workers)

    def check():
        samples = step(temperature)
        np.save(drawn, samples.tokens)
        return {"log_probs": samples.log_probs, "shape": np.array(samples.tokens.shape)}
    return step, check


def by_transformers(model, prompts, new, drawn):
    import torch
    import transformers
    model.generation_config.eos_token_id = None             # otherwise it stands in for the None below
    T = prompts.shape[1]
    prompts = torch.from_numpy(prompts).to(model.device)
    real = torch.ones_like(prompts)
    settings = transformers.GenerationConfig(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=new,
                                             pad_token_id=0, eos_token_id=None)

    @torch.inference_mode()
    def step():
        return model.generate(prompts, attention_mask=real, generation_config=settings)[:, T:]

    def check():
        cache = transformers.DynamicCache()

        def next_logits(tokens):
            return model(tokens, past_key_values=cache, logits_to_keep=1).logits[:, -1]
        return {"log_probs": score(drawn, prompts, next_logits), "shape": np.array(step().shape)}
    return step, check


def score(drawn, prompts, next_logits):
    """The log-probs (B,R) of minilm's tokens. next_logits(tokens (B,T)) -> (B,V) continues the earlier calls."""
    import torch
    responses = torch.from_numpy(np.load(drawn)).to(prompts.device)
    tokens = prompts
    log_probs = []
    with torch.inference_mode():
        for t in range(responses.shape[1]):
            predicted = torch.log_softmax(next_logits(tokens).float(), -1)
            tokens = responses[:, t:t + 1]
            log_probs.append(predicted.gather(1, tokens))
    return torch.cat(log_probs, 1).cpu().numpy()
