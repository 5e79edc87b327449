"""What every training run of ours does, whichever its trainer: ranges, batches, logs, resuming."""
