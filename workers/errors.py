"""What can go wrong while one prompt becomes one video.

RenderError                   kind, and: would another attempt help?
├── BadPrompt                 no   the row must change
├── ConfigUnsupported         no   the spec asks for what this build cannot do
├── CheckpointMismatch        no   weights missing, altered or of another shape
├── KernelUnavailable         no   the kernel asked for cannot run here
├── NonFiniteLatents          yes  once, in float32: the same numbers would fail the same way
├── GpuOutOfMemory            yes  one rung down the ladder, in a fresh process
├── DeviceBroken              yes  in a fresh process (CUDA error)
├── EncodeFailed              yes
├── UploadFailed              yes
├── Preempted                 yes  elsewhere: this actor was told to end
└── QualityRefused            no   the picture is black, frozen or not a picture
"""

from __future__ import annotations

from workers.task import FailureKind


class RenderError(Exception):
    """Base of all errors of a render. `kind` goes into the row; the flags answer the driver."""

    kind: FailureKind = "unknown"
    retryable = True
    fresh_process = False


class BadPrompt(RenderError):
    kind: FailureKind = "invalid_input"
    retryable = False


class ConfigUnsupported(RenderError):
    kind: FailureKind = "invalid_input"
    retryable = False


class CheckpointMismatch(RenderError):
    kind: FailureKind = "invalid_input"
    retryable = False


class KernelUnavailable(RenderError):
    kind: FailureKind = "invalid_input"
    retryable = False


class NonFiniteLatents(RenderError):
    kind: FailureKind = "nan"


class GpuOutOfMemory(RenderError):
    kind: FailureKind = "oom"
    fresh_process = True


class DeviceBroken(RenderError):
    kind: FailureKind = "unknown"
    fresh_process = True


class EncodeFailed(RenderError):
    kind: FailureKind = "encoder"


class UploadFailed(RenderError):
    kind: FailureKind = "upload"


class Preempted(RenderError):
    kind: FailureKind = "preempted_exhausted"


class QualityRefused(RenderError):
    kind: FailureKind = "quality"
    retryable = False
