"""What an answer of an S3 server, or its absence, means to us: the one map from boto3's errors to ours."""

from __future__ import annotations

from dataclasses import dataclass

from botocore import exceptions as boto
from urllib3.exceptions import HTTPError

from cluster.errors import AccessDenied, NotFound, StoreError, StoreUnavailable, StoreUnsuitable

FOREIGN_ERRORS = (boto.BotoCoreError, boto.ClientError, HTTPError, ConnectionError)
"""Everything that a request may raise and `judge` understands."""

CREDENTIAL_ERRORS = (
    boto.NoCredentialsError,
    boto.PartialCredentialsError,
    boto.CredentialRetrievalError,
    boto.ProfileNotFound,
    boto.TokenRetrievalError,
    boto.UnauthorizedSSOTokenError,
    boto.SSOTokenLoadError,
)
NEVER_SENT = (boto.EndpointConnectionError, boto.ConnectTimeoutError, boto.ProxyConnectionError)
ABSENT_CODES = {"NoSuchKey", "NoSuchBucket", "NoSuchUpload", "NotFound", "404"}
BUSY_CODES = {"ConditionalRequestConflict", "OperationAborted"}  # 409: undecided, nothing was written, ask again
THROTTLE_CODES = {"SlowDown", "Throttling", "ThrottlingException", "RequestLimitExceeded", "TooManyRequestsException"}
DENIED_CODES = {
    "AccessDenied", "ExpiredToken", "InvalidToken", "InvalidAccessKeyId", "SignatureDoesNotMatch",
    "RequestTimeTooSkewed", "AccountProblem", "AllAccessDisabled", "TokenRefreshRequired",
}  # fmt: skip


@dataclass(frozen=True)
class Verdict:
    """`raises` is the error to end with, or None when another try may help.

    `maybe_obeyed`: the server may have done what was asked although it did not say so.
    """

    code: str
    message: str
    raises: type[Exception] | None = None
    maybe_obeyed: bool = False


def judge(error: Exception) -> Verdict:
    """Decide what to do after a failed request. FileExistsError stands for 412: the key exists."""
    if isinstance(error, boto.ClientError):
        return _judge_answer(error)
    code, message = type(error).__name__, str(error)
    if isinstance(error, CREDENTIAL_ERRORS):
        return Verdict(code, message, AccessDenied)
    if isinstance(error, NEVER_SENT):
        return Verdict(code, message)
    if isinstance(error, boto.SSLError):
        return Verdict(code, message, StoreUnavailable)
    if isinstance(error, boto.HTTPClientError | boto.IncompleteReadError | HTTPError | ConnectionError):
        return Verdict(code, message, maybe_obeyed=True)
    return Verdict(code, message, StoreError)


def _judge_answer(error: boto.ClientError) -> Verdict:
    details = error.response.get("Error", {})
    code = str(details.get("Code", "unknown"))
    status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    message = f"{code} ({status}): {details.get('Message') or 'no message'}"
    if code in DENIED_CODES or status in (401, 403):
        return Verdict(code, message, AccessDenied)
    if code == "PreconditionFailed" or status == 412:
        return Verdict(code, message, FileExistsError)
    if code in BUSY_CODES or (code in THROTTLE_CODES and status < 500) or status == 429:
        return Verdict(code, message)
    if code in ABSENT_CODES or status == 404:
        return Verdict(code, message, NotFound)
    if code == "NotImplemented" or status == 501:
        return Verdict(code, message, StoreUnsuitable)
    if status >= 500 or code in ("RequestTimeout", "InternalError", "ServiceUnavailable"):
        # A gateway in front of the server may say 5xx after the server has obeyed.
        return Verdict(code, message, maybe_obeyed=True)
    return Verdict(code, message, StoreError)
