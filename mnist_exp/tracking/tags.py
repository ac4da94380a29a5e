"""The tags of runs, and MLflow's own names for some of them."""

DATA = "data"  # the name of the data set; of a sweep's parent: that of all its runs
RECIPE = "recipe"  # of a training run: model, optimizer, batch size and the digest of the configuration without the seed
OVERRIDES = "overrides"  # of the command line, without locations, quoted for a shell
RESUMED = "resumed"  # at how many examples, and in which changed environment
RERUN_OF = "rerun_of"  # the id of the run that was repeated
ERROR = "error"  # the reason why the run did not finish, in one line
PRUNED = "pruned"  # the reason why a search stopped the run
DIVERGED = "diverged"  # set if the loss or the weights became infinite or NaN

SWEEP_JOBS = "sweep_jobs"  # of a sweep's parent: the number of its jobs
GRIDS = "grids"  # of a sweep's parent: the overrides of each grid, as JSON
OBJECTIVE = "objective"  # the metric that decides
KEYS = "keys"  # of a sweep's parent: the keys that vary
FINISHED = "finished"  # of a sweep's parent: how many of its jobs have finished, such as 9 of 10
SWEEPER = "sweeper"  # of a sweep's parent: grid or optuna
SWEEP = "sweep_id"  # of a job: the id of the parent
JOB = "job_num"  # of a job: its number; NO_JOB if the sweep, as it is now, has no such job
NO_JOB = "none"
ARM = "arm"  # of a job: the overrides that differ between jobs, without the seed, in short form

MODEL, TRAINED_BY = "model", "trained_by"  # of an evaluation: the address of the model, and the id of the run that trained it
CPU, GPU = "cpu", "gpu"  # the processor that trained, and the GPU if it was used
ANSWER = "answer"  # of a sweep's parent: the last verdict; answer.FACTOR: that of each comparison, with its notes

HOST, PID, OUTPUT_DIR, USER = "host", "pid", "output_dir", "mlflow.user"  # the process that works on the run: `reap` looks for it

COMMIT, BRANCH, DIRTY = "mlflow.source.git.commit", "mlflow.source.git.branch", "mlflow.source.git.dirty"
REPOSITORY = "mlflow.source.git.repoURL"
COMMAND, COMMAND_TYPE = "mlflow.source.name", "mlflow.source.type"
PARENT = "mlflow.parentRunId"
COLOR = "mlflow.runColor"
DESCRIPTION = "mlflow.note.content"
OF_THE_END = {ERROR, PRUNED, DIVERGED, DESCRIPTION}  # tags that a run loses when it is resumed
DATASET_CONTEXT = "mlflow.data.context"
