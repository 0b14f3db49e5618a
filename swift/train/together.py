"""Several optimizers that step as one."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

from torch.optim import Optimizer


class Together(Optimizer):
    """Optimizers over different parameters, with one list of groups and one state, as loops and schedules expect."""

    def __init__(self, parts: Sequence[Optimizer]) -> None:
        self.parts = parts
        super().__init__([group for part in parts for group in part.param_groups], {})
        self._share()

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        assert closure is None
        for part in self.parts:
            part.step()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Each part loads its own share, since it knows best what of it keeps which precision."""
        at = 0
        for part in self.parts:
            groups = state_dict["param_groups"][at : at + len(part.param_groups)]
            ids = {number for group in groups for number in group["params"]}
            part.load_state_dict(
                {"state": {id: state_dict["state"][id] for id in ids & state_dict["state"].keys()}, "param_groups": groups}
            )
            at += len(groups)
        self.param_groups = [group for part in self.parts for group in part.param_groups]
        self.state = defaultdict(dict, {parameter: state for part in self.parts for parameter, state in part.state.items()})
        self._share()

    def _share(self) -> None:
        """The parts work on slices of these groups, and on this state."""
        at = 0
        for part in self.parts:
            count = len(part.param_groups)
            part.param_groups = self.param_groups[at : at + count]
            part.state = self.state
            at += count
