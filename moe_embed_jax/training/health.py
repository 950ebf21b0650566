"""Whether a run may go on: its numbers are finite, and its routers use their experts.

A router has collapsed when it sends nearly all tokens to the same K experts, whatever the text: the
others get no gradients, and the model is a dense one at the price of a sparse one. Batches are of
one source and language, and a router may well send each language to other experts, so the
measure is the load of an expert in the mean over many steps. From it comes the effective number of
experts, exp(entropy of the load) (Hill's number of order 1; the "perplexity" of a codebook's use):
between K, all tokens to the same ones, and E, the same load everywhere. The *spread* of a router is
where it stands between them, 0 to 1.
"""

import collections
import math

import jax
import numpy as np

from moe_embed_jax.checkpoint import Checkpoints
from moe_embed_jax.errors import UserError
from moe_embed_jax.finite import leaves_finite
from moe_embed_jax.models.encoder import EncoderConfig
from moe_embed_jax.processes import from_process_0
from moe_embed_jax.routing.router import effective_experts
from moe_embed_jax.sharding import path_of
from moe_embed_jax.training.run_config import HealthConfig


def spread(load_E: np.ndarray, experts_per_token: int) -> np.ndarray:
    """0 if all tokens take the same K experts, 1 if all experts have the same load.

    `load_E`: shares of the assignments, which add up to 1 over the last axis. NaN where E = K: such
    a router has no choice.
    """
    choice = np.shape(load_E)[-1] - experts_per_token
    if choice == 0:
        return np.full(np.shape(load_E)[:-1], np.nan)
    return (effective_experts(load_E) - experts_per_token) / choice


class Health:
    """Looks at every step of a run before a checkpoint holds what came of it.

    Every process of a run has one and comes to the same verdicts: metrics are the same everywhere.
    """

    def __init__(
        self,
        config: HealthConfig,
        model: EncoderConfig,
        warmup_steps: int,
        checkpoints: Checkpoints,
        recent: list[dict],
    ):
        """`recent`: process 0's records of the steps before, so that a resumed run judges as an
        uninterrupted one does. All processes call this together."""
        self._config = config
        self._model = model
        self._warmup_steps = warmup_steps
        self._checkpoints = checkpoints
        self._load_WYE = collections.deque(maxlen=config.window)
        if model.num_moe_layers:
            shape = (config.window, model.num_moe_layers, model.num_experts)
            recent_WYE = np.zeros(shape, np.float32)
            for place, record in zip(recent_WYE[::-1], reversed(recent), strict=False):
                if record["step"] > warmup_steps:
                    place[...] = record["expert_load"]
            self._load_WYE.extend(load for load in from_process_0(recent_WYE) if load.any())

    def check(self, records: list[dict]) -> None:
        """Raises `UserError` at the first of these steps that is sick: names it, what is wrong, the
        last good checkpoint, and what to try."""
        for record in records:
            self._check_finite(record)
            if "expert_load" in record and record["step"] > self._warmup_steps:
                self._load_WYE.append(np.array(record["expert_load"], np.float32))
                self._check_routers(record)

    def check_state(self, step: int, state) -> None:
        """Raises `UserError` if a number of the state (any tree of arrays) is not finite: what
        `check` cannot see, since the metrics of a step come from before its update."""
        finite = jax.device_get(leaves_finite(state))
        bad = [path_of(path) for path, ok in jax.tree_util.tree_leaves_with_path(finite) if not ok]
        if bad:
            more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
            raise self._not_finite(f"not finite after step {step}: {', '.join(bad[:3])}{more}")

    def _check_finite(self, record: dict) -> None:
        step = record["step"]
        where = f"step {step}, batch of {record['group']}"
        if not math.isfinite(record["loss"]):
            problem = f"{where}: the loss is {record['loss']}"
            # It is the loss of the parameters that the step before made.
            if step - 1 in self._checkpoints.steps():
                target = self._checkpoints.set_aside(step - 1)
                problem += f" with the parameters of checkpoint {step - 1}, moved to {target}"
            raise self._not_finite(problem)
        if not math.isfinite(record["grad_norm"]):
            raise self._not_finite(f"{where}: the norm of the gradient is {record['grad_norm']}")

    def _check_routers(self, record: dict) -> None:
        config, model = self._config, self._model
        if not config.stop_on_collapse or len(self._load_WYE) < config.window:
            return
        load_YE = np.mean(self._load_WYE, axis=0)
        spread_Y = spread(load_YE, model.experts_per_token)
        collapsed = np.flatnonzero(spread_Y < config.least_spread)
        if not len(collapsed):
            return
        layers = [
            f"layer {model.moe_layers[m]}: expert {load_YE[m].argmax()} gets "
            f"{model.experts_per_token * load_YE[m].max():.1%} of the tokens, "
            f"{effective_experts(load_YE[m]):.2f} of {model.num_experts} experts are in use "
            f"(spread {spread_Y[m]:.3f})"
            for m in collapsed
        ]
        raise UserError(
            f"step {record['step']}, batch of {record['group']}: the router has collapsed "
            f"(health.least_spread={config.least_spread:g}, mean of {config.window} steps, top-"
            f"{model.experts_per_token}) in {'; '.join(layers)}. {self._last_good()}. Try a higher "
            f"loss.balance or a lower optimizer.peak_learning_rate {self._restart()}; "
            "--config.health.stop_on_collapse=False continues as it is"
        )

    def _not_finite(self, problem: str) -> UserError:
        return UserError(
            f"{problem}. {self._last_good()}. Try a lower optimizer.peak_learning_rate or a longer "
            f"optimizer.warmup_steps {self._restart()}; if it is always this batch, see the data"
        )

    def _last_good(self) -> str:
        step = self._checkpoints.latest_step()
        if step is None:
            return "Last good checkpoint: none yet"
        return f"Last good checkpoint: {self._checkpoints.folder / str(step)} (step {step})"

    def _restart(self) -> str:
        source = f", from there by --config.init.source={self._checkpoints.folder.parent}"
        return "in a new --workdir" + ("" if self._checkpoints.latest_step() is None else source)
