"""The parts of a training run.

build.py reads the options and creates the other parts, trainer.py runs epochs, step.py computes one
optimizer step, state.py holds the state for resuming, checkpoints.py and run_lock.py manage the
checkpoint folder, earlier_runs.py finds the state to resume from, metrics_log.py records metrics,
supervisor.py handles signals, stalls and lost ranks, loader.py loads batches, optim.py creates the
optimizer and balance.py the class weights.
"""
