"""The loss scale of float16: as large as the gradients allow, the same in every process."""

from typing import Any

from swift.errors import TrainingError

SMALLEST_SCALE = 2.0**-14
GROWTH_INTERVAL = 2000  # these three are those of torch.amp.GradScaler
LARGEST_FIRST = 2.0**16
BACKOFF = 0.5


class LossScale:
    """Doubles after 2000 good steps, halves and skips the step when a gradient overflows."""

    def __init__(self) -> None:
        self.value = LARGEST_FIRST
        self.good_steps = 0

    def update(self, is_finite: bool) -> None:
        """TrainingError if gradients overflow at every scale."""
        if not is_finite:
            self.value, self.good_steps = self.value * BACKOFF, 0
            if self.value < SMALLEST_SCALE:
                raise TrainingError("the gradients overflow float16 at every loss scale")
            return
        self.good_steps += 1
        if self.good_steps == GROWTH_INTERVAL:
            self.value, self.good_steps = self.value * 2, 0

    def state_dict(self) -> dict[str, Any]:
        """In the words of torch.amp.GradScaler, whose files it reads and writes."""
        return {
            "scale": self.value,
            "growth_factor": 2.0,
            "backoff_factor": BACKOFF,
            "growth_interval": GROWTH_INTERVAL,
            "_growth_tracker": self.good_steps,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state:
            self.value, self.good_steps = float(state["scale"]), int(state["_growth_tracker"])
