"""Faults of the router, the expert layers and the exchange between devices."""

from mutations.fault import Fault

FAULTS = (
    Fault(
        "padding-is-routed",
        "models/moe.py",
        "expert_RLK = jnp.where(valid_RL[..., None], expert_RLK, logits_RLE.shape[-1])",
        "pass",
        "test_encoder.py -k route",
    ),
    Fault(
        "gates-always-sum-to-one",
        "models/moe.py",
        "if normalize_gates:",
        "if True:",
        "test_encoder.py -k route",
    ),
    Fault(
        "router-computes-in-compute-dtype",
        "models/moe.py",
        "            dtype=jnp.float32,\n            precision",
        "            dtype=config.dtype,\n            precision",
        "test_encoder.py test_step.py test_masked_step.py -k bfloat16",
        more=(("self.router(x_RLD.astype(jnp.float32))", "self.router(x_RLD)"),),
    ),
    Fault(
        "second-choice-has-the-gate-of-the-first",
        "routing/rows.py",
        "gate_TK[:, k, None]",
        "gate_TK[:, 0, None]",
        "test_routing.py -k 'equals_reference and blocked and plain'",
    ),
    Fault(
        "blocked-backward-without-gate",
        "routing/blocked.py",
        "activation_vjp(gate[:, None] * dhidden)",
        "activation_vjp(dhidden)",
        "test_routing.py -k 'equals_reference and blocked and plain'",
    ),
    Fault(
        "blocked-sums-gradients-in-bfloat16",
        "routing/blocked.py",
        "jnp.zeros(w.shape, jnp.float32), weights)",
        "jnp.zeros_like(w), weights)",
        "test_routing.py -k bfloat16",
        more=(
            (
                "dw_out_FD += product(hidden.T, gate[:, None] * dy)",
                "dw_out_FD += hidden.T @ (gate[:, None] * dy)",
            ),
            ("dw_in_DF += product(x.T, dpre)", "dw_in_DF += x.T @ dpre"),
            ("dpre.sum(axis=0, dtype=jnp.float32)", "dpre.sum(axis=0)"),
        ),
    ),
    Fault(
        "blocked-leaves-out-the-last-half-empty-block",
        "routing/blocked.py",
        "blocks_E = -(-count_E // block)",
        "blocks_E = count_E // block",
        "test_routing.py -k 'equals_reference and blocked and plain'",
    ),
    Fault(
        "grouped-bias-gradient-of-empty-tiles",
        "routing/grouped.py",
        "jnp.where(in_use_t[:, None, None], dpre_tMF, 0).sum(axis=1)",
        "dpre_tMF.sum(axis=1)",
        "test_routing.py -k parts_of_the_hidden_layer",
    ),
    Fault(
        "grouped-gradient-of-an-empty-expert-is-not-zero",
        "routing/grouped.py",
        "            is_used_E[:, None, None],",
        "            True,",
        "test_routing.py -k 'parts_of_the_hidden_layer or empty_expert'",
    ),
    Fault(
        "capacity-fills-cells-token-by-token",
        "routing/capacity.py",
        "by_choice_A = destination_TK.T.reshape(-1)",
        "by_choice_A = destination_TK.reshape(-1)",
        "test_routing.py -k capacity_drops",
        more=(
            (
                "return slot_A.astype(jnp.int32).reshape(top_k, tokens).T, dropped",
                "return slot_A.astype(jnp.int32).reshape(tokens, top_k), dropped",
            ),
        ),
    ),
    Fault(
        "capacity-cells-rounded-down",
        "routing/capacity.py",
        "-(-share // 8) * 8",
        "max(share // 8 * 8, 8)",
        "test_routing.py -k 'capacity_drops or cell'",
    ),
    Fault(
        "capacity-without-the-hidden-bias",
        "routing/capacity.py",
        "hidden_ECF = add_bias(hidden_ECF, bias_in_EF[:, None])",
        "pass",
        "test_routing.py -k 'equals_reference and capacity and bias'",
    ),
    Fault(
        "ring-leaves-out-the-first-expert-of-a-shard",
        "routing/exchange.py",
        "expert_TK >= first",
        "expert_TK > first",
        "test_exchange.py -k 8_devices",
    ),
    Fault(
        "ring-visits-one-shard-too-few",
        "routing/exchange.py",
        "start, length=shards)",
        "start, length=shards - 1)",
        "test_exchange.py -k 8_devices",
    ),
    Fault(
        "all-to-all-does-not-count-its-drops",
        "routing/exchange.py",
        "dropped + dropped_here\n\n\nEXCHANGES",
        "dropped_here\n\n\nEXCHANGES",
        "test_exchange.py -k 8_devices",
    ),
)
