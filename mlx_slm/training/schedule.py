"""How a training goes on from step to step: its rate, when it is evaluated, and when it ends.

A fine-tuning (a schedule with `patience`) tries twice. At a constant rate it finds out how many steps the text is
worth: until the validation loss has not improved for `patience` evaluations. Then it begins again from the start, and
the rate falls linearly to zero within `again` times as many steps. Where the horizon comes first, there is no second
try: the rate falls to zero by the horizon. The best evaluation of all counts, that of the start too.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field

from mlx_slm.training.optimizer import learning_rate


@dataclass
class State:
    """Where a run is. Saved with every checkpoint, so that a resumed run goes on as if nothing had happened."""

    step: int = 0
    tokens: int = 0
    """Target tokens seen."""
    seconds: float = 0.0
    skipped: int = 0
    """Steps that were not finite and left the weights alone."""
    best_step: int | None = None
    best_nll: float = math.inf
    last_nll: float = math.inf
    """The newest evaluation."""
    stale: int = 0
    """Evaluations since the best."""
    fall: tuple[int, int] | None = None
    """The step after which the rate began to fall, and the one after which it is zero."""
    second: bool = False
    """Whether that is a second try, from the start."""
    window: dict = field(default_factory=lambda: {"loss": 0.0, "tokens": 0, "steps": 0, "seconds": 0.0})
    """Sums since the last report."""
    arithmetic: str = ""
    """`runtime.arithmetic()` of the last step."""

    def to_json(self) -> dict:
        values = asdict(self)
        return {k: None if v == math.inf else v for k, v in values.items()}

    @classmethod
    def from_json(cls, record: dict) -> State:
        values: dict = {k: math.inf if v is None and k in ("best_nll", "last_nll") else v for k, v in record.items()}
        begun, end = values.get("fall") or (None, None)
        return cls(**values | {"fall": None if begun is None else (begun, end)})


@dataclass(frozen=True)
class Schedule:
    """How to train: everything but model, rows and start."""

    steps: int
    """The horizon."""
    learning_rate: float
    warmup_steps: int
    batch_rows: int
    eval_every: int
    report_every: int
    checkpoint_every: int
    checkpoint_seconds: float = 600.0
    after_warmup: str = "constant"
    """Or `cosine`, to a tenth of the rate at the horizon."""
    patience: int | None = None
    """Evaluations without a gain that end the first try; None: there is one, up to the horizon."""
    again: float = 0.0
    """Steps of the second try, as a multiple of those of the first."""
    cooldown_steps: int = 0
    """The last steps before the horizon, in which the rate falls linearly to zero."""
    milestones: tuple[int, ...] = ()
    """Steps whose checkpoints are kept for good."""

    def rate(self, step: int, state: State) -> float:
        """The learning rate of a step (from 0)."""
        begun, end = state.fall or (0, 0)
        warm = step - begun if state.second else step
        rate = learning_rate(warm, self.learning_rate, self.warmup_steps, self.after_warmup, self.steps)
        if self.cooldown_steps:
            rate *= min(1.0, (self.steps - step) / self.cooldown_steps)
        return rate * (end - step) / (end - begun) if state.fall else rate

    @property
    def longest_try(self) -> int:
        """Steps of the first try at the most: a second one would still end by the horizon."""
        return max(1, int(self.steps / (1 + self.again)))

    def end(self, state: State) -> int:
        """The last step as far as is known."""
        return state.fall[1] if state.fall else self.steps

    def begin_fall(self, state: State) -> bool:
        """After an evaluation: note in the state that the rate falls from now on, if so; returns whether it does."""
        if self.patience is None or state.fall:
            return False
        state.second = state.stale >= self.patience
        if state.second:
            state.fall = (state.step, state.step + round(self.again * state.step))
        elif self.longest_try <= state.step < self.steps:
            state.fall = (state.step, self.steps)
        return state.fall is not None

    def is_due(self, every: int, state: State) -> bool:
        """Whether something that is done every this many steps is to be done after this one."""
        return state.step % every == 0 or state.step == self.end(state)

    def evaluates(self, state: State) -> bool:
        """Whether to evaluate after this step: at the set distance, and while the rate falls at its quarters."""
        if state.fall:
            begun, end = state.fall
            return (state.step - begun) % max(1, (end - begun) // 4) == 0 or state.step == end
        return self.is_due(self.eval_every, state) or (self.patience is not None and state.step == self.longest_try)
