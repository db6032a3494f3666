"""What a user or another driver can do to a job.

JobError                      exit code
├── SpecError            2    the spec, a flag or the store cannot work; names file, line, field and fix
├── PromptsError         2    the prompt list cannot be read at all
├── SpecChanged          2    the job was begun with other pixels; carries the diff
├── LeaseHeld           75    another driver holds the job
├── LeaseLost           75    another driver has taken the job over: stop writing
├── StoppedBeforeStart   4    a signal came before the first take was given out; the same command goes on
└── JournalBroken        1    the store's record contradicts itself: a defect of ours, never repaired silently
"""


class JobError(Exception):
    """Base of the errors a job ends with; `exit_code` follows the table above."""

    exit_code = 1


class SpecError(JobError):
    exit_code = 2


class PromptsError(JobError):
    exit_code = 2


class SpecChanged(JobError):
    exit_code = 2


class LeaseHeld(JobError):
    exit_code = 75


class LeaseLost(JobError):
    exit_code = 75


class StoppedBeforeStart(JobError):
    exit_code = 4


class JournalBroken(JobError):
    exit_code = 1
