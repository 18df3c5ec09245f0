"""python -m minilm.check: a function is held against every golden case, and the first difference is named."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import golden
from minilm import check
from minilm.objectives.dpo import dpo_loss

ROOT = Path(__file__).resolve().parents[1]
INDEX = check.read_index()
TOLERANCE = INDEX["tolerance"]
DPO = "policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta, label_smoothing=0.0"
RIGHT = f"""
import numpy as np

def dpo({DPO}):
    eps, z = label_smoothing, beta * ((policy_chosen - reference_chosen) - (policy_rejected - reference_rejected))
    loss = ((1 - eps) * np.logaddexp(0, -z) + eps * np.logaddexp(0, z)).mean()
    p = np.exp(-np.logaddexp(0, z))                         # sigmoid(-z)
    d = beta * (eps * (1 - p) - (1 - eps) * p) / len(z)
    return loss, d, -d
"""


@pytest.fixture
def run(tmp_path, capsys):
    """Exit status and printed lines of the command for a file with this text."""
    def command(text, function, name, *options):
        path = tmp_path / "mine.py"
        path.write_text(text)
        status = check.main([f"{path}:{function}", name, *options])
        return status, dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    yield command
    sys.modules.pop("_minilm_mine", None)
    while str(tmp_path) in sys.path:
        sys.path.remove(str(tmp_path))


def of(case, function, framework="numpy"):
    return check.check(function, INDEX["cases"][case], framework, TOLERANCE)


# Right functions agree.

@pytest.mark.parametrize("case", INDEX["cases"])
def test_our_own_functions_agree_with_all_results_of_every_case(case):
    verdict, words = of(case, golden.CASES[case][0].call, "minilm")
    assert (verdict, words.split(", ")) == ("agrees", [*INDEX["cases"][case]["results"]])


def test_a_tuple_is_the_result_and_its_gradients_in_order(run):
    status, lines = run(RIGHT, "dpo", "dpo_loss")
    assert status == 0
    assert lines == {case: "agrees: loss, dpolicy_chosen, dpolicy_rejected" for case in INDEX["cases"]
                     if case.startswith("dpo_loss")}
    assert len(lines) == 4


def test_a_dict_has_results_by_name_and_a_single_result_has_no_gradients(run):
    text = RIGHT + f"""
def by_name({DPO}):
    loss, dc, dr = dpo(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta, label_smoothing)
    return {{"dpolicy_rejected": dr, "loss": loss, "dpolicy_chosen": dc, "more": "ignored"}}

def alone({DPO}):
    return by_name(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta, label_smoothing)["loss"]
"""
    assert run(text, "by_name", "dpo_loss")[0] == 0
    status, lines = run(text, "alone", "dpo_loss")
    assert status == 0
    assert lines["dpo_loss"] == "agrees: loss; not given, not checked: dpolicy_chosen, dpolicy_rejected"


def test_metrics_need_no_prefix(run):
    text = "from minilm.objectives import reward\nmetrics = reward.reward_metrics"
    status, lines = run(text, "metrics", "reward_metrics")
    assert status == 0 and lines["reward_metrics"].startswith("agrees: metrics/accuracy, ")


def test_the_gradient_of_an_array_is_that_of_its_product_with_doutput(run):
    text = "import numpy as np\ndef f(policy, reference, doutput):\n    return policy - reference, doutput\n"
    assert run(text, "f", "k1") == (0, {"k1": "agrees: output, dpolicy"})
    wrong = text.replace(", doutput\n", ", np.ones_like(doutput)\n")
    status, lines = run(wrong, "f", "k1")
    assert status == 1 and lines["k1"].startswith("DIFFERS: dpolicy[0] is 1.0, expected ")


@pytest.mark.parity
def test_torch_differentiates_losses_and_arrays(run):
    pytest.importorskip("torch")
    text = f"""
from torch.nn.functional import logsigmoid

def dpo({DPO}):
    z = beta * ((policy_chosen - reference_chosen) - (policy_rejected - reference_rejected))
    return -((1 - label_smoothing) * logsigmoid(z) + label_smoothing * logsigmoid(-z)).mean()

def half({DPO}):
    return dpo(policy_chosen, policy_rejected.detach(), reference_chosen, reference_rejected, beta, label_smoothing)

def k2(policy, reference):
    return (policy - reference) ** 2 / 2
"""
    status, lines = run(text, "dpo", "dpo_loss", "--as", "torch")
    assert status == 0 and set(lines.values()) == {"agrees: loss, dpolicy_chosen, dpolicy_rejected"}
    assert run(text, "k2", "k2", "--as", "torch") == (0, {"k2": "agrees: output, dpolicy"})
    status, lines = run(text, "half", "dpo_loss", "--as", "torch")
    assert status == 1 and "dpolicy_rejected[0] is 0.0, expected " in lines["dpo_loss"]


# Wrong functions are found, and the first number that differs is named.

def with_array(name, change):
    """DPO with one of its three results changed."""
    names = ["loss", "dpolicy_chosen", "dpolicy_rejected"]

    def function(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta, label_smoothing):
        results = check.read_case(INDEX["cases"]["dpo_loss"])[1]
        results[name] = change(results[name])
        return tuple(results[key] for key in names)
    return function


def test_the_first_number_that_differs_is_named_with_its_index_and_both_values():
    expected = check.read_case(INDEX["cases"]["dpo_loss"])[1]["dpolicy_rejected"]

    def change(d):
        d = d.copy()
        d[1] += 1e-6
        d[3] = np.nan
        return d
    verdict, words = of("dpo_loss", with_array("dpolicy_rejected", change))
    assert verdict == "DIFFERS"
    assert words == (f"dpolicy_rejected[1] is {(expected[1] + 1e-6).item()!r}, expected {expected[1].item()!r} "
                     f"(2 of {len(expected)} differ)")


@pytest.mark.parametrize("change, found", [
    (lambda x: x * (1 + 1e-9), True), (lambda x: x * (1 + 1e-12), False), (lambda x: x * np.nan, True),
    (lambda x: x + np.inf, True), (lambda x: x.astype(np.float32), False),
    (lambda x: np.float32(x * (1 + 1e-3)), True)])
@pytest.mark.parametrize("name", ["loss", "dpolicy_chosen"])
def test_the_tolerance_is_1e_minus_10_and_1e_minus_4_for_float32(name, change, found):
    assert of("dpo_loss", with_array(name, change))[0] == ("DIFFERS" if found else "agrees")


def test_overflow_and_nan_outside_the_mask_are_found(run):
    text = RIGHT.replace("np.logaddexp(0, -z)", "np.log(1 + np.exp(-z))") + """
def sft(log_probs, mask, total=None):
    return -(log_probs * mask).sum() / (total or mask.sum())
"""
    with np.errstate(all="ignore"):
        status, lines = run(text, "dpo", "dpo_loss")
    assert status == 1 and lines["dpo_loss"].startswith("agrees")
    assert lines["dpo_loss_extreme"].startswith("DIFFERS: loss is inf, expected ")
    status, lines = run(text, "sft", "sft_loss")
    assert status == 1 and lines["sft_loss"].startswith("agrees")
    assert lines["sft_loss_masked_nan"].startswith("DIFFERS: loss is nan, expected ")


def test_one_case_that_differs_decides_the_status(run):
    """The first two cases, without label smoothing, differ; the last two agree."""
    text = RIGHT.replace("return loss, d, -d", "return loss * (1 if eps else 2), d, -d")
    status, lines = run(text, "dpo", "dpo_loss")
    assert status == 1 and [line.split(":")[0] for line in lines.values()] == ["DIFFERS", "DIFFERS", "agrees", "agrees"]


@pytest.mark.parametrize("returned, words", [
    ("np.zeros(3)", "DIFFERS: loss has shape (3,); it must have ()"), ("{}", "DIFFERS: there is no loss among your"),
    ("None", "DIFFERS: your function returned None; is there a return?"),
    ("{'loss': None}", "DIFFERS: loss is NoneType; it must be a number or an array"),
    ("1 / 0", "DIFFERS: it raised ZeroDivisionError: division by zero ("),
    ("np.ones(2) @ np.ones(3)", "DIFFERS: it raised ValueError: matmul: ")])
def test_wrong_results_and_errors_are_named(run, returned, words):
    status, lines = run(f"import numpy as np\ndef f({DPO}):\n    return {returned}\n", "f", "dpo_loss")
    assert status == 1 and lines["dpo_loss"].startswith(words)
    assert lines["dpo_loss"].endswith("mine.py, line 3)") == ("it raised" in words)


def test_a_leaf_on_which_the_loss_does_not_depend_has_a_gradient_of_0():
    def half(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta):
        return dpo_loss(policy_chosen, policy_rejected.data, reference_chosen, reference_rejected, beta)
    verdict, words = of("dpo_loss", half, "minilm")
    assert verdict == "DIFFERS" and "dpolicy_rejected" in words


@pytest.mark.parametrize("framework, returned, words", [
    ("minilm", "0.5", "DIFFERS: with --as minilm it must return a Tensor; it returned float"),
    ("minilm", "ops.mean(ops.log_softmax(0))", "DIFFERS: it raised "),
    pytest.param("torch", "0.5", "DIFFERS: with --as torch it must return a tensor; it returned float",
                 marks=pytest.mark.parity)])
def test_with_tensors_too_what_is_wrong_is_named_and_no_line_of_minilm(run, framework, returned, words):
    pytest.importorskip(framework)
    status, lines = run(f"from minilm import ops\n\ndef f({DPO}):\n    return {returned}\n", "f", "dpo_loss",
                        "--as", framework)
    assert status == 1 and lines["dpo_loss"].startswith(words)
    assert lines["dpo_loss"].endswith("mine.py, line 4)") == ("it raised" in words)
    assert "check.py" not in lines["dpo_loss"]


def test_a_file_that_python_cannot_read_is_a_mistake_with_its_line(run):
    with pytest.raises(check.Mistake, match=r"^Python cannot read .*mine.py: line 2: .*: def f\(:$"):
        run("import numpy\ndef f(:\n    return 1\n", "f", "dpo_loss")


def test_a_file_may_define_dataclasses_and_its_name_hides_no_module(run):
    text = """
from __future__ import annotations
import dataclasses

@dataclasses.dataclass
class Pair:
    z: float
"""
    of_that_name = sys.modules.get("mine")
    assert run(text + RIGHT, "dpo", "dpo_loss")[0] == 0
    assert sys.modules.get("mine") is of_that_name and sys.modules["_minilm_mine"].Pair(1.0).z == 1.0


# Arguments.

def test_a_case_with_an_argument_that_is_not_taken_is_left_out_unless_it_is_0(run):
    """label_smoothing is 0 in the plain cases."""
    text = RIGHT.replace(", label_smoothing=0.0):", "):").replace("eps, z = label_smoothing,", "eps, z = 0,")
    status, lines = run(text, "dpo", "dpo_loss")
    assert status == 0
    assert [line.split(":")[0] for line in lines.values()] == ["agrees", "agrees", "left out", "left out"]
    assert lines["dpo_loss_label_smoothing"] == ("left out: it has the argument label_smoothing, which your function "
                                                 "does not take")


def test_a_function_that_takes_no_case_is_a_mistake(run):
    with pytest.raises(check.Mistake, match="your function takes no case of dpo_loss; --list shows the arguments"):
        run("def f(chosen, rejected):\n    return 0.0\n", "f", "dpo_loss")


def test_a_function_may_change_its_arguments(run):
    text = RIGHT.replace("    return loss, d, -d", "    policy_chosen[:] = 0\n    return loss, d, -d")
    assert run(text, "dpo", "dpo_loss")[0] == 0


def test_the_file_may_import_its_neighbours(run, tmp_path):
    (tmp_path / "mine_too.py").write_text(RIGHT)
    assert run("from mine_too import dpo\n", "dpo", "dpo_loss")[0] == 0


# The command.

def test_the_list_has_every_function_with_its_arguments_and_cases(capsys):
    assert check.main(["--list"]) == 0
    text = capsys.readouterr().out
    lines = text.splitlines()
    assert len(lines) == 3 * len({entry["function"] for entry in INDEX["cases"].values()})
    assert lines[lines.index("    cases: dpo_loss, dpo_loss_extreme, dpo_loss_label_smoothing, "
                             "dpo_loss_label_smoothing_extreme") - 2] == (
        f"dpo_loss({DPO.removesuffix('=0.0')}) -> loss, dpolicy_chosen, dpolicy_rejected")
    assert all(case in text for case in INDEX["cases"])


@pytest.mark.parametrize("words, message", [
    (["mine.py:f"], "give FILE.py:function and NAME"), (["mine.py", "dpo_loss"], "must be FILE.py:function"),
    (["nosuch.py:f", "dpo_loss"], "must be FILE.py:function, with a file that exists"),
    (["mine.py:nosuch", "dpo_loss"], "mine.py has no function 'nosuch'"),
    (["mine.py:f", "dpo"], "there are no vectors of 'dpo'; there are some of sft_loss, "),
    (["--as", "jax"], "invalid choice: 'jax'"), (["--nosuch"], "unrecognized arguments: --nosuch")])
def test_a_mistake_in_the_command_is_named(words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text("f = len\n")
    with pytest.raises(check.Mistake, match=message):
        check.main(words)


def test_a_framework_that_is_not_installed_is_a_mistake(monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(check.Mistake, match="--as torch needs torch, which is not installed"):
        check.main(["mine.py:f", "dpo_loss", "--as", "torch"])


@pytest.mark.parametrize("text, status, printed", [
    (RIGHT, 0, "agrees: loss, dpolicy_chosen, dpolicy_rejected"),
    (RIGHT.replace("return loss, d, -d", "return loss, d, d"), 1, "DIFFERS: dpolicy_rejected[0] is -")])
def test_the_exit_status_says_whether_all_numbers_agree(text, status, printed, tmp_path):
    (tmp_path / "mine.py").write_text(text)
    done = subprocess.run([sys.executable, "-m", "minilm.check", "mine.py:dpo", "dpo_loss"], cwd=tmp_path,
                          capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (status, "")
    assert len(done.stdout.splitlines()) == 4 and printed in done.stdout


def test_a_closed_output_ends_the_command_quietly():
    done = subprocess.run(f"{sys.executable} -m minilm.check --list | head -n 1", shell=True, cwd=ROOT,
                          capture_output=True, text=True, timeout=60)
    assert done.stderr == "" and done.stdout.startswith("sft_loss(")


def test_the_vectors_are_those_of_the_checkout_or_of_the_package(monkeypatch, tmp_path):
    assert (check.folder() / "dpo_loss.npz").is_file()
    monkeypatch.setattr(check, "FOLDERS", (tmp_path,))
    with pytest.raises(check.Mistake, match="no golden vectors in .*; install minilm again"):
        check.folder()


def test_a_function_of_the_library_can_be_held_against_the_vectors_of_another_name():
    """As robust DPO with a flip rate of 0 is DPO: the name of the function is of no importance."""
    assert of("dpo_loss", dpo_loss, "minilm")[0] == "agrees"
    assert of("ipo_loss", dpo_loss, "minilm")[0] == "DIFFERS"
