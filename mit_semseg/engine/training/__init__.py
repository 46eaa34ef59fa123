"""The parts of a training: each knows only its own.

build.py reads the configuration, trainer.py runs epochs, step.py computes one step, state.py is
what a run resumes from, checkpoints.py and run_lock.py keep its folder, earlier_runs.py finds what
to resume, metrics_log.py records figures, supervisor.py handles signals, stalls and lost ranks,
loader.py gives batches, optim.py and balance.py are the optimizer and the class weights.
"""
