"""TA-LoRA for the Segment Anything Model, as a PEFT method."""
