"""One optimiser step: the loss, its gradient, clipping, the update, and what the step reports.

On a CPU the numbers of a step are known at once. A GPU executes a queue of kernels. When Python reads a number, it must
wait until the queue is empty, and then the GPU has no work until Python goes on. So on one GPU the loss, the norms and
the reports are copied to the host in one piece, and are read after the next step has been started. A loss or a gradient
that is not finite is then found one step late; the kernel of AdamW has left out that update and the next one.
Tests: tests/test_stages.py, tests/test_late.py.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from minilm import checks
from minilm.backend import is_cupy
from minilm.diverged import Diverged, first_bad_parameter, first_nonfinite
from minilm.readback import Readback, replaced
from minilm.stages.agreement import digest
from minilm.stages.train_state import TrainState
from minilm.tensor import Tensor


def train_step(state: TrainState, loss: Callable, batch_shards: Sequence, learning_rate: float, stage_name: str,
               clip: float = 1.0, drawn: Sequence = (), metrics: Callable = lambda reports: {}) -> Mapping:
    """One optimiser step down the sum of loss(model, shard) over batch_shards.

    loss returns (scalar Tensor, report). A report is of the kinds that ProcessGroup.all_gather takes. Each worker holds
    one shard in memory at a time, so more shards than workers is gradient accumulation. Errors begin with
    stage_name. `drawn`, arrays and token lists, is the batch of the whole step; the workers compare it (agreement.py).
    metrics: a function of the reports, one per shard, that gives further metrics, a dict.
    Returns {"loss", "grad_norm", "learning_rate"} and those metrics: a dict; on one GPU a Mapping that waits for the
    GPU when it is read, of which dict(metrics) makes a dict.
    Raises ValueError for no shards, for a learning rate out of range, for a loss without a gradient and as checked_loss
    does, RuntimeError as TrainState.check_owned does, and Diverged, before anything is updated, or when the update
    itself overflowed. On one GPU Diverged is raised when the metrics are read, at the latest after the next step. For a
    loss or a gradient that is not finite, the state then has neither of the two updates and the number of steps before
    them, but its Generator has drawn both batches.
    """
    where = f"{stage_name}, step {state.step + 1}"
    checks.number(where, "learning_rate", learning_rate, at_least=0)
    checks.integer(where, "the number of shards", len(batch_shards), at_least=1)
    state.check_owned()
    state.drawn = digest(drawn) if state.group.active_size > 1 else 0
    step = Step(where, state, loss, batch_shards)
    losses, reports = zip(*step.gradient())
    norm = state.optimizer.clip(clip)
    if not state.optimizer.trained_parameters:
        raise ValueError(f"{where}: no parameter of the model has a gradient; the loss must depend on one of them")

    def report(losses, norm, reports):
        return {"loss": sum(losses), "grad_norm": norm, "learning_rate": learning_rate, **metrics(reports)}

    if step.late:
        replaced(reports, lambda array: array)          # raises, before the update, for what cannot be copied
        length = state.optimizer.step_if_finite(learning_rate, [*losses, norm])
        return step.later(losses, norm, length, reports, report)
    step.check_norm(norm)
    length = state.optimizer.step(learning_rate)
    state.step += 1
    step.check_update(length)
    return report(losses, norm, reports)


class Step:
    """One step of a TrainState: its gradient, and what to say if something is not finite.

    late: whether its numbers stay on the GPU until after the next step.
    """

    def __init__(self, where: str, state: TrainState, loss: Callable, shards: Sequence):
        self.where = where
        self._state = weakref.ref(state)        # state.pending is this step: a circle would keep the model in memory
        self.loss: Any = loss
        self.shards: Any = shards
        self.late = is_cupy(state.optimizer.data) and state.group.size == 1
        self.before = state.step, state.optimizer.updates.copy()

    @property
    def state(self) -> TrainState:
        state = self._state()
        assert state is not None        # it is in use by the caller, or LateMetrics holds it
        return state

    def gradient(self) -> list:
        """Computes the gradient of all shards. Returns [(loss, report)] of each."""
        state = self.state
        state.optimizer.zero_grad()
        results, found = state.group.each(self._forward_backward, self.shards, then=state.optimizer.flat.collect)
        state.add_gradients(found)
        return results

    def _forward_backward(self, shard):
        value, report = self.loss(self.state.model, shard)
        number = checked_loss(self.where, value).data.reshape(())
        if not self.late:
            number = value.item()
            self.check_loss(number, shard)
        value.backward()
        return number, report

    def check_loss(self, number: float, shard: Any) -> None:
        """Raises Diverged if the loss of a shard is not finite, with the tensor that was the first."""
        if not math.isfinite(number):
            model = self.state.model
            bad = (first_bad_parameter(model.parameters(), "data")
                   or first_nonfinite(lambda: self.loss(model, shard)))
            raise Diverged(f"{self.where}: the loss is {number}; first bad tensor: {bad}")

    def check_norm(self, norm: float) -> None:
        """Raises Diverged if the norm of the gradient is not finite."""
        if not math.isfinite(norm):
            self.state.group.share(self.state.optimizer.grad)
            bad = (first_bad_parameter(self.state.model.parameters(), "grad")
                   or "none (the sum of squares overflowed)")
            raise Diverged(f"{self.where}: the gradient's norm is {norm}; first bad tensor: {bad}")

    def check_update(self, length: float) -> None:
        """Raises Diverged if a parameter is not finite after the update; length: their norm, which may overflow."""
        if not math.isfinite(length) and (bad := first_bad_parameter(self.state.model.parameters(), "data")):
            raise Diverged(f"{self.where}: the update went to NaN or infinity; first bad tensor: {bad}")

    # On one GPU.

    def later(self, losses: Sequence, norm: Any, length: Any, reports: Sequence, report: Callable) -> Mapping:
        """Reads the numbers of the step before, if they were not read. Returns the metrics of this one, unread."""
        self._readback = Readback((losses, norm, length, reports))
        self._report: Any = report
        self._error: Exception | None = None
        before, self.state.pending = self.state.pending, self
        self.state.step += 1
        if before is not None:
            before.settle()
        return LateMetrics(self)

    def settle(self) -> dict:
        """Waits for the GPU. Returns the metrics; raises Diverged, every time, if something was not finite."""
        if self._report is not None:
            try:
                self._metrics = self._look()
            except Diverged as error:
                self._error = error
            self._release()
        if self._error is not None:
            raise self._error
        return self._metrics

    def forget(self) -> None:
        """The state was set back to an earlier step: to read this one is an error from now on."""
        self._error = RuntimeError(f"{self.where}: the state was restored before this step's metrics were read")
        self._release()

    def _release(self):
        if self.state.pending is self:
            self.state.pending = None
        self.loss = self.shards = self._report = self._readback = None      # they may hold a whole batch

    def _look(self):
        losses, norm, length, reports = self._readback.get()
        losses = [float(number) for number in losses]
        norm = float(norm)
        if not all(map(math.isfinite, (*losses, norm))):
            self._take_back(losses, norm)
        self.check_update(float(length))
        return self._report(losses, norm, reports)

    def _take_back(self, losses, norm):
        """The kernel of AdamW has left out this update and those after it."""
        state = self.state
        state.pending = None
        state.step, state.optimizer.updates[...] = self.before
        state.optimizer.accept()
        for shard, number in zip(self.shards, losses):
            self.check_loss(number, shard)
        self.gradient()             # again: the arrays hold the gradient of the next step
        self.check_norm(norm)


class LateMetrics(Mapping):
    """The metrics of a step that a GPU may be computing still: reading one waits for the step."""

    def __init__(self, step: Step):
        self._step = step
        self._state: Any = step.state       # until the metrics are read: the step alone does not keep it

    def _read(self):
        try:
            return self._step.settle()
        finally:
            self._state = None

    def __getitem__(self, name):
        return self._read()[name]

    def __iter__(self):
        return iter(self._read())

    def __len__(self):
        return len(self._read())

    def __repr__(self):
        return repr(self._read())


def checked_loss(function: str, value: Tensor) -> Tensor:
    """The value of a loss function, unchanged.

    Raises ValueError unless it is a scalar Tensor that depends on a trained parameter.
    """
    if not isinstance(value, Tensor) or value.shape != () or value.node is None:
        raise ValueError(f"{function}: the loss is {checks.shown(value)}; it must be a scalar Tensor that depends on a "
                         "trained parameter")
    return value
