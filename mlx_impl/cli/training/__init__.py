"""The parts of `train`: the job, the run's folder, its lock and manifest, how to resume."""
