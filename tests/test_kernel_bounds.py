"""The predicted bounds of the kernels: formula, bytes that agree with those counted, measured times beside them."""

import json
import math

import pytest

import kernel_bounds
from kernel_bounds import CARDS, Card, Launch
from minilm.kernels import fused, fused_bf16, log_probs
from support.run_folder import UsageError

CARD = Card(bandwidth=100.0, float32=10.0, bfloat16=1000.0)


@pytest.mark.parametrize("launch, seconds, limit", [
    (Launch(50.0, 1.0), 0.5, "memory"), (Launch(50.0, 20.0), 2.0, "float32"),
    (Launch(50.0, 20.0, "bfloat16"), 0.5, "memory"), (Launch(50.0, 2000.0, "bfloat16"), 2.0, "bfloat16")])
def test_a_launch_takes_the_longer_of_its_bytes_and_its_operations(launch, seconds, limit):
    assert launch.seconds(CARD) == seconds and launch.limited_by(CARD) == limit


def test_the_bound_of_several_launches_is_their_sum():
    (line,) = [line for line in kernel_bounds.table().splitlines() if "| log_probs with the product, bf16 |" in line]
    launches = kernel_bounds.linear_log_probs(4096, 768, 50257, "bfloat16")
    expected = 1e3 * sum(max(x.bytes / 3.35e12, x.operations / 989e12) for x in launches)
    assert f"| {expected:.3g} ms |" in line and line.endswith("| not measured |")


def counted(found):
    """The bytes of {kernel: {argument: (read, written)}}."""
    return sum(sum(map(sum, operands.values())) for operands in found.values())


def test_bytes_are_at_most_those_that_the_kernels_move_and_near_them_where_nothing_is_read_again():
    """The counts of the emulator, which the tests of the kernels hold to these formulas."""
    least = {name: sum(launch.bytes for launch in launches) for name, _, launches, _ in kernel_bounds.cases()}
    N, D, F, heads, K, P = 8192, 768, 2048, 24, 64, 162148608
    moved = {"rms_norm, forward": counted(fused.rms_norm_forward_bytes(N, D, "float32")),
             "rms_norm, backward": counted(fused.rms_norm_backward_bytes(N, D, "float32")),
             "rms_norm_bf16, forward": counted(fused_bf16.rms_norm_bytes(N, D)),
             "swiglu_bf16, forward": counted(fused_bf16.swiglu_forward_bytes(N, F)),
             "swiglu_bf16, backward": counted(fused_bf16.swiglu_backward_bytes(N, F)),
             "rope_bf16": counted(fused_bf16.rope_bytes(N, heads, K)),
             "adamw": counted(fused.adamw_step_bytes(P, "float32")),
             "log_probs, forward": sum(log_probs.forward_bytes(4096, 50257, "float32")),
             "log_probs, backward": sum(log_probs.backward_bytes(4096, 50257, "float32"))}
    for name, bytes_moved in moved.items():
        assert 0.8 * bytes_moved < least[name] <= bytes_moved, name


def test_attention_counts_the_products_over_the_causal_half():
    B, H, T, K = 2, 3, 5, 4
    pairs = B * H * sum(range(1, T + 1))                # of a query and a key that it sees
    found = kernel_bounds.attention(B, H, H, T, K, 4, "float32")
    assert [launch.operations for launch in found["forward"]] == [2 * 2 * K * pairs]
    assert [launch.operations for launch in found["backward"]] == [0, 3 * 2 * K * pairs, 4 * 2 * K * pairs]
    # q, o, k, v and the log-sum-exp
    assert found["forward"][0].bytes == 4 * (4 * B * H * T * K + B * H * T)


def test_every_case_names_itself_once_and_is_slower_on_the_card_with_the_slower_memory():
    rows = list(kernel_bounds.cases())
    assert len({(name, size) for name, size, *_ in rows}) == len(rows)
    for name, _, launches, _ in rows:
        slow, fast = (sum(launch.seconds(CARDS[card]) for launch in launches) for card in ("H100 SXM", "H200 SXM"))
        assert 0 < fast <= slow < math.inf, name


def test_measured_times_stand_beside_the_predictions_with_the_name_of_the_card(tmp_path, monkeypatch):
    monkeypatch.setattr(kernel_bounds, "MEASURED", tmp_path)
    lines = kernel_bounds.table().splitlines()
    assert all(line.endswith("| not measured |") for line in lines[2:])
    rows = [{"table": "T = 2048, forward", "name": "minilm", "seconds": [3e-4, 2e-4, 4e-4]},
            {"table": "T = 2048, forward", "name": "torch, math", "seconds": [9e-4, 9e-4, 9e-4]}]
    (tmp_path / "attention.json").write_text(json.dumps({"machine": "NVIDIA H100 80GB HBM3, driver 1", "rows": rows}))
    (line,) = [line for line in kernel_bounds.table().splitlines() if not line.endswith("not measured |")][2:]
    assert line.startswith("| attention, forward | B 4, H 8, T 2048")
    assert line.endswith("| 300 us, NVIDIA H100 80GB HBM3 |")


@pytest.mark.parametrize("content", ["", "{}", '{"machine": "x", "rows": [{}]}', '{"machine": 1, "rows": []}'])
def test_a_damaged_file_of_measured_times_is_named(tmp_path, monkeypatch, content):
    monkeypatch.setattr(kernel_bounds, "MEASURED", tmp_path)
    (tmp_path / "attention.json").write_text(content)
    with pytest.raises(UsageError, match="attention.json"):
        kernel_bounds.table()


def test_the_tables_that_the_benchmarks_print_are_those_that_are_looked_up():
    """tests/test_gpu_benchmarks.py holds the names of the tables of attention at T = 70."""
    keys = {key for *_, key in kernel_bounds.cases() if key}
    bf16 = "bf16 (the share is of a product in float16)"
    assert {(f"T = {T}{end}, {direction}", f"minilm{name}") for T in (2048, 8192)
            for direction in ("forward", "backward") for end, name in (("", ""), (f", {bf16}", ", bf16"))} <= keys
    assert {("V = 50257, from logits, forward", "minilm"), ("V = 50257, from logits, backward", "minilm"),
            ("V = 50257, with the product, forward and backward", "minilm"),
            (f"V = 50257, with the product, forward and backward, {bf16}", "minilm")} <= keys
