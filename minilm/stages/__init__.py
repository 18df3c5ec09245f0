"""One training loop per stage, without input or output: pretraining, sft, reward_model, rlhf, dpo.

A stage is a generator function over a TrainState (train_state.py). It yields the metrics of each step:

    state = TrainState(model, np.random.default_rng(0))
    for metrics in train_sft(state, prompts, responses, steps=100, batch_size=32):
        print(state.step, metrics["loss"])

plain.py has the same stages without packing and workers.
"""
