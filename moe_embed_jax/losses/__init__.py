"""What a run minimises."""

MASKED_LM = "masked_lm"  # masked language modelling, stage 1, as configs and model cards name it
