"""One rank's tensors: StepPlan to token ids."""
