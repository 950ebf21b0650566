"""Faults of the optimiser, the step, the loop, shardings and the watch over a run's health."""

from mutations.fault import Fault

RESUME = "test_training_run.py -k after_sigterm"

FAULTS = (
    Fault(
        "weight-decay-on-biases",
        "training/optimizer.py",
        '"bias" not in path and ',
        "",
        "test_optimizer.py -k 'decay or by_hand'",
    ),
    Fault(
        "weight-decay-counts-the-scan-axis",
        "training/optimizer.py",
        'leaf.shape[1:] if path.startswith(("groups/", "tail/")) else leaf.shape',
        "leaf.shape",
        "test_optimizer.py -k decay",
    ),
    Fault(
        "warm-up-ends-a-step-late",
        "training/optimizer.py",
        "[rise, after], [warmup]",
        "[rise, after], [warmup + 1]",
        "test_optimizer.py -k schedules",
    ),
    Fault(
        "warm-up-starts-at-zero",
        "training/optimizer.py",
        "peak / (warmup + 1)",
        "0.0",
        "test_optimizer.py -k 'schedules or by_hand'",
    ),
    Fault(
        "clips-after-adamw",
        "training/optimizer.py",
        "        optax.clip_by_global_norm(config.clip_norm),\n",
        "",
        "test_optimizer.py -k by_hand",
        more=(
            (
                "            mask=decay_mask,\n        ),\n",
                "            mask=decay_mask,\n        ),\n"
                "        optax.clip_by_global_norm(config.clip_norm),\n",
            ),
        ),
    ),
    Fault(
        "gradient-is-never-clipped",
        "training/optimizer.py",
        "        optax.clip_by_global_norm(config.clip_norm),\n",
        "",
        "test_optimizer.py test_step.py -k 'by_hand or golden'",
    ),
    Fault(
        "temperature-not-clipped-after-the-update",
        "training/step.py",
        "state.params[LOG_SCALE] = clip_log_scale(config.loss, state.params[LOG_SCALE])",
        "pass",
        "test_step.py -k temperature",
    ),
    Fault(
        "balance-over-each-device-alone",
        "training/step.py",
        'of_devices if config.loss.balance_over == "device" else statistics',
        "of_devices",
        "test_balance_over.py -k eight",
    ),
    Fault(
        "padding-counts-as-tokens",
        "training/step.py",
        '"tokens": jnp.sum(valid_CRL),',
        '"tokens": valid_CRL.size,',
        "test_step.py -k 'chunks_change_nothing and 8'",
    ),
    Fault(
        "resume-skips-a-batch",
        "training/loop.py",
        "batches.iterate(start, config.steps)",
        "batches.iterate(start + (start > 0), config.steps)",
        RESUME,
    ),
    Fault(
        "restored-step-is-zero",
        "training/state.py",
        "return TrainState(step, items",
        "return TrainState(jnp.zeros_like(step), items",
        RESUME,
    ),
    Fault(
        "preemption-saves-nothing",
        "training/loop.py",
        "or is_last or stop\n",
        "or is_last\n",
        "test_training_run.py -k sigterm_in_preparation",
    ),
    Fault(
        "fsdp-gathers-along-the-scan-axis",
        "sharding.py",
        "axis=position - skip",
        "axis=position",
        "test_meshes.py",
    ),
    Fault(
        "unused-sharding-rule-is-accepted",
        "sharding.py",
        "    if unused:\n",
        "    if False:\n",
        "test_sharding.py -k unused",
    ),
    Fault(
        "warm-up-steps-are-judged",
        "training/health.py",
        'if "expert_load" in record and record["step"] > self._warmup_steps',
        'if "expert_load" in record',
        "test_health.py -k collapse_is_named",
    ),
    Fault(
        "collapse-judged-by-one-batch",
        "training/health.py",
        "load_ME = np.mean(self._load_WME, axis=0)",
        "load_ME = self._load_WME[-1]",
        "test_health.py -k every_language",
    ),
    Fault(
        "checkpoint-after-the-sick-step-is-set-aside",
        "training/health.py",
        "if step - 1 in self._checkpoints.steps():",
        "if step in self._checkpoints.steps():",
        "test_health.py -k set_aside",
    ),
)
