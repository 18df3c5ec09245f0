"""No argument is silently taken for another one: settings out of range, masks of other values than 0 and 1, arrays that
NumPy would broadcast, indices that would count from the end, numbers that are not finite.

CALLS has a right call of every public function of the modules below, and the kind of each parameter. The tests
replace one argument by wrong ones of its kind. A new function, or a new parameter, fails until it is in the table.
"""
import inspect
import math

import numpy as np
import pytest
from hypothesis import given, strategies as st

from common.attention_maps import induction_scores
from common.early_stopping import keep_best
from common.frontier import frontier
from common.intervals import Comparison, outcome
from common.linear import bradley_terry, least_squares
from minilm import Tensor, evaluate, layers, ops, optim, packing, rotary
from minilm.data import make_batch
from minilm.exact import bias, enumerable, expectations, gradients
from minilm.exact.enumerable import EnumerableWorld
from minilm.generate import generate
from minilm.model import Config, RewardModel, Transformer
from minilm.objectives import dpo, kl, kl_in_the_loss, policy_gradient, reward, sft
from minilm.optim import AdamW
from worlds import instructions, mappings, rules
from worlds.markov import MarkovSource
from worlds.ngrams import NGram
from worlds.replies import ReplyWorld

MODULES = (sft, reward, kl, kl_in_the_loss, policy_gradient, dpo, evaluate, packing, enumerable, expectations,
           gradients, bias, layers, rotary, optim)
# Arrays without arguments that can be misread: NumPy's rules hold, or the caller is the fast path.
OTHERS = {"packing.pack", "layers.swiglu", "rotary.rotate",
          "rotary.pair_slices", "rotary.mix_keys", "layers.attention_without_tiles", "enumerable.entropy",
          "enumerable.preference", "expectations.tangent_kernel",
          "gradients.parameter_gradients", "gradients.compare_gradients", "gradients.compare_with_exact_gradient",
          "gradients.warn_if_near_uniform",
          "evaluate.predicted_rewards"}

ABOVE_0 = (0, -1.0, math.inf, math.nan, "0.1", None, [0.1], np.ones(2), True)
AT_LEAST_0 = ABOVE_0[1:]
FRACTION = (-0.1, 1.5, math.nan, "0.1")
BELOW_HALF = (*FRACTION, 0.5)
COUNT = (0, -1, 2.0, True, "2", math.nan)
FROM_0 = COUNT[1:]

P, K, N, T, B, Y = 2, 3, 6, 4, 3, 5
rng = np.random.default_rng(0)
normal = rng.normal


class Call:
    """A right call: the arguments by name, and which of them are of which kind (names, separated by spaces).

    shaped   arrays whose shape the other arguments determine
    masks    arrays of zeros and ones
    finite   arrays in which NaN and infinity are refused
    ids      arrays of indices below `count`
    settings for each setting, values that are out of its range or of another type
    free     whatever else: functions, models, arrays that determine the shape of the others
    of       the public function, if `function` only calls it
    """

    def __init__(self, function, shaped="", masks="", finite="", ids="", count=0, settings=None, free="", of=None,
                 **right):
        self.function = function
        self.of = of or function
        self.right = right
        self.shaped = shaped.split()
        self.masks = masks.split()
        self.finite = finite.split()
        self.ids = ids.split()
        self.count = count
        self.settings = settings or {}
        self.free = free.split()

    def __call__(self, **wrong):
        return self.function(**{**self.right, **wrong})


def mask(*shape):
    selected = np.ones(shape)
    selected.reshape(-1)[::3] = 0
    return selected


def distribution(*shape):
    z = normal(size=shape)
    return z - np.log(np.exp(z).sum(axis=-1, keepdims=True))


MODEL = Transformer(Config(vocab_size=5, width=4, layers=1, heads=2, context=8), rng, np.float64)
WORLD = EnumerableWorld([[1], [2]], 3, 2)
WORLD_MODEL = Transformer(Config(vocab_size=3, width=4, layers=1, heads=2, context=8), rng, np.float64)
WORLD_MODEL = gradients.redraw_weights(WORLD_MODEL, rng)
OTHER_MODEL = gradients.redraw_weights(WORLD_MODEL.copy(), rng)
ONE_PROMPT = EnumerableWorld([[1]], 3, 2)
REFERENCES = "reference_chosen reference_rejected"
ALL_PAIRS = "policy_chosen policy_rejected " + REFERENCES
PAIRS = {name: normal(size=B) for name in ALL_PAIRS.split()}
REWARDS = {"chosen_rewards": normal(size=B), "rejected_rewards": normal(size=B)}
SAMPLES = {"rewards": normal(size=(P, K)), "kl": normal(size=(P, K))}
KEYS = {"k": Tensor(normal(size=(P, 2, T, 4))), "v": Tensor(normal(size=(P, 2, T, 4)))}
DIALOGUES = {"prompts": [[1, 2], [3]], "responses": [[4], [1, 2]]}
NO_NUMBER_ABOVE_0 = tuple(value for value in ABOVE_0 if value is not None)
TOKEN_MEANS = (*NO_NUMBER_ABOVE_0, "sum")
BASELINES = ("mean ", "GROUP", None, 1)
TABLES = dict(zip(("cos", "sin"), layers.rope_tables(np.arange(T), 4, dtype="float64")))
LOG_PI = distribution(P, Y)

CALLS = {f"{call.of.__module__.rpartition('.')[2]}.{call.of.__name__}": call for call in (
    Call(sft.sft_loss, "mask", "mask", settings={"total": ABOVE_0[:3] + ("3",)}, free="log_probs",
         log_probs=normal(size=(N, T)), mask=mask(N, T)),
    Call(sft.sft_metrics, "log_probs mask predictions targets entropies", "mask", log_probs=normal(size=(N, T)),
         mask=mask(N, T), predictions=np.ones((N, T), int), targets=np.ones((N, T), int), entropies=np.ones((N, T))),
    Call(reward.reward_loss, "chosen_rewards rejected_rewards margin", finite="margin",
         settings={"centering": AT_LEAST_0}, **REWARDS, margin=np.ones(B)),
    Call(reward.reward_metrics, "chosen_rewards rejected_rewards", finite="chosen_rewards rejected_rewards", **REWARDS),
    *(Call(k, "policy reference", policy=normal(size=N), reference=normal(size=N)) for k in (kl.k1, kl.k2, kl.k3)),
    Call(kl.kl_metrics, "policy reference mask", "mask", policy=normal(size=(N, T)), reference=normal(size=(N, T)),
         mask=mask(N, T)),
    Call(kl_in_the_loss.k3_times_ratio, "policy old reference", policy=normal(size=N), old=normal(size=N),
         reference=normal(size=N)),
    Call(kl_in_the_loss.k3_times_mean_ratio, "policy old reference mask", "mask", policy=normal(size=(N, T)),
         old=normal(size=(N, T)), reference=normal(size=(N, T)), mask=mask(N, T)),
    Call(kl_in_the_loss.token_kl_loss, "terms mask", "mask", settings={"token_mean": TOKEN_MEANS},
         terms=normal(size=(N, T)), mask=mask(N, T)),
    Call(policy_gradient.policy_gradient_loss, "log_probs advantages mask", "mask", log_probs=normal(size=(N, T)),
         advantages=normal(size=N), mask=mask(N, T), settings={"token_mean": TOKEN_MEANS}),
    Call(policy_gradient.advantages, "rewards kl", finite="rewards kl", settings={"beta": AT_LEAST_0,
         "baseline": BASELINES}, **SAMPLES, beta=0.1),
    Call(policy_gradient.reward_to_go, "rewards token_kl mask", "mask", "rewards", settings={"beta": AT_LEAST_0,
         "baseline": (*BASELINES, "group")}, rewards=normal(size=(P, K)), token_kl=normal(size=(P, K, T)),
         mask=mask(P, K, T), beta=0.1),
    Call(policy_gradient.ppo_clip_loss, "log_probs old_log_probs advantages mask", "mask",
         settings={"epsilon": ABOVE_0, "level": ("tokens", None),
         "epsilon_high": NO_NUMBER_ABOVE_0, "token_mean": TOKEN_MEANS}, log_probs=normal(size=(N, T)),
         old_log_probs=normal(size=(N, T)), advantages=normal(size=N), mask=mask(N, T)),
    Call(policy_gradient.policy_gradient_metrics, "rewards kl mask entropies", "mask", "rewards kl", **SAMPLES,
         mask=mask(N, T), entropies=np.ones((N, T))),
    Call(dpo.dpo_loss, ALL_PAIRS, finite=REFERENCES, **PAIRS,
         settings={"beta": ABOVE_0, "label_smoothing": BELOW_HALF}),
    Call(dpo.robust_dpo_loss, ALL_PAIRS, finite=REFERENCES, **PAIRS,
         settings={"beta": ABOVE_0, "flip_rate": BELOW_HALF}),
    Call(dpo.ipo_loss, ALL_PAIRS, finite=REFERENCES, settings={"beta": ABOVE_0}, **PAIRS),
    Call(dpo.length_normalised_dpo_loss, ALL_PAIRS + " chosen_lengths rejected_lengths",
         finite=REFERENCES + " chosen_lengths rejected_lengths", settings={"beta": ABOVE_0}, **PAIRS,
         chosen_lengths=np.array([1, 2, 3.0]), rejected_lengths=np.array([3, 2, 1.0])),
    Call(dpo.dpo_metrics, ALL_PAIRS, finite=ALL_PAIRS, settings={"beta": ABOVE_0}, **PAIRS),

    Call(evaluate.mean_and_error, finite="values", free="values", values=normal(size=N)),
    Call(evaluate.wins, "rewards others", finite="rewards others", rewards=normal(size=N), others=normal(size=N)),
    Call(evaluate.best_of_n_kl, settings={"n": COUNT}, n=4),
    Call(evaluate.sequence_kl, settings={"batch_size": COUNT, "temperature": ABOVE_0, "workers": COUNT},
         free="policy reference prompts responses", policy=MODEL, reference=MODEL, **DIALOGUES),
    Call(lambda **given: list(packing.packs(**given)), of=packing.packs, settings={"batch_size": COUNT},
         free="prompts responses context last", **DIALOGUES, batch_size=2),
    Call(packing.scatter, "values", "mask", values=normal(size=int(mask(N, T).sum())), mask=mask(N, T)),

    Call(enumerable.expectation, "log_pi values", log_pi=LOG_PI, values=LOG_PI),
    Call(enumerable.divergence, "log_pi log_q", log_pi=LOG_PI, log_q=LOG_PI),
    Call(enumerable.total_variation, "log_pi log_q", log_pi=LOG_PI, log_q=LOG_PI),
    Call(enumerable.objective, "log_pi reference rewards", settings={"beta": AT_LEAST_0}, log_pi=LOG_PI,
         reference=LOG_PI, rewards=LOG_PI, beta=0.1),
    Call(enumerable.objective_gradient, "log_pi reference rewards", settings={"beta": AT_LEAST_0}, log_pi=LOG_PI,
         reference=LOG_PI, rewards=LOG_PI, beta=0.1),
    Call(enumerable.optimum, "reference rewards", settings={"beta": ABOVE_0}, reference=LOG_PI, rewards=LOG_PI,
         beta=0.1),
    Call(enumerable.ipo_optimum, "reference log_mu rewards", settings={"beta": ABOVE_0}, reference=LOG_PI,
         log_mu=LOG_PI, rewards=LOG_PI, beta=0.1),
    Call(enumerable.best_of_n, "log_pi scores", settings={"n": COUNT}, log_pi=LOG_PI, scores=LOG_PI, n=2),
    Call(expectations.comparisons, "log_mu rewards", settings={"flip_rate": FRACTION}, log_mu=LOG_PI, rewards=LOG_PI),
    Call(expectations.gradient_over_comparisons, "probabilities values", free="loss", loss=lambda a, b: ops.mean(a - b),
         probabilities=np.ones((P, Y, Y)), values=normal(size=(P, Y))),
    Call(expectations.gradient_over_samples, "log_probs mask drawn_from", "mask", free="loss",
         settings={"samples": COUNT, "most_outcomes": (0, -1, math.nan)}, loss=lambda leaf, drawn: ops.sum(leaf),
         log_probs=normal(size=(P, Y, T)), mask=mask(P, Y, T), samples=1, drawn_from=LOG_PI),
    Call(lambda **given: list(expectations.descend(**given)), of=expectations.descend,
         settings={"steps": FROM_0, "learning_rate": AT_LEAST_0}, free="model world gradient",
         model=WORLD_MODEL.copy(), world=WORLD, gradient=np.zeros_like, steps=1, learning_rate=0.1),
    Call(bias.bias, "rewards", finite="rewards", settings={"beta": AT_LEAST_0, "samples": COUNT,
         "temperature": ABOVE_0, "most_outcomes": (0, -1, math.nan)},
         free="loss world policy reference drawn_from arrays", loss=lambda log_probs, drawn: ops.sum(log_probs),
         world=ONE_PROMPT, policy=WORLD_MODEL, reference=OTHER_MODEL, rewards=normal(size=ONE_PROMPT.shape), beta=0.1),
    Call(gradients.redraw_weights, settings={"scale": ABOVE_0}, free="model rng", model=MODEL.copy(), rng=rng),

    Call(layers.rms_norm, "weight", settings={"eps": (-1e-6, math.inf, math.nan)}, free="x kernel",
         x=Tensor(normal(size=(N, T))), weight=np.ones(T)),
    Call(layers.rope_tables, settings={"base": ABOVE_0, "head_width": (*COUNT, 3)}, free="positions dtype",
         positions=np.arange(T), head_width=4),
    Call(layers.rope, "cos sin", settings={"pairing": ("halves", None)}, free="x", x=Tensor(normal(size=(P, 2, T, 4))),
         **TABLES),
    Call(layers.smear, "amount previous_key", free="k", k=Tensor(normal(size=(P, 2, T, 4))), amount=normal(size=(2, 4)),
         previous_key=np.zeros((P, 2, 4))),
    Call(layers.attention, "k v key_mask", "key_mask", settings={"scale": (0, -1.0, math.inf, math.nan, "1")},
         free="q causal kernel", q=Tensor(normal(size=(P, 2, T, 4))), **KEYS, key_mask=mask(P, T)),
    Call(layers.token_log_probs, "targets", ids="targets", count=5, settings={"chunk": COUNT},
         free="hidden unembedding kernel train_unembedding", hidden=Tensor(normal(size=(N, 4))),
         unembedding=Tensor(normal(size=(5, 4))), targets=np.arange(N) % 5),
    Call(layers.token_log_probs_without_chunks, ids="targets", count=5, free="hidden unembedding",
         hidden=Tensor(normal(size=(N, 4))), unembedding=Tensor(normal(size=(5, 4))), targets=np.arange(N) % 5),
    Call(layers.sequence_log_probs, "mask", "mask", free="log_probs", log_probs=Tensor(normal(size=(N, T))),
         mask=mask(N, T)),

    Call(ops.where, masks="condition", free="x y", condition=mask(N, T), x=Tensor(normal(size=(N, T))), y=0.0),
    Call(ops.gather, "indices", ids="indices", count=5, free="x", x=Tensor(normal(size=(N, 5))),
         indices=np.arange(N) % 5),
    Call(ops.embed, ids="indices", count=5, free="table", table=Tensor(normal(size=(5, 4))), indices=np.arange(N) % 5),
    Call(ops.clip, settings={"low": (3.0, math.nan), "high": (-3.0, math.nan)}, free="x", x=Tensor(normal(size=N)),
         low=-1.0, high=1.0),
    Call(lambda **given: WORLD.take(**given), of=WORLD.take, ids="drawn", count=WORLD.shape[1], free="values",
         values=normal(size=WORLD.shape), drawn=np.array([[0, 1], [2, 3]])),
    Call(optim.warmup_cosine, settings={"step": FROM_0, "steps": COUNT, "peak": AT_LEAST_0, "warmup": FROM_0,
         "floor": FRACTION}, step=0, steps=10, peak=1.0, warmup=2),
)}


def cases(kind):
    return pytest.mark.parametrize("name, parameter", [(name, parameter) for name, call in CALLS.items()
                                                       for parameter in getattr(call, kind)])


def refused(call, parameter, wrong, *errors):
    """The call raises one of these errors, whose words name the parameter or the function."""
    with pytest.raises(errors) as raised:
        call(**{parameter: wrong})
    words = str(raised.value)
    assert parameter in words or call.of.__name__ in words, words


# The table is complete.

def test_every_public_function_is_in_the_table():
    public = {f"{module.__name__.rpartition('.')[2]}.{name}" for module in MODULES
              for name, f in inspect.getmembers(module, inspect.isfunction)
              if f.__module__ == module.__name__ and not name.startswith("_")}
    assert public - CALLS.keys() == OTHERS, "add a Call, or, if nothing can be misread, a name to OTHERS"


@pytest.mark.parametrize("name", CALLS)
def test_every_parameter_has_a_kind(name):
    call = CALLS[name]
    kinds = {*call.shaped, *call.masks, *call.finite, *call.ids, *call.settings, *call.free}
    parameters = inspect.signature(call.of).parameters.values()
    assert kinds == {p.name for p in parameters if p.kind is not p.VAR_POSITIONAL}


@pytest.mark.parametrize("name", CALLS)
def test_the_right_arguments_are_accepted(name):
    CALLS[name]()


# Kinds of wrong arguments.

@cases("settings")
def test_a_setting_out_of_range_or_of_another_type_is_named(name, parameter):
    for wrong in CALLS[name].settings[parameter]:
        refused(CALLS[name], parameter, wrong, ValueError, TypeError)


def other_shapes(a):
    """Arrays of other shapes, most of which NumPy would broadcast: one axis more or less, an axis of another length."""
    yield a[..., None]
    if a.ndim:
        yield np.asarray(a[0])
    for axis in range(a.ndim):
        yield a.take([], axis)
        yield np.concatenate([a, a.take([0], axis)], axis)
        if a.shape[axis] > 1:
            yield a.take([0], axis)


@cases("shaped")
def test_an_array_of_another_shape_is_refused_and_never_broadcast(name, parameter):
    right = CALLS[name].right[parameter]
    for wrong in other_shapes(right.data if isinstance(right, Tensor) else right):
        if parameter != "margin" or wrong.ndim:                     # a margin may be one number for all pairs
            refused(CALLS[name], parameter, Tensor(wrong) if isinstance(right, Tensor) else wrong, ValueError)


NO_MASK = st.one_of(st.sampled_from([2, 255, -1, -100, 0.5, 1 + 1e-15, math.nan, math.inf]),
                    st.integers(-2 ** 31, 2 ** 31).filter(lambda value: value not in (0, 1)),
                    st.floats().filter(lambda value: value not in (0, 1)))


@cases("masks")
@given(value=NO_MASK, place=st.integers(0, 10 ** 6))
def test_a_mask_with_another_value_than_0_and_1_is_refused_wherever_it_stands(name, parameter, value, place):
    wrong = np.array(CALLS[name].right[parameter], np.asarray(value).dtype)
    wrong.reshape(-1)[place % wrong.size] = value
    refused(CALLS[name], parameter, wrong, ValueError)


@cases("masks")
@pytest.mark.parametrize("dtype", [bool, int, "uint8", "float32", float])
def test_a_mask_of_any_type_selects_the_same(name, parameter, dtype):
    right = CALLS[name].right[parameter]
    for ours, expected in zip(numbers(CALLS[name](**{parameter: right.astype(dtype)})), numbers(CALLS[name]())):
        np.testing.assert_array_equal(ours, expected)


def numbers(result):
    if isinstance(result, dict):
        return list(result.values())
    return [result.data if isinstance(result, Tensor) else result]


@cases("finite")
def test_a_number_that_is_not_finite_is_refused_wherever_it_stands(name, parameter):
    for wrong in (math.nan, math.inf, -math.inf):
        for place in range(CALLS[name].right[parameter].size):
            values = CALLS[name].right[parameter].copy()
            values.reshape(-1)[place] = wrong
            refused(CALLS[name], parameter, values, ValueError)


@cases("ids")
def test_an_index_out_of_range_does_not_count_from_the_end_and_none_is_rounded(name, parameter):
    call = CALLS[name]
    for wrong in (-1, -100, call.count):
        values = call.right[parameter].copy()
        values.reshape(-1)[1] = wrong
        refused(call, parameter, values, IndexError)
    refused(call, parameter, call.right[parameter] + 0.5, TypeError)
    refused(call, parameter, call.right[parameter].astype(float), TypeError)


# Classes: their settings are named, each field and each parameter.

CONFIG = {**dict.fromkeys(("vocab_size", "width", "layers", "heads", "context"), (*COUNT, None)),
          **dict.fromkeys(("kv_heads", "head_width", "ffn_width"), COUNT),
          **dict.fromkeys(("causal", "tied", "key_smear"), (0, 1, "no", None, np.ones(2))),
          "rope_base": ABOVE_0, "norm_eps": AT_LEAST_0, "rope_pairing": ("quarter", None, 1)}


def test_every_field_of_a_config_is_checked_and_named():
    assert CONFIG.keys() == Config.__dataclass_fields__.keys()
    for name, values in CONFIG.items():
        for wrong in values:
            with pytest.raises((ValueError, TypeError), match=f"Config: {name} is "):
                Config(**{name: wrong})


def test_numpys_integers_become_pythons_in_a_config():
    assert all(type(size) is int for size in vars(Config(width=np.int64(8), heads=np.int32(2))).values()
               if not isinstance(size, (bool, float, str)))


OPTIMISER = {"learning_rate": AT_LEAST_0, "eps": ABOVE_0, "weight_decay": AT_LEAST_0,
             "betas": ((-0.1, 0.9), (0.9, 1.0), (0.9, math.nan), (0.9, None), ("0.9", 0.95), 0.9, None, (0.9,),
                       (0.9, 0.95, 0.99), {0: 0.9, 1: 0.95})}


def test_every_setting_of_the_optimiser_is_checked_where_it_is_given_and_before_each_step():
    assert {*OPTIMISER, "parameters", "group"} == set(inspect.signature(AdamW).parameters)
    for name, values in OPTIMISER.items():
        for wrong in values:
            x = Tensor(np.ones(3), requires_grad=True)
            with pytest.raises((ValueError, TypeError), match=f"AdamW: {name}"):
                AdamW({"x": x}, **{name: wrong})
            optimiser = AdamW({"x": x})
            ops.sum(x).backward()
            setattr(optimiser, name, wrong)
            if not (name == "learning_rate" and wrong is None):     # None: the optimiser's own
                with pytest.raises((ValueError, TypeError), match=f"AdamW: {name}"):
                    optimiser.step()
            assert (x.data == 1).all()


def test_an_optimiser_takes_a_dict_of_leaves():
    leaf = Tensor(np.ones(3), requires_grad=True)
    for wrong in (MODEL, [leaf], {}, None, {"x": np.ones(3)}, {"x": leaf, "y": leaf * 2}):
        with pytest.raises(TypeError, match="AdamW: parameters is .*; it must be a dict of leaves"):
            AdamW(wrong)


@pytest.mark.parametrize("name, wrong", [("m", [math.nan] * 3), ("v", [math.inf] * 3), ("v", [0, -1.0, 0]),
                                         ("m", [1j] * 3), ("steps", [-1]), ("steps", [1.5]), ("steps", [math.nan])])
def test_a_state_that_no_optimiser_has_is_refused_and_changes_nothing(name, wrong):
    optimiser = AdamW({"x": Tensor(np.ones(3), requires_grad=True)})
    optimiser.m[:] = 5
    before = {key: array.copy() for key, array in optimiser.state().items()}
    with pytest.raises((TypeError, ValueError, IndexError), match=f"AdamW.load_state: {name}"):
        optimiser.load_state({**before, "m": before["m"] * 2, name: np.array(wrong)})
    assert all(np.array_equal(before[key], array) for key, array in optimiser.state().items())


def test_a_limit_of_the_gradients_norm_is_above_0_and_infinity_only_measures():
    x = Tensor(np.ones(4), requires_grad=True)
    optimiser = AdamW({"x": x})
    ops.sum(x).backward()
    for wrong in (*ABOVE_0[:2], math.nan, -math.inf, None, "1"):
        with pytest.raises((ValueError, TypeError), match="clip: max_norm is "):
            optimiser.clip(wrong)
    assert optimiser.clip(math.inf) == 2 and (x.grad == 1).all()


@pytest.mark.parametrize("wrong", [None, {}, "model", Transformer, RewardModel(MODEL, rng)])
def test_what_is_no_transformer_is_named(wrong):
    with pytest.raises(TypeError, match="Transformer: config is .*; it must be a Config"):
        Transformer(wrong, np.random.default_rng(0))
    with pytest.raises(TypeError, match="RewardModel: transformer is .*; it must be a Transformer"):
        RewardModel(wrong, np.random.default_rng(0))
    with pytest.raises(TypeError, match="generate: model is .*; it must be a Transformer"):
        generate(wrong, [[1]], 1, np.random.default_rng(0), None)


def test_a_model_takes_a_generator_and_a_dtype_of_floats():
    config = Config(vocab_size=5, width=4, layers=1, heads=2)
    for dtype in (int, np.float16, bool):
        with pytest.raises(TypeError, match="Transformer: dtype is .*; it must be float32 or float64"):
            Transformer(config, np.random.default_rng(0), dtype)
    for seed in (0, None, np.random.RandomState(0)):
        with pytest.raises(TypeError, match="rng is .*; it must be a numpy Generator"):
            Transformer(config, seed)
        with pytest.raises(TypeError, match="rng is .*; it must be a numpy Generator"):
            RewardModel(MODEL, seed)


# Masks, tokens and packs of a model.

@given(value=NO_MASK, place=st.integers(0, 7))
def test_the_padding_mask_of_a_model_holds_0_and_1(value, place):
    tokens = np.ones((2, 4), int)
    wrong = np.ones((2, 4), np.asarray(value).dtype)
    wrong.reshape(-1)[place] = value
    reads = RewardModel(MODEL, np.random.default_rng(0))
    for use in (MODEL.hidden, MODEL, reads.rewards):
        with pytest.raises(ValueError, match="it must hold 0 and 1 alone"):
            use(tokens, wrong)


def test_tokens_of_a_model_are_integers_of_its_vocabulary_in_a_rectangle():
    for wrong, error in ((np.ones((2, 3)), ValueError), (np.ones(3, int), ValueError), ([[1, 2, -1]], IndexError),
                         ([[1, 2, 5]], IndexError), ([[-100, 2, 1]], IndexError)):
        with pytest.raises(error, match="token|targets holds"):
            MODEL.log_probs(wrong)
    for prompts, error in (([[1.9, 2.2]], TypeError), ([[-1, 2]], IndexError), ([[1, 5]], IndexError)):
        for dialogue in ((prompts, [[1, 2]]), ([[1, 2]], prompts)):
            with pytest.raises(error):
                MODEL.response_log_probs(packing.pack(*dialogue))


@pytest.mark.parametrize("make", [packing.pack, lambda *pairs: make_batch(*pairs, pad=0)], ids=["pack", "batch"])
def test_tokens_of_dialogues_are_integers_from_0_and_none_is_rounded(make):
    for wrong, error in (([1.9, 2.2], TypeError), ([1, 2.0], TypeError), (["1"], TypeError),
                         ([1, -1], IndexError), ([-100], IndexError)):
        for dialogues in (([[1], wrong], [[1], [2]]), ([[1], [1]], [[2], wrong])):
            with pytest.raises(error):
                make(*dialogues)


def test_rewards_are_read_from_a_pack_with_last_tokens_alone():
    model = RewardModel(MODEL, np.random.default_rng(0))
    with pytest.raises(ValueError, match=r"packed_rewards: the pack lacks the last tokens.*last=True"):
        model.packed_rewards(packing.pack(*DIALOGUES.values()))
    assert model.packed_rewards(packing.pack(*DIALOGUES.values(), last=True)).shape == (2,)


@pytest.mark.parametrize("use", [evaluate.sequence_kl, evaluate.predicted_rewards])
def test_all_dialogues_are_checked_before_the_first_is_measured(use):
    models = (MODEL, MODEL) if use is evaluate.sequence_kl else (RewardModel(MODEL, np.random.default_rng(0)),)
    for prompts, responses in (([], []), ([[1], [2]], [[1], [2], [3]]), ([[1], [2], [3]], [[1], [2]]),
                               ([[1], [2]], [[1], []])):
        with pytest.raises(ValueError, match="packs: (. prompts, . responses|dialogue 1, responses)"):
            use(*models, prompts, responses, batch_size=2)
    for wrong in COUNT:
        with pytest.raises((ValueError, TypeError), match="batch_size is "):
            use(*models, [[1]], [[2]], batch_size=wrong)


def test_the_tables_of_one_position_are_not_those_of_all():
    x = Tensor(normal(size=(P, 2, T, 4)))
    for positions, width in ((1, 4), (T, 2)):
        with pytest.raises(ValueError, match="expected x .*cos and sin"):
            layers.rope(x, *layers.rope_tables(np.arange(positions), width, dtype="float64"))


# Truth of a Tensor.

def test_a_tensor_of_one_number_is_true_or_false_and_one_of_several_is_neither():
    assert Tensor(0.5) and Tensor([[0.5]]) and not Tensor(0.0)
    with pytest.raises(ValueError, match="ambiguous"):
        bool(Tensor([1.0, 2.0]))


# The worlds and the measures of the lecture.

REPLIES = ReplyWorld(1)
UNIFORM = np.full(REPLIES.shape, -math.log(REPLIES.shape[1]))
ONE_REPLY = np.where(np.arange(REPLIES.shape[1]) == 3, 0.0, -1e3) + 0 * UNIFORM
SHOWN = [Comparison("gain", [1.0, 1.1, 1.2], above=0)]
WORD = np.zeros((1, 3), int)


@pytest.mark.parametrize("use, name", [
    (lambda: frontier([0, 1, 2], [0, 1]), "rewards"), (lambda: frontier([0, math.nan], [0, 1]), "divergences"),
    (lambda: least_squares(np.ones((2, 3)), np.ones((2, 1))), "ratings"),
    (lambda: least_squares(np.ones((2, 3)), np.ones(2), 0), "ridge"),
    (lambda: bradley_terry(np.ones((2, 3)), -1.0), "ridge"),
    (lambda: bradley_terry(np.ones((2, 3)), 1.0, 0), "iterations"),
    (lambda: keep_best([], MODEL, lambda: 0.0, 0), "every"), (lambda: outcome(SHOWN, at_least=0), "at_least"),
    (lambda: outcome(SHOWN, at_least=2), "at_least"), (lambda: Comparison("gain", [1.0], above=math.nan), "above"),
    (lambda: induction_scores(np.ones((1, 1, 1, 3, 3)), np.ones((1, 3)), np.full((1, 3), 0.5)), "queries"),
    (lambda: MarkovSource(rng, 3, 2.0), "order"), (lambda: MarkovSource(rng, 3, 1, 0.0), "concentration"),
    (lambda: MarkovSource(rng, 3, 1).log_probs(np.array([[0, 1, -1]])), "tokens"),
    (lambda: NGram(np.array([0, 1, 3]), 3), "stream"), (lambda: NGram(np.array([0, 1, -1]), 3), "stream"),
    (lambda: NGram(np.array([0, 1, 2]), 3).log_probs(np.array([0, 3])), "stream"),
    (lambda: mappings.draw(rng, 2, in_use=9), "in_use"), (lambda: rules.labels(WORD, -1), "rule"),
    (lambda: instructions.carry_out([(6, 0)], WORD), "first operation"),
    (lambda: instructions.carry_out([(0, 1)], WORD), "second operation"),
    (lambda: REPLIES.demonstrations(rng, 1, right=1.5), "right"),
    (lambda: REPLIES.demonstration_distribution(-0.5), "right"), (lambda: REPLIES.draw(UNIFORM, rng, [-1]), "prompts"),
    (lambda: REPLIES.draw(UNIFORM[:, :3], rng, [0]), "log_pi"),
    (lambda: REPLIES.draw(UNIFORM * math.nan, rng, [0]), "log_pi"),
    (lambda: REPLIES.comparisons(UNIFORM, UNIFORM[0], rng, 2), "utility"),
    (lambda: REPLIES.comparisons(UNIFORM, UNIFORM, rng, 2, flip_rate=2), "flip_rate"),
    (lambda: REPLIES.comparisons(ONE_REPLY, UNIFORM, rng, 2), "one reply alone")])
def test_what_cannot_be_meant_in_a_world_or_a_measure_of_the_lecture_is_refused_by_name(use, name):
    with pytest.raises((ValueError, TypeError, IndexError), match=name):
        use()
